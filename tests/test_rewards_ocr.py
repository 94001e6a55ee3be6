"""The OCR reward: its arithmetic against the published table, its reading on rendered words."""

import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import rewards
from rewards.backends import ocr_engines
from rewards.backends.ocr_engines import Reader
from rewards.models import ocr
from rewards.models.ocr import MODES, OcrReward, distance, nearest, quoted_text

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


OTHERS = [mode for mode in MODES if mode not in ("flow_grpo", "each")]


@cache
def recursive(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0])
    )


LETTERS = st.text("abB ", max_size=6)


@pytest.mark.parametrize(("read", "target", "flow", "strict", "max_norm"), TABLE)
def test_scores_of_the_published_table(read, target, flow, strict, max_norm):
    for mode, expected in (("flow_grpo", flow), ("strict", strict), ("max_norm", max_norm)):
        assert MODES[mode](read, [target]) == pytest.approx(expected, abs=1e-6), mode
    same = "".join(read.split()).lower() == "".join(target.split()).lower()
    assert MODES["exact"](read, [target]) == same
    assert max(1 + MODES["cer"](read, [target]), 0) == pytest.approx(strict)


@given(LETTERS, LETTERS)
def test_distances_equal_the_recursive_definition(a, b):
    assert distance(a, b) == recursive(a, b)
    parts = {b[i:j] for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    assert nearest(a, b) == min(recursive(a, part) for part in parts)


@pytest.mark.parametrize(
    ("read", "spans", "each", "f1"),
    [
        ("GO SLOW DOWN", ["GO", "SLOW DOWN"], 1, 1),
        ("SLOW DOWN GO", ["GO", "SLOW DOWN"], 1, 1),
        ("slowdown, go!", ["GO", "SLOW DOWN"], 1, 0),
        ("GO", ["GO", "SLEW"], 0.5 * (1 + 0), 2 / 3),
        ("GO SL0W", ["GO", "SLOW"], 0.5 * (1 + 3 / 4), 0.5),
        ("GO GO GO", ["GO"], 1, 0.5),
        ("GO", ["GO", "GO"], 1, 2 / 3),
        ("XX", ["GO"], 0, 0),
        ("", ["GO", "ON"], 0, 0),
    ],
)
def test_several_targets_may_each_be_looked_for_or_counted_by_words(read, spans, each, f1):
    assert MODES["each"](read, spans) == pytest.approx(each)
    assert MODES["word_f1"](read, spans) == pytest.approx(f1)


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3))
def test_every_mode_stays_in_its_range_and_is_best_on_the_target_itself(read, spans):
    prompt = " ".join(f'"{span}"' for span in spans)
    try:
        spans = OcrReward().targets(prompt)
    except ValueError:
        return
    # a lone accent joins the letter that ends the span before it, and is then not found by itself
    assume(ocr._normal("".join(spans)) == "".join(map(ocr._normal, spans)))
    for mode, score in MODES.items():
        low, high = OcrReward(mode).range
        assert high is not None
        assert low is None or low - 1e-9 <= score(read, spans)
        assert score(read, spans) <= high
        assert score(" ".join(spans), spans) == pytest.approx(high), mode


@given(st.text(max_size=8))
def test_the_normal_form_is_normal(text):
    assert ocr._normal(ocr._normal(text)) == ocr._normal(text)


@pytest.mark.parametrize(
    ("read", "target"),
    [
        ("ＳＴＯＰ", "STOP"),  # full width
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "CAFE\u0301"),  # composed and decomposed
        ("don't", "DON’T"),
        ("say “hi”", 'say "hi"'),
        ("\ufb01sh", "FISH"),  # a ligature
        ("two\u00a0words\n", "two words"),
    ],
)
def test_ways_to_write_the_same_text_do_not_count(read, target):
    for mode in OTHERS:
        assert MODES[mode](read, [target]) == (0 if mode == "cer" else 1), mode


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ('a sign that says "STOP"', ["STOP"]),
        ("a sign that says “STOP”", ["STOP"]),
        ("ein Schild: „HALT“", ["HALT"]),
        ("«ARRÊT» et »HALT«", ["ARRÊT", "HALT"]),
        ("a wall with ‟ODD‟", ["ODD"]),
        ('"GO" above "SLOW DOWN"', ["GO", "SLOW DOWN"]),
        ("a sign saying ‘DON’T WALK’", ["DON’T WALK"]),
        ("ein Schild: ‚HALT‘", ["HALT"]),
        ("a ‘vintage’ sign with “OPEN”", ["OPEN"]),  # double quotes win
        ("the dogs’ park of the ‘90s", []),
        ("it’s Ann’s", []),
        ("it‘s the dogs’ park", []),
        ("a cat", []),
        ('a 5" disk', []),
        ('an empty "" sign', []),
        ("don't 'stop'", []),
    ],
)
def test_targets_are_what_stands_in_double_quotes(prompt, spans):
    assert quoted_text(prompt) == spans


