"""HTML of the reports: the page around them, and the pieces that several of them use.

Whatever comes from a folder (prompts, names of rewards, files, settings) is text from elsewhere:
it passes `escape`. A page needs no network and runs no script; its policy forbids both.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.files import atomic

__all__ = [
    "clipped",
    "document",
    "escape",
    "keep",
    "link",
    "number",
    "pairs",
    "short",
    "table",
    "text",
]

_POLICY = (
    "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A whole page. title: text; body: HTML."""
    return _PAGE.format(policy=_POLICY, title=escape(title), style=_style(), body=body)


@cache
def _style() -> str:
    return resources.files("tilt.report").joinpath("page.css").read_text(encoding="utf-8")


def keep(path: Path, page: str) -> Path:
    """Write a page, whole or not at all; half a surrogate pair, which a prompt may hold, too."""
    with atomic(path) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def escape(value: Any) -> str:
    """Fit to stand between tags and in a quoted attribute."""
    return html.escape(str(value), quote=True)


def text(value: str) -> str:
    """Text of any script and direction, which does not turn its surroundings round."""
    return f'<bdi dir="auto">{escape(value) if value.strip() else "(empty)"}</bdi>'


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


def number(value: float) -> str:
    """`short` to read; the number itself in the attribute `value`."""
    return f'<data value="{float(value)!r}">{short(value)}</data>'


def link(path: str) -> str:
    """A relative address of a file, its folders divided by "/"; never a scheme such as data:."""
    return escape("./" + quote(path))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """A table of HTML cells, in a box of its own that scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "\n".join(_row(row) for row in rows)
    last = f"<tfoot>{_row(foot)}</tfoot>" if foot else ""
    parts = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>{last}"
    return f'<div class="wide" tabindex="0">\n<table>\n{parts}\n</table>\n</div>'


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    rest = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr><th scope="row">{first}</th>{rest}</tr>'


def pairs(entries: Mapping[str, Any]) -> str:
    """Names and values, nested ones indented; what is empty is left out."""
    items = [
        f"<div><dt>{escape(name)}</dt><dd>{_value(value)}</dd></div>"
        for name, value in entries.items()
        if value not in (None, "", [], {})
    ]
    return f"<dl>{''.join(items)}</dl>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return pairs(value)
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return escape(value)
