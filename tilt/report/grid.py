"""Image grids with a label beside or above each row, and a caption below each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tilt.report import lettering

__all__ = ["BEST", "GAP", "Cell", "Row", "cell_side", "fitted", "grid"]

GAP = 8  # px, between cells and between columns
_PER_LINE = 8  # cells per line of a block, or the number of its heads if larger
BEST, FRAME = ("#d62728", 3), ("#bbbbbb", 1)  # outlines: colour and width in pixels
_LABEL = 220  # px, maximum width of the labels beside the rows


@dataclass(frozen=True)
class Cell:
    """An image of any size, the caption below it, and its outline (colour, width) or None."""

    image: Image.Image
    caption: str = ""
    outline: tuple[str, int] | None = FRAME


@dataclass(frozen=True)
class Row:
    """A label and blocks of cells, one block for each entry of the grid's `heads`."""

    label: str
    blocks: Sequence[Sequence[Cell]]


def cell_side(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the side of a cell: the longest side of these images, clamped to [128, 256]."""
    return min(max(128, *map(max, sizes)), 256)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Return the image in RGB, resized so that its longer side has `side` pixels."""
    longest = max(image.size)
    width, height = (max(1, round(edge * side / longest)) for edge in image.size)
    # enlargement by a whole factor keeps sharp pixels
    how = Image.Resampling.LANCZOS if side % longest else Image.Resampling.NEAREST
    return image.convert("RGB").resize((width, height), how)


@dataclass(frozen=True)
class _Layout:
    """Sizes in pixels. lefts: x of each block; line: line height of labels; down: cell spacing."""

    side: int
    size: int
    columns: Sequence[int]  # number in each block
    lefts: Sequence[int]
    line: int
    down: int


def grid(
    heads: Sequence[Sequence[str]],
    rows: Sequence[Row],
    side: int,
    *,
    size: int = 12,
    labels_above: bool = False,
) -> Image.Image:
    """Draw the rows from top to bottom, and the blocks of each row side by side.

    heads: the headings of each block's first columns; side: the side of a cell in pixels; size: the
    font size; labels_above: whether a label is above its row rather than beside it.
    """
    line, across = size * 4 // 3, side + GAP
    captions = any(cell.caption for row in rows for block in row.blocks for cell in block)
    down = across + captions * size * 3 // 2
    columns = [
        max(len(head), *(min(len(row.blocks[b]), _PER_LINE) for row in rows))
        for b, head in enumerate(heads)
    ]
    room, most = (sum(columns) * across, 2) if labels_above else (_LABEL, max(2, side // line))
    labels = [lettering.wrapped(row.label, room, size, most) for row in rows]
    widest = max(lettering.wide(text, size) for label in labels for text in label)
    left = GAP if labels_above else math.ceil(widest) + 3 * GAP
    lefts = [left + sum(columns[:b]) * across + b * GAP for b in range(len(columns))]
    indents = [len(label) * line if labels_above else 0 for label in labels]
    heights = [
        indent + _lines(row, columns) * down for indent, row in zip(indents, rows, strict=True)
    ]
    page = Image.new("RGB", (lefts[-1] + columns[-1] * across, 2 * size + sum(heights)), "white")
    for x, head in zip(lefts, heads, strict=True):
        for i, text in enumerate(head):
            lettering.write(page, (x + i * across, 5), text, size, ":bold")
    layout = _Layout(side, size, columns, lefts, line, down)
    for i, row in enumerate(rows):
        _paint_row(page, layout, row, labels[i], 2 * size + sum(heights[:i]), indents[i])
    return page


def _paint_row(
    page: Image.Image, layout: _Layout, row: Row, label: list[str], top: int, indent: int
) -> None:
    for i, text in enumerate(label):
        lettering.write(page, (GAP, top + i * layout.line), text, layout.size)
    for left, columns, block in zip(layout.lefts, layout.columns, row.blocks, strict=True):
        for i, cell in enumerate(block):
            x = left + i % columns * (layout.side + GAP)
            y = top + indent + i // columns * layout.down
            _paint_cell(page, cell, (x, y), layout)


def _lines(row: Row, columns: Sequence[int]) -> int:
    return max(-(-len(block) // n) for block, n in zip(row.blocks, columns, strict=True))


def _paint_cell(page: Image.Image, cell: Cell, place: tuple[int, int], layout: _Layout) -> None:
    """Draw the cell's image in the middle, its outline around it and its caption below it."""
    side, (left, top) = layout.side, place
    image = fitted(cell.image, side)
    x, y = left + (side - image.width) // 2, top + (side - image.height) // 2
    if cell.outline:
        colour, width = cell.outline
        far = (x + image.width + width - 1, y + image.height + width - 1)
        ImageDraw.Draw(page).rectangle((x - width, y - width, *far), colour)
    page.paste(image, (x, y))
    below = (left + side / 2, top + side + 4)
    lettering.write(page, below, cell.caption, layout.size - 1, centred=True)
