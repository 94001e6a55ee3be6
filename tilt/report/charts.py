"""Small line charts as inline SVG, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilt.report.markup import escape, short

__all__ = ["Line", "chart", "ticks"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24
_STYLES = 4  # colours and dashes that page.css has


@dataclass(frozen=True)
class Line:
    """A curve, or with dots=True the points alone. NaN and infinite values leave a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0  # colour and dash, 0 to 3
    dots: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        return list(zip(self.xs, self.ys, strict=True))


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    size: tuple[int, int] = (330, 170),
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> str:
    """A figure with its title and, for several lines, a key.

    size: width and height in CSS pixels; marks: vertical lines, each at an x and with a label;
    note: a line of text below, which says what is drawn.
    """
    frame = _Frame.around(lines, [x for x, _ in marks], size)
    drawn = [_axes(frame, x_label), *(_drawn(frame, line) for line in lines)]
    drawn += [_mark(frame, x, label) for x, label in marks]
    key = ""
    if len(lines) > 1:
        names = (
            f'<span class="key s{line.style % _STYLES}{" dots" * line.dots}">{escape(line.name)}'
            "</span>"
            for line in lines
        )
        key = f'<p class="keys">{" ".join(names)}</p>'
    label = escape(". ".join([title, *(_said(line) for line in lines)]))
    svg = (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">'
        f"{''.join(drawn)}</svg>"
    )
    key += f'<p class="note">{escape(note)}</p>' if note else ""
    wide = f' style="max-width:{size[0]}px;flex-basis:{round(0.85 * size[0])}px"'
    return (
        f'<figure class="chart"{wide}><figcaption>{escape(title)}</figcaption>{svg}{key}</figure>'
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


def _axes(frame: _Frame, x_label: str) -> str:
    (left, bottom), (right, _) = (frame.at(x, frame.y[0]) for x in frame.x)
    found = [f'<path class="axis" d="M{left} {bottom}H{right}"/>']
    for y in ticks(*frame.y):
        _, down = frame.at(frame.x[0], y)
        found.append(
            f'<path class="grid" d="M{left} {down}H{right}"/>'
            f'<text x="{left - 5}" y="{down + 3.5}" text-anchor="end">{_tick(y, frame.y)}</text>'
        )
    for x in ticks(*frame.x):
        across, _ = frame.at(x, frame.y[0])
        if x == round(x) and across < right - 40:  # steps; the name of the axis stands at its end
            found.append(
                f'<text x="{across}" y="{bottom + 15}" text-anchor="middle">{short(x)}</text>'
            )
    end = f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{escape(x_label)}</text>'
    return "".join([*found, end])


def _tick(value: float, span: tuple[float, float]) -> str:
    """As many digits as tell the ticks apart."""
    value = 0.0 if abs(value) < 1e-9 * (span[1] - span[0]) else value
    return f"{value:.6g}"


def _drawn(frame: _Frame, line: Line) -> str:
    kept = [frame.at(x, y) if math.isfinite(y) else None for x, y in line.points]
    style = f"s{line.style % _STYLES}"
    if line.dots:
        circles = "".join(f'<circle cx="{p[0]}" cy="{p[1]}" r="2.5"/>' for p in kept if p)
        return f'<g class="points {style}">{circles}</g>'
    path, pen = "", "M"
    for place in kept:
        path += f"{pen}{place[0]} {place[1]}" if place else ""
        pen = "L" if place else "M"
    alone = sum(place is not None for place in kept) == 1
    path += "h0.01" if alone else ""  # a round cap makes a point of it
    return f'<path class="line {style}" d="{path}"/>' if path else ""


def _mark(frame: _Frame, x: float, label: str) -> str:
    across, top = frame.at(x, frame.y[1])
    _, bottom = frame.at(x, frame.y[0])
    right = across > frame.size[0] * 0.6
    side, anchor = (-4, "end") if right else (4, "start")
    return (
        f'<path class="mark" d="M{across} {top}V{bottom}"/>'
        f'<text class="mark" x="{across + side}" y="{top + 9}" text-anchor="{anchor}">'
        f"{escape(label)}</text>"
    )


def _said(line: Line) -> str:
    """For those who do not see it: where the curve begins and ends, and its extremes."""
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
