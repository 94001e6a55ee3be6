"""The jinja2 templates of the reports, and their filters.

Everything that a folder provides (prompts, names of rewards, files, settings) is untrusted text, so
HTML and SVG templates escape every value except the output of other templates.
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
    """Return the templates of a folder; .html and .svg escape their values, others do not."""
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
    """Render one of the reports' templates with these values."""
    templates = environment(Path(__file__).parent / "templates")
    return templates.get_template(template).render(values)


def size(page: str) -> int:
    """Return the number of bytes that `keep` writes."""
    return len(page.encode("utf-8", "xmlcharrefreplace"))


def keep(path: Path, page: str) -> Path:
    """Write a page atomically; a lone surrogate, which a prompt may contain, is escaped."""
    with atomic(path) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def clipped(prompt: str, most: int = 60) -> str:
    """Shorten a prompt for a title: on one line, cut between words if possible."""
    line = " ".join(prompt.split())
    if len(line) <= most:
        return line or "(empty)"
    end = line.rfind(" ", most // 2, most)
    return f"{line[: end if end > 0 else most - 1]}…"


def short(value: float) -> str:
    """Format a number with three digits, or its whole part if that has more."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def link(path: str) -> str:
    """Return the relative URL of a file, with "/" between folders; never a scheme such as data:."""
    return "./" + quote(path)
