"""Text in pictures: by our own font, by a font of the system, or by the character's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from saved_runs import NASTY

from tilt.report import lettering, pictures

CAT, DOG, ART = "猫", "狗", "🎨"


def font_of(file: Path, character: str) -> Path:
    """A font with one character, a filled square."""
    pen = TTGlyphPen(None)
    for i, corner in enumerate(((100, 0), (100, 800), (900, 800), (900, 0))):
        (pen.lineTo if i else pen.moveTo)(corner)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "own"])
    font.setupCharacterMap({ord(character): "own"})
    font.setupGlyf({".notdef": empty, "own": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "own": (1000, 100)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Only", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(file)
    return file


@pytest.fixture
def fonts(monkeypatch):
    """Sets the fonts that the system has; `lettering` remembers what it found."""

    def forget():
        for function in (lettering._others, lettering._source, lettering._characters):
            function.cache_clear()

    def system(*files: Path) -> None:
        forget()
        there = [str(file) for file in files]
        monkeypatch.setattr(lettering.font_manager, "findSystemFonts", lambda: there)

    yield system
    monkeypatch.undo()
    forget()


def drawn(text: str, size: int = 20) -> np.ndarray:
    page = Image.new("RGB", (300, 40), "white")
    lettering.write(page, (5, 5), text, size)
    return np.asarray(page)


def test_what_no_font_has_is_written_as_its_code(fonts):
    fonts()
    assert lettering.legible(f"a {CAT}é{ART}λ\n") == "a \\u732bé\\U0001f3a8λ\n"
    assert lettering.legible("half a pair \ud83d") == "half a pair \\ud83d"
    assert (
        lettering.legible("👩\u200d🚀\ufe0f", outlines=True).count("\\") == 2
    )  # joiners show nothing
    assert lettering.families("a") == ["DejaVu Sans"]


def test_a_font_of_the_system_draws_what_ours_lacks(fonts, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts(broken, tmp_path / "gone.ttf", font_of(tmp_path / "only.ttf", CAT))
    assert lettering.legible(f"{CAT}{DOG}") == f"{CAT}\\u72d7"
    black = (drawn(CAT) == 0).all(-1)
    assert black.sum() == pytest.approx((0.8 * 20) ** 2, rel=0.15)  # the square, and no more
    rows, columns = np.nonzero(black)
    whole = (drawn("H") < 128).all(-1)
    assert abs(rows.max() - np.nonzero(whole)[0].max()) <= 1  # on the same line
    assert columns.min() >= 5
    assert lettering.wide(f"a{CAT}", 20) == lettering.wide("a", 20) + 20
    assert lettering.families(CAT) == ["DejaVu Sans", "Only"]


def test_codes_are_wrapped_like_words_and_none_is_cut_off(fonts):
    fonts()
    lines = lettering.wrapped(CAT * 6, 100, 12, lines=9)
    assert "".join(lines) == "\\u732b" * 6
    assert all(lettering.wide(line, 12) <= 100 for line in lines)
    assert lettering.wrapped(" ", 100, 12, lines=2) == ["(empty)"]
    assert len(lettering.wrapped("a word " * 99, 100, 12, lines=3)) == 3


@pytest.mark.parametrize("prompt", [*NASTY, CAT * 60, f"{ART} " * 30])
def test_pictures_of_a_run_take_any_prompt(fonts, prompt):
    fonts()
    image = Image.new("RGB", (64, 64))
    pictures.comparison([pictures.GridRow(prompt=prompt, steered=[image], rewards=[1.0])])
    pictures.history([pictures.Trace(prompt=prompt, steps=[1], rewards=[[1.0]], ess=[1.0])])
