"""Text in images, in any script that has a font on this machine.

matplotlib includes DejaVu Sans, which covers Latin, Greek, Cyrillic and more, but not Chinese,
Japanese, Korean or most emoji. These need fonts of the system, which may be missing. A character
without a font is written as its code, as in \\u5706.
"""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

__all__ = ["families", "legible", "wide", "wrapped", "write"]

_STYLED = re.compile("bold|black|heavy|italic|oblique|light|thin|mono|serif", re.IGNORECASE)
_BITMAPS = (109, 128, 136, 160)  # px, sizes of colour bitmap fonts, each of which has only one


@cache
def _own(style: str = "") -> Path:
    """Return the file of DejaVu Sans; Pillow's default font has neither accents nor Greek."""
    return Path(font_manager.findfont("DejaVu Sans" + style))


@cache
def _characters(font: Path) -> frozenset[int]:
    """Return the characters that a font covers; empty if it cannot be read."""
    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError, UnicodeDecodeError):
        return frozenset()


@cache
def _others() -> tuple[Path, ...]:
    """Return the system's fonts, regular ones first; matplotlib's cached list may be outdated."""
    fonts = map(Path, font_manager.findSystemFonts())
    return tuple(sorted(fonts, key=lambda font: (bool(_STYLED.search(font.stem)), str(font))))


@cache
def _source(character: str, style: str = "") -> Path | None:
    """Return a font with this character: DejaVu Sans, else the system's first; None if missing."""
    if ord(character) in _characters(_own(style)):
        return _own(style)
    found = (font for font in _others() if ord(character) in _characters(font))
    return next((font for font in found if _loaded(font, 12) is not None), None)


@cache
def _loaded(font: Path, size: int) -> ImageFont.FreeTypeFont | None:
    """Load an outline font at `size`, or a bitmap font at its own size; None if neither works."""
    for pixels in (size, *_BITMAPS):
        try:
            return ImageFont.truetype(str(font), pixels)
        except OSError:
            continue
    return None


def _is_mark(character: str) -> bool:
    """Return whether it shows nothing by itself, as a joiner of two emoji or a combining accent."""
    return unicodedata.category(character) in ("Cf", "Mn", "Me")


def legible(text: str, outlines: bool = False) -> str:
    """Return the text with a code in place of each character that cannot be drawn.

    outlines: whether only outline fonts may be used, since matplotlib cannot draw others.
    """
    drawn = []
    for character in text:
        font = _source(character)
        if font is not None and outlines and _is_bitmap(font):
            font = None
        if font is None and not character.isspace():
            character = "" if _is_mark(character) else _code(character)
        drawn.append(character)
    return "".join(drawn)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def families(text: str) -> list[str]:
    """Return the names of the fonts that matplotlib needs for a legible text, DejaVu Sans first."""
    found = {"DejaVu Sans": None}
    for font in (_source(character) for character in text):
        if font not in (None, _own()):
            font_manager.fontManager.addfont(font)
            found[FT2Font(str(font)).family_name] = None
    return list(found)


@cache
def _is_bitmap(font: Path) -> bool:
    loaded = _loaded(font, 12)
    return loaded is not None and loaded.size != 12


def wrapped(text: str, width: float, size: int, lines: int) -> list[str]:
    """Wrap the text, made legible, into at most `lines` lines of at most `width` pixels.

    Lines are not shortened below 8 characters, so these may be wider.
    """
    found, text = [], legible(text)
    for characters in range(max(8, round(2 * width / size)), 7, -1):  # letters differ in width
        found = textwrap.wrap(text, characters, max_lines=lines, placeholder=" …")
        if all(wide(line, size) <= width for line in found):
            break
    return found or ["(empty)"]


def _runs(text: str, style: str) -> Iterator[tuple[Path, str]]:
    """Split a legible text into pieces that one font draws."""
    for font, piece in groupby(text, lambda character: _source(character, style) or _own(style)):
        yield font, "".join(piece)


def wide(text: str, size: int, style: str = "") -> float:
    """Return the width in pixels of a legible line."""
    total = 0.0
    for path, piece in _runs(text, style):
        font = _loaded(path, size)
        assert font is not None
        total += font.getlength(piece) * size / font.size
    return total


def write(
    page: Image.Image,
    place: tuple[float, float],
    text: str,
    size: int,
    style: str = "",
    centred: bool = False,
) -> None:
    """Write a legible line in black; `place` is its upper left corner, or top centre if `centred`.

    style: "" or ":bold".
    """
    own = _loaded(_own(style), size)
    assert own is not None
    x, base = place[0], place[1] + own.getmetrics()[0]
    x -= wide(text, size, style) / 2 if centred else 0
    for path, piece in _runs(text, style):
        font = _loaded(path, size)
        assert font is not None
        if font.size == size:
            ImageDraw.Draw(page).text((x, base), piece, "black", font, anchor="ls")
        else:
            _paste(page, (x, base), piece, font, size)
        x += font.getlength(piece) * size / font.size


def _paste(
    page: Image.Image,
    place: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    size: int,
) -> None:
    """Write text in a bitmap font of another size, scaled to `size`."""
    ascent, descent = font.getmetrics()
    whole = Image.new("RGBA", (math.ceil(font.getlength(text)), ascent + descent))
    ImageDraw.Draw(whole).text((0, ascent), text, font=font, anchor="ls", embedded_color=True)
    share = size / font.size
    small = whole.resize((max(1, round(whole.width * share)), max(1, round(whole.height * share))))
    page.paste(small, (round(place[0]), round(place[1] - ascent * share)), small)
