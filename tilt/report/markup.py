"""The jinja templates of the reports, and what they call.

Whatever comes from a folder (prompts, names of rewards, files, settings) is text from elsewhere,
so templates of HTML and SVG escape every value but what another template rendered.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from finetune.files import atomic

__all__ = ["clipped", "environment", "keep", "link", "render", "short", "size"]


@cache
def environment(folder: Path) -> Environment:
    """The templates of a folder: .html and .svg escape what they are given, others do not."""
    templates = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "svg"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"clipped": clipped, "link": link, "short": short}
    return templates


def render(template: str, **values: Any) -> str:
    """One of the reports' templates with these values."""
    templates = environment(Path(__file__).parent / "templates")
    return templates.get_template(template).render(values)


def size(page: str) -> int:
    """The bytes that `keep` writes."""
    return len(page.encode("utf-8", "xmlcharrefreplace"))


def keep(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; half a surrogate pair, which a prompt may hold, too."""
    with atomic(path) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def clipped(prompt: str, most: int = 60) -> str:
    """A prompt as a part of a title: on one line, its first words, or letters of a long one."""
    line = " ".join(prompt.split())
    if len(line) <= most:
        return line or "(empty)"
    end = line.rfind(" ", most // 2, most)
    return f"{line[: end if end > 0 else most - 1]}…"


def short(value: float) -> str:
    """Three digits, or the whole part where it has more."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def link(path: str) -> str:
    """A relative address of a file, its folders divided by "/"; never a scheme such as data:."""
    return "./" + quote(path)