def test_prompts_that_quote_nothing_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(ocr_engines, "_engine", lambda *_: pytest.fail("an engine was started"))
    reward = rewards.load("0.5*ocr + jpeg")
    with pytest.raises(ValueError, match="'a cat', which quotes no text"):
        reward.check(['"A"', "a cat"])
    reward.check(['the word "A"'])
    with pytest.raises(ValueError, match="quotes no text"):
        reward(torch.rand(1, 3, 64, 64), ["a cat"])
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        OcrReward("strickt")
    with pytest.raises(ValueError, match="from 32 to 4000"):
        OcrReward(limit_side_len=8)


def test_pictures_are_read_once_even_within_a_batch(monkeypatch):
    calls = []

    def look(array: np.ndarray) -> str:
        calls.append(array.shape)
        return str(array[0, 0, 0])

    monkeypatch.setattr(ocr_engines, "CACHED", 2)
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 5, 6) / 255
    found = Reader(look)
    assert found.read(images[[3, 1, 3, 3, 0, 2, 1]]) == ["3", "1", "3", "3", "0", "2", "1"]
    assert len(calls) == 4
    assert found.read(images[[0, 2]]) == ["0", "2"]  # the last two of those are remembered
    assert len(calls) == 4
    assert found.read(images[[3]]) == ["3"]
    assert len(calls) == 5


def test_a_failing_engine_is_an_error_and_not_a_score_of_zero(monkeypatch):
    def engine(limit, detect):
        def fail(array):
            raise RuntimeError("the model is broken")

        return fail

    monkeypatch.setattr(ocr_engines, "_engine", engine)
    monkeypatch.setattr(ocr_engines, "_READERS", {})
    with pytest.raises(RuntimeError, match="broken"):
        OcrReward()(torch.rand(3, 3, 64, 64), ['"A"'] * 3)


def test_the_modes_join_spans_as_documented():
    spans = quoted_text('"SLOW" above "DOWN"')
    assert MODES["strict"]("slow down", spans) == 1
    assert MODES["exact"]("ＳＬＯＷ DOWN", spans) == 1  # full width, as recognisers may write
    assert MODES["flow_grpo"]("slow", spans) == 1
    assert MODES["strict"]("slow", spans) == 0.5
    assert MODES["each"]("down then slow", spans) == 1


def test_punctuation_may_be_left_out(monkeypatch):
    monkeypatch.setattr(Reader, "read", lambda self, images: ["STOP, now!"] * len(images))
    images, prompts = torch.rand(1, 3, 8, 8), ['the words "Stop now."']
    assert OcrReward("exact")(images, prompts).item() == 0
    assert OcrReward("strict")(images, prompts).item() == pytest.approx(1 - 2 / 8)
    for mode in MODES:
        reward = OcrReward(mode, punctuation=False)
        assert reward(images, prompts).item() == reward.range[1], mode
    assert OcrReward().targets('"?!"') == ["?!"]
    with pytest.raises(ValueError, match="no text but punctuation"):
        OcrReward(punctuation=False).check(['"?!"'])
    assert OcrReward(punctuation=False).targets('"?!" and "a-b"') == ["ab"]


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_package_names_the_pip_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"needs {missing}: pip install rapidocr onnxruntime"):
        rewards.load("ocr")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ocr(engine=paddle)", "'paddle' is unknown; take 'rapidocr' or 'tesseract'"),
        ("ocr(engine=tesseract, limit_side_len=96)", "arguments of rapidocr"),
        ("ocr(engine=tesseract, detect=false)", "arguments of rapidocr"),
        ("ocr(psm=7)", "an argument of tesseract"),
        ("ocr(engine=tesseract, psm=2)", "psm is 2"),
        ("ocr(engine=tesseract, psm=word)", "psm is 'word'"),
        ("ocr(engine=tesseract, upscale=0)", "upscale is 0"),
        ("ocr(punctuation=no)", "punctuation is 'no'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(spec)
