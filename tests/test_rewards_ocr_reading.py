"""What the OCR reward reads on rendered words, and in which order."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_texts import DRAWN, READ, WORDS, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFilter

import rewards
from rewards.backends import ocr_engines
from rewards.backends.ocr_engines import RapidOcr, Reader, reader, reading_order
from rewards.images import to_images
from rewards.models.ocr import OcrReward


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
    together = Reader(RapidOcr()).read(shown)
    alone = [Reader(RapidOcr()).read(shown[i : i + 1])[0] for i in (5, 0)]
    assert alone == [together[5], together[0]]
    order = [4, 2, 0, 5, 1, 3]
    assert Reader(RapidOcr()).read(shown[order]) == [together[i] for i in order]


def test_texts_do_not_depend_on_the_number_of_threads():
    """Doubtful pictures, where the last bit of a network's output could change a letter."""
    generator = torch.Generator().manual_seed(3)
    shown = to_images([picture(word, 14, seed=i) for i, word in enumerate(WORDS)])
    shown = (shown + 0.25 * torch.randn(shown.shape, generator=generator)).clamp(0, 1)
    look, texts, before = RapidOcr(), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            texts.append(Reader(look).read(shown))
            assert sum(idle.qsize() for idle in look._idle.values()) <= threads
    finally:
        torch.set_num_threads(before)
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]
    assert len(set(texts[0])) > 5


def test_two_threads_may_read_at_once():
    shown = to_images([picture(word, seed=i) for i, word in enumerate(WORDS)])
    expected = Reader(RapidOcr()).read(shown)
    shared = Reader(RapidOcr())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: shared.read(shown[i : i + 1])[0], range(len(WORDS))))
    assert found == expected


def test_the_engine_sees_blue_first_small_pictures_enlarged_and_large_ones_shrunk(monkeypatch):
    calls = []
    box = np.array([[[0, 0], [9, 0], [9, 9], [0, 9]]])
    result = SimpleNamespace(txts=("STOP",), boxes=box)

    def engine(limit, detect):
        return lambda array: calls.append((*limit, *array[0, 0].tolist())) or result

    monkeypatch.setattr(ocr_engines, "_engine", engine)
    look = RapidOcr()
    assert look(np.zeros((64, 64, 3), np.uint8)) == "STOP"
    assert look(np.full((32, 800, 3), [1, 2, 3], np.uint8)) == "STOP"
    blue_first = (3, 2, 1)
    assert calls == [
        ("min", ocr_engines.SMALLEST, 0, 0, 0),
        ("max", ocr_engines.LARGEST, *blue_first),
    ]
    assert RapidOcr(160)(np.zeros((800, 800, 3), np.uint8)) == "STOP"
    assert calls[-1] == ("min", 160, 0, 0, 0)
    assert reader(RapidOcr()) is reader(RapidOcr())
    assert reader(RapidOcr()) is not reader(RapidOcr(160))


def boxes_of(*corners: tuple[float, float, float, float]) -> np.ndarray:
    """(left, top, right, bottom) -> (m, 4, 2)."""
    return np.array([[[l, t], [r, t], [r, b], [l, b]] for l, t, r, b in corners], float)  # noqa: E741


