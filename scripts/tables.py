"""Markdown tables, whole or line by line."""

import statistics
from collections.abc import Iterable, Sequence

__all__ = ["head", "line", "span", "table"]


def line(*cells: object) -> str:
    """One row."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> str:
    """The row of headings and the line under it."""
    return f"{line(*cells)}\n{'|---' * len(cells)}|"


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A whole table."""
    return "\n".join([head(*heads), *(line(*row) for row in rows)])


def span(values: Sequence[float], digits: int = 3) -> str:
    """As in "1.021 [1.010, 1.034]": the median, the lowest and the highest value."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
