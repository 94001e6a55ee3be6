"""Layout of small line charts, which the template chart.svg draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilt.report.markup import short

__all__ = ["Chart", "Line", "chart", "ticks"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24


@dataclass(frozen=True)
class Line:
    """A curve, or only its points with dots=True. NaN and infinite values leave a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0  # colour and dash in page.css, 0 to 3
    dots: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        return list(zip(self.xs, self.ys, strict=True))


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return at most `most` + 1 evenly spaced round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Drawn:
    """A line in pixels: `places` of its finite points, and the SVG `path` through them."""

    name: str
    style: int
    dots: bool
    places: list[tuple[float, float]]
    path: str


@dataclass(frozen=True)
class Chart:
    """A chart for the template chart.svg, in CSS pixels. said: its description in words."""

    title: str
    size: tuple[int, int]
    said: str
    left: float
    right: float
    top: float
    bottom: float
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    lines: list[Drawn]
    marks: list[tuple[float, str]]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int] = (330, 170),
    marks: Sequence[tuple[float, str]] = (),
) -> Chart:
    """Lay out a chart of lines over the steps.

    size: width and height in CSS pixels; marks: vertical lines, as pairs of an x and a label.
    """
    frame = _Frame.around(lines, [x for x, _ in marks], size)
    (left, bottom), (right, top) = (
        frame.at(*corner) for corner in zip(frame.x, frame.y, strict=True)
    )
    across = [(frame.at(x, frame.y[0])[0], x) for x in ticks(*frame.x)]
    return Chart(
        title=title,
        size=size,
        said=". ".join([title, *map(_said, lines)]),
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        # whole steps only; the right end is left free for the name of the axis
        ticks_x=[(place, short(x)) for place, x in across if x == round(x) and place < right - 40],
        ticks_y=[(frame.at(frame.x[0], y)[1], _tick(y, frame.y)) for y in ticks(*frame.y)],
        lines=[_drawn(frame, line) for line in lines],
        marks=[(frame.at(x, frame.y[1])[0], label) for x, label in marks],
    )


@dataclass(frozen=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[int, int]

    @staticmethod
    def around(lines: Sequence[Line], marked: Sequence[float], size: tuple[int, int]) -> _Frame:
        points = [p for line in lines for p in line.points if math.isfinite(p[1])]
        x = _span([*(p[0] for p in points), *marked], 0)
        return _Frame(x, _span([p[1] for p in points], 0.06), size)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1), (width, height) = self.x, self.y, self.size
        across = _LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)
        down = _TOP + (y1 - y) / (y1 - y0) * (height - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        margin, room = 1, abs(low) / 10 or 1.0
    else:
        room = high - low
    return low - margin * room, high + margin * room


def _tick(value: float, span: tuple[float, float]) -> str:
    """Format a tick with up to six digits; rounding errors around 0 become 0."""
    value = 0.0 if abs(value) < 1e-9 * (span[1] - span[0]) else value
    return f"{value:.6g}"


def _drawn(frame: _Frame, line: Line) -> Drawn:
    places = [frame.at(x, y) if math.isfinite(y) else None for x, y in line.points]
    known, path, pen = [place for place in places if place], "", "M"
    for place in places:
        path += f"{pen}{place[0]} {place[1]}" if place else ""
        pen = "L" if place else "M"
    path += "h0.01" * (len(known) == 1)  # drawn as a point, because the line caps are round
    return Drawn(line.name, line.style, line.dots, known, path)


def _said(line: Line) -> str:
    """Describe the curve for screen readers: its first and last values, and its extremes."""
    known = [p for p in line.points if math.isfinite(p[1])]
    if not known:
        return f"{line.name}: no values"
    ys = [y for _, y in known]
    if line.dots:
        return f"{line.name}: from {short(min(ys))} to {short(max(ys))}"
    return (
        f"{line.name}: {short(ys[0])} at {short(known[0][0])}, {short(ys[-1])} at "
        f"{short(known[-1][0])}, lowest {short(min(ys))}, highest {short(max(ys))}"
    )
