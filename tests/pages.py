"""The README and docs/ taken apart: their blocks, lines of code and commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(?: \{\.)?(\w*)\}?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n|\A)((?:^    .*\n?)+)", re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced block."""
    for found in FENCE.finditer(text):
        yield found[2], textwrap.dedent(found[3])


def prose(text: str) -> str:
    return FENCE.sub("", text)


def code(text: str) -> Iterator[str]:
    """Lines of code: of fenced and indented blocks, and what stands between backticks."""
    whole = [body for language, body in blocks(text) if language in ("bash", "")]
    whole += [textwrap.dedent(found[1]) for found in INDENTED.finditer(prose(text))]
    for body in whole:
        yield from re.sub(r"\\\n *", "", body).splitlines()
    for span in SPAN.findall(prose(text)):
        yield " ".join(span.split())


def words(line: str) -> list[str]:
    """The first command of a line; none where it is no command, or leaves something out."""
    try:
        found = shlex.split(line, comments=True)
    except ValueError:
        return []
    ends = [i for i, word in enumerate(found) if word in ("|", ">", "&&", ";")]
    found = found[: ends[0]] if ends else found
    return [] if any(word in ("...", "…") for word in found) else found
