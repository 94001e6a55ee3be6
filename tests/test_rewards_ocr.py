"""The OCR reward: its arithmetic against the published table, its reading on rendered words."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import rewards
from rewards import ocr
from rewards.images import to_images
from rewards.ocr import MODES, OcrReward, Reader, distance, quoted_text, reader

# recognised, target -> flow_grpo, strict, max_norm: computed by hand from the published formula
TABLE = [
    ("HELLO", "HELLO", 1, 1, 1),
    ("HEL LO", "HELLO", 1, 1, 1),
    ("HELO", "HELLO", 0.8, 0.8, 0.8),
    ("HELLOO", "HELLO", 1, 0.8, 5 / 6),
    ("SAY HELLO WORLD", "HELLO", 1, 0, 5 / 13),
    ("HELLO HELLO", "HELLO", 1, 0, 0.5),
    ("", "HELLO", 0, 0, 0),
    ("XXXXXXXXXXXX", "HELLO", 0, 0, 0),
    ("HE", "HELLO", 0.4, 0.4, 0.4),
    ("OLLEH", "HELLO", 0.2, 0.2, 0.2),
    ("Hello Wrld", "Hello World", 0.9, 0.9, 0.9),
    ("World Hello", "Hello World", 0.2, 0.2, 0.2),
    ("NASA 2O49", "NASA 2049", 0.875, 0.875, 0.875),
    ("kitten", "sitting", 4 / 7, 4 / 7, 4 / 7),
    ("sitting", "kitten", 0.5, 0.5, 4 / 7),
    ("STOP!", "STOP", 1, 0.75, 0.8),
    ("a", "abc", 1 / 3, 1 / 3, 1 / 3),
]
WORDS = ["SUN", "MOON", "STOP", "FISH", "TREE", "JAZZ", "OPEN", "QUIZ", "BIRD", "LAMP"]


def picture(word: str, size: int = 18, side: int = 64, seed: int = 0) -> Image.Image:
    font = ImageFont.load_default(size)
    image = Image.new("RGB", (side, side), [(250, 250, 245), (20, 25, 50)][seed % 2])
    colour = [(200, 30, 40), (245, 240, 90)][seed % 2]
    centre = (side // 2, side // 2 + seed % 5 - 2)
    ImageDraw.Draw(image).text(centre, word, fill=colour, font=font, anchor="mm")
    return image


@pytest.mark.parametrize(("read", "target", "flow", "strict", "max_norm"), TABLE)
def test_scores_of_the_published_table(read, target, flow, strict, max_norm):
    for mode, expected in (("flow_grpo", flow), ("strict", strict), ("max_norm", max_norm)):
        assert MODES[mode](read, [target]) == pytest.approx(expected, abs=1e-6), mode
    same = "".join(read.split()).lower() == "".join(target.split()).lower()
    assert MODES["exact"](read, [target]) == same
    assert max(1 + MODES["cer"](read, [target]), 0) == pytest.approx(strict)


def test_distance_is_a_metric_on_small_cases():
    texts = ["", "a", "ab", "ba", "abc", "kitten", "sitting"]
    for a in texts:
        assert distance(a, a) == 0
        assert distance(a, "") == len(a)
        for b in texts:
            assert distance(a, b) == distance(b, a)
            for c in texts:
                assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ('a sign that says "STOP"', ["STOP"]),
        ("a sign that says “STOP”", ["STOP"]),
        ("ein Schild: „HALT“", ["HALT"]),
        ('"GO" above "SLOW DOWN"', ["GO", "SLOW DOWN"]),
        ("a cat", []),
        ('a 5" disk', []),
        ('an empty "" sign', []),
        ("don't 'stop'", []),
    ],
)
def test_targets_are_what_stands_in_double_quotes(prompt, spans):
    assert quoted_text(prompt) == spans


def test_prompts_that_quote_nothing_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(ocr, "_engine", lambda *_: pytest.fail("an engine was started"))
    reward = rewards.load("0.5*ocr + jpeg")
    with pytest.raises(ValueError, match="'a cat', which quotes no text"):
        reward.check(['"A"', "a cat"])
    reward.check(['the word "A"'])
    with pytest.raises(ValueError, match="quotes no text"):
        reward(torch.rand(1, 3, 64, 64), ["a cat"])
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        OcrReward("strickt")
    with pytest.raises(ValueError, match="at least 32"):
        OcrReward(limit_side_len=8)


def test_rendered_words_are_read_by_every_setting():
    shown = [picture(word, 16 + i % 5, seed=i) for i, word in enumerate(WORDS)]
    images, prompts = to_images(shown), [f'the word "{word}"' for word in WORDS]
    for args in ("", ", limit_side_len=96, upscale=2", ", detect=false"):
        scores = rewards.load(f"ocr(exact{args})")(images, prompts)
        assert scores.dtype == torch.float32
        assert scores.mean() >= 0.9, args
    wrong = rewards.load("ocr")(images, [f'"{word}"' for word in reversed(WORDS)])
    assert wrong.mean() < 0.5


def test_large_and_oblong_pictures_are_read():
    for side, size in ((160, 20), (800, 60)):
        assert OcrReward().read(to_images(picture("STOP", size, side))) == ["STOP"]
    wide = picture("STOP", 20, 96).crop((0, 24, 96, 72))
    assert OcrReward().read(to_images(wide)) == ["STOP"]


def test_blank_and_noisy_pictures_hold_no_text():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)])
    assert OcrReward().read(images) == [""] * 4
    assert OcrReward()(images, ['"STOP"'] * 4).tolist() == [0.0] * 4


def test_blur_costs_reward_but_not_all_of_it():
    sharp = [picture(word, 20, seed=i) for i, word in enumerate(WORDS[:5])]
    soft = [image.filter(ImageFilter.GaussianBlur(3.5)) for image in sharp]
    prompts = [f'"{word}"' for word in WORDS[:5]]
    reward = OcrReward()
    assert reward(to_images(sharp), prompts).mean() > 0.9
    assert reward(to_images(soft), prompts).mean() < 0.7


def test_a_text_depends_on_nothing_but_its_picture():
    shown = to_images([picture(word, seed=i) for i, word in enumerate(WORDS[:6])])
    together = Reader().read(shown)
    alone = [Reader().read(shown[i : i + 1])[0] for i in (5, 0)]
    assert alone == [together[5], together[0]]
    order = [4, 2, 0, 5, 1, 3]
    assert Reader().read(shown[order]) == [together[i] for i in order]


def test_two_threads_may_read_at_once():
    shown = to_images([picture(word, seed=i) for i, word in enumerate(WORDS)])
    expected = Reader().read(shown)
    shared = Reader()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: shared.read(shown[i : i + 1])[0], range(len(WORDS))))
    assert found == expected


def test_pictures_are_read_once(monkeypatch):
    calls = []

    def engine(limit, detect):
        return lambda array: calls.append(limit) or type("Result", (), {"txts": ("STOP",)})

    monkeypatch.setattr(ocr, "_engine", engine)
    found = Reader()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert found.read(images) == found.read(images) == ["STOP"]
    assert calls == [("min", ocr.SMALLEST)]
    found.read(torch.rand(1, 3, 32, 800))
    assert calls[-1] == ("max", ocr.LARGEST)
    assert reader() is reader()
    assert reader() is not reader(160)


def test_a_failing_engine_is_an_error_and_not_a_score_of_zero(monkeypatch):
    def engine(limit, detect):
        def fail(array):
            raise RuntimeError("the model is broken")

        return fail

    monkeypatch.setattr(ocr, "_engine", engine)
    monkeypatch.setattr(ocr, "_READERS", {})
    with pytest.raises(RuntimeError, match="broken"):
        OcrReward()(torch.rand(3, 3, 64, 64), ['"A"'] * 3)


def test_reading_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert Reader().read(to_images(picture("STOP"))) == ["STOP"]


def test_reading_prints_nothing(capfd):
    blank = torch.ones(1, 3, 64, 64)
    assert Reader().read(blank) == Reader(detect=False).read(blank) == [""]
    assert capfd.readouterr() == ("", "")


def test_quotes_are_spans_and_the_modes_join_them_as_documented():
    spans = quoted_text('"SLOW" above "DOWN"')
    assert MODES["strict"]("slow down", spans) == 1
    assert MODES["exact"]("ＳＬＯＷ DOWN", spans) == 1  # full width, as recognisers may write
    assert MODES["flow_grpo"]("slow", spans) == 1
    assert MODES["strict"]("slow", spans) == 0.5
