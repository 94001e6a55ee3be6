"""Images of a run: the comparison grid, and a plot of rewards and ESS over the scored steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from steering.weights import ess
from tilt.report import lettering, markup
from tilt.report.grid import BEST, Cell, Row, cell_side, grid
from tilt.report.media import opened
from tilt.report.saved import read

__all__ = ["GridRow", "Trace", "comparison", "history", "rows", "traces"]

_DPI = 100
_MOST_LINES = 12  # prompts in the legend of the plot


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One prompt of the comparison grid: k steered images, and k or no unsteered ones.

    `plain[0]` is the plain sample; the one of `plain` with the highest reward is the best of k.
    """

    prompt: str
    steered: Sequence[Image.Image]
    rewards: Sequence[float]
    plain: Sequence[Image.Image] = ()
    plain_rewards: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The history of one prompt's particles: one entry per scored step, the final images last.

    rewards: one sequence per step (a funnel makes them shorter); ess in [1, k].
    """

    prompt: str
    steps: Sequence[int]
    rewards: Sequence[Sequence[float]]
    ess: Sequence[float]


def rows(folder: Path, plain: Path | None = None) -> list[GridRow]:
    """Return the row of each prompt that `Steered.save` wrote to `folder`, with its images.

    plain: the folder of the same prompts and seeds with min_ess=0, for the baselines; ignored if it
    does not exist.
    """
    steered = _results(folder)
    compared = _results(plain) if plain is not None and plain.is_dir() else None
    found = []
    for i, prompt in enumerate(steered["prompts"]):
        baseline: dict[str, Any] = {}
        if plain is not None and compared is not None:
            images = _images(plain, compared["files"][i])
            baseline = {"plain": images, "plain_rewards": compared["rewards"][i]}
        images, rewards = _images(folder, steered["files"][i]), steered["rewards"][i]
        found.append(GridRow(prompt=prompt, steered=images, rewards=rewards, **baseline))
    return found


def traces(folder: Path) -> list[Trace]:
    """Return the trace of each prompt that `Steered.save` wrote to `folder`; no image is read."""
    manifest, lineage = read(folder)
    results, scores = manifest["results"], lineage["scores"]
    found = []
    for i, prompt in enumerate(results["prompts"]):
        final = ess(torch.tensor(results["log_weights"][i], dtype=torch.float64)).item()
        found.append(
            Trace(
                prompt=prompt,
                steps=[*(score["step"] for score in scores), lineage["num_steps"]],
                rewards=[*(score["rewards"][i] for score in scores), results["rewards"][i]],
                ess=[*(score["ess"][i] for score in scores), final],
            )
        )
    return found


def _results(folder: Path) -> dict[str, Any]:
    return read(folder)[0]["results"]


def _images(folder: Path, names: Sequence[str]) -> list[Image.Image]:
    return [opened(folder / name) for name in names]


def _best(rewards: Sequence[float]) -> int:
    return max(range(len(rewards)), key=lambda i: rewards[i])


def comparison(rows: Sequence[GridRow], *, side: int | None = None) -> Image.Image:
    """Draw one row per prompt: plain, best of k, and all steered images, with rewards below them.

    The best steered image is outlined. `side` is the side of a cell in pixels; by default the
    longest side of the images, clamped to [128, 256]. Raises ValueError without rows or images.
    """
    if not rows or any(not row.steered for row in rows):
        raise ValueError("a comparison needs at least one prompt, each with at least one image")
    side = side or cell_side([row.steered[0].size for row in rows])
    if not any(row.plain for row in rows):
        return grid([["steered"]], [Row(row.prompt, [_steered(row)]) for row in rows], side)
    painted = [Row(row.prompt, [_baselines(row), _steered(row)]) for row in rows]
    return grid([["plain", "best of k"], ["steered"]], painted, side)


def _baselines(row: GridRow) -> list[Cell]:
    chosen = (0, _best(row.plain_rewards)) if row.plain else ()
    return [Cell(row.plain[i], f"{row.plain_rewards[i]:.3g}", None) for i in chosen]


def _steered(row: GridRow) -> list[Cell]:
    pairs, best = zip(row.steered, row.rewards, strict=True), _best(row.rewards)
    return [
        Cell(image, f"{reward:.3g}", BEST if i == best else None)
        for i, (image, reward) in enumerate(pairs)
    ]


def history(traces: Sequence[Trace]) -> Image.Image:
    """Plot rewards (particles as dots, their mean as a line) and ESS / k over the scored steps.

    The last point of each curve is the final image. Raises ValueError without traces.
    """
    if not traces:
        raise ValueError("a history needs at least one prompt")
    figure = Figure(figsize=(8, 6), dpi=_DPI, facecolor="white", layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for i, trace in enumerate(traces):
        colour = f"C{i % 10}"
        for step, rewards in zip(trace.steps, trace.rewards, strict=True):
            top.plot([step] * len(rewards), rewards, ".", color=colour, alpha=0.25, markersize=5)
        means = [sum(rewards) / len(rewards) for rewards in trace.rewards]
        (line,) = top.plot(trace.steps, means, "-", color=colour)
        share = [ess / len(rewards) for ess, rewards in zip(trace.ess, trace.rewards, strict=True)]
        bottom.plot(trace.steps, share, ".-", color=colour)
        if i < _MOST_LINES:
            legible = lettering.legible(trace.prompt, outlines=True)
            line.set_label(markup.clipped(legible, 40))
    top.set_ylabel("reward (dots: particles, line: mean)")
    bottom.set_ylabel("ESS / k")
    bottom.set_ylim(0, 1.05)
    bottom.set_xlabel("step (the last point: the final image)")
    legend = top.legend(fontsize=7, loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_fontfamily(lettering.families(text.get_text()))
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")
