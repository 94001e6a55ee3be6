"""Summaries of a table of scores, as text and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .score_table import TEXTS, writable

__all__ = ["FIGURES", "draw", "rank_correlation", "summary"]

FIGURES = (".csv.histogram.png", ".parquet.histogram.png")  # endings of the figures' file names


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = [name for name in rows[0] if name not in TEXTS]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in names}
    if len(names) == 2 and np.array_equal(*columns.values(), equal_nan=True):
        columns.pop("reward")  # equal to its only component
    return columns


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line per score: mean, standard error, extremes, median and missing values."""
    columns = _columns(rows)
    width = max(map(len, columns))
    lines = [f"{'':{width}}      mean       se      min   median      max  missing"]
    for name, values in columns.items():
        there = values[np.isfinite(values)]
        if len(there):
            se = there.std(ddof=1) / math.sqrt(len(there)) if len(there) > 1 else math.nan
            numbers = [there.mean(), se, there.min(), np.median(there), there.max()]
        else:
            numbers = [math.nan] * 5
        cells = " ".join(f"{number:8.4g}" for number in numbers)
        lines.append(f"{name:{width}}  {cells} {len(values) - len(there):8d}")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Save a figure with a histogram of each score and their Spearman rank correlations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(rows)
    names, many = list(columns), len(columns) > 1
    wide = len(names) + many
    figure = Figure(figsize=(3.2 * wide, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, wide, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        values = columns[name][np.isfinite(columns[name])]
        panel.hist(values, bins=min(30, max(5, int(math.sqrt(len(values))))), color="#4477aa")
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
    if many:
        _draw_correlations(figure, panels[-1], columns)
    with writable(path):
        figure.savefig(path, dpi=120)


def _draw_correlations(figure: Any, panel: Any, columns: dict[str, np.ndarray]) -> None:
    names = list(columns)
    matrix = np.array([[rank_correlation(columns[a], columns[b]) for b in names] for a in names])
    shown = panel.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    for i in range(len(names)):
        for j in range(len(names)):
            dark = abs(matrix[i, j]) > 0.6
            colour = "white" if dark else "black"
            panel.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=colour)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_title("rank correlation", fontsize=9)
    figure.colorbar(shown, ax=panel, shrink=0.8)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rho over the pairs of finite values; NaN if either is constant."""
    there = np.isfinite(a) & np.isfinite(b)
    if there.sum() < 2:
        return math.nan
    x, y = _ranks(a[there]), _ranks(b[there])
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