# boxes in the order in which a person reads them
LAYOUTS = {
    "none": [],
    "one": [(3, 4, 9, 8)],
    "two columns, two rows": [(0, 0, 40, 10), (50, 2, 90, 12), (0, 20, 40, 30), (50, 19, 90, 29)],
    "small type close together": [(30, 1, 50, 8), (60, 1, 80, 8), (2, 9, 20, 16), (40, 9, 55, 16)],
    "a short word before a tall one": [(5, 60, 50, 100), (60, 20, 150, 90)],
    "two small rows beside a large word": [(0, 0, 60, 40), (70, 2, 99, 16), (70, 22, 99, 36)],
    "a row that rises to the right": [(0, 9, 20, 21), (30, 7, 50, 19), (60, 5, 80, 17)],
    "a dash and a dot": [(0, 0, 30, 20), (35, 9, 45, 11), (50, 0, 80, 20), (82, 17, 85, 20)],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_boxes_are_read_by_lines_in_whatever_order_and_scale_they_come(layout):
    boxes, m = boxes_of(*layout), len(layout)
    assert reading_order(boxes) == list(range(m))
    rng = np.random.default_rng(0)
    for scale in (0.25, 1, 16):
        for degrees in (0, 15, -30):
            a = np.radians(degrees)
            turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
            moved = (boxes.reshape(-1, 4, 2) * scale) @ turn.T + [100, -7]
            order = rng.permutation(m)
            assert [order[i] for i in reading_order(moved[order])] == list(range(m))


CORNERS = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20), st.integers(1, 20))


@given(st.lists(CORNERS, max_size=8, unique=True), st.randoms())
def test_the_reading_order_does_not_depend_on_the_order_of_the_boxes(corners, random):
    boxes = boxes_of(*((x, y, x + w, y + h) for x, y, w, h in corners))
    order = list(range(len(boxes)))
    random.shuffle(order)
    whole = reading_order(boxes)
    assert sorted(whole) == list(range(len(boxes)))
    assert [order[i] for i in reading_order(boxes[order])] == whole


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_words_are_read_in_their_order(name):
    array = np.array(DRAWN[name])
    text = RapidOcr()(array)
    assert text == READ[name]
    own = ocr_engines._engine(("min", ocr_engines.SMALLEST), True)(
        np.ascontiguousarray(array[..., ::-1])
    )
    assert sorted(own.txts) == sorted(text.split())
    if name in ("one below another", "words apart"):  # where RapidOCR's own order is right too
        assert list(own.txts) == text.split()


def test_reading_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert Reader(RapidOcr()).read(to_images(picture("STOP"))) == ["STOP"]


def test_reading_prints_nothing(capfd):
    blank = torch.ones(1, 3, 64, 64)
    assert Reader(RapidOcr()).read(blank) == Reader(RapidOcr(detect=False)).read(blank) == [""]
    assert capfd.readouterr() == ("", "")


def test_pictures_of_extreme_shapes_are_read():
    for height, width in ((1, 1), (2, 40), (40, 2), (32, 800)):
        assert isinstance(RapidOcr()(np.full((height, width, 3), 255, np.uint8)), str)


def altered(value):
    """Some other setting of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 7
    return [altered(entry) for entry in value] if isinstance(value, list) else value


def test_reading_does_not_depend_on_rapidocrs_own_settings(monkeypatch, tmp_path):
    import rapidocr.main
    import yaml
    from omegaconf import OmegaConf

    before = ocr_engines._engine(("min", 96), True).cfg
    settings = yaml.safe_load(Path(rapidocr.main.DEFAULT_CFG_PATH).read_text())
    for part in ("Global", "Det", "Rec"):
        settings[part] = {key: altered(value) for key, value in settings[part].items()}
    settings["Det"] |= {"limit_type": "max", "score_mode": "slow", "model_type": "mobile"}
    settings["Rec"] |= {"ocr_version": "PP-OCRv4", "model_type": "mobile", "lang_type": "ka"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(rapidocr.main, "DEFAULT_CFG_PATH", tmp_path / "config.yaml")
    after = ocr_engines._engine(("min", 96), True).cfg
    for part in ("Global", "Det", "Rec"):
        found, wanted = (OmegaConf.to_container(cfg[part]) for cfg in (after, before))
        assert isinstance(found, dict)
        assert isinstance(wanted, dict)
        found.pop("return_single_char_box", None)  # of word boxes, which nobody asks for
        assert {key: wanted[key] for key in found} == found, part
    assert RapidOcr()(np.array(DRAWN["words apart"])) == READ["words apart"]
