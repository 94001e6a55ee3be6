"""The genealogy of a population: its particles at each score, their ancestry and their layout.

Legend: columns are the scored steps, with the final images as the last one; column c has k_c
particles; a funnel reduces k_c from column to column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from steering.weights import ess, log_mean_exp, normalize
from tilt.report.charts import Chart, Line, chart
from tilt.report.thumbnails import Sprite

__all__ = ["ALIVE", "BEST", "DEAD", "Genealogy", "Tree", "charts", "fates", "read", "tree"]

DEAD, ALIVE, BEST = "dead", "alive", "best"
_GAP, _CAPTION, _HEAD, _FOOT = 56, 22, 40, 16  # px: between columns and rows, above, below


@dataclass(frozen=True)
class Genealogy:
    """One prompt's run. Columns as above; parents[c][j] is the index in column c of the parent of
    particle j of column c + 1."""

    steps: list[int]  # the scored steps, then the total number of steps
    rewards: list[list[float]]
    weights: list[list[float]]  # before resampling; each column sums to 1
    ess: list[float]
    log_z: list[float]  # the estimate up to each column
    parents: list[list[int]]
    resampled: list[bool]  # after each score; resampling adds the weights to log_z and resets them

    @property
    def best(self) -> int:
        """The index of the final particle with the highest reward; the first in a tie."""
        final = self.rewards[-1]
        return max(range(len(final)), key=final.__getitem__)


@dataclass(frozen=True)
class Tree:
    """The layout of a `Genealogy` for the template genealogy.html, in CSS pixels.

    tile: the size of an image; step: the distance between images, across and down; tiles: columns
    and rows of the sprite; paths: {fate: SVG path of the lines}.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    step: tuple[int, int]
    tiles: tuple[int, int]
    fates: list[list[str]]
    paths: dict[str, str]


def read(manifest: dict[str, Any], lineage: dict[str, Any], index: int) -> Genealogy:
    """Return the genealogy of one prompt from the files that `Steered.save` wrote.

    Raises ValueError if the two files are of different runs.
    """
    results, scores = manifest["results"], lineage["scores"]
    log_weights = [*(s["log_weights"][index] for s in scores), results["log_weights"][index]]
    rewards = [*(s["rewards"][index] for s in scores), results["rewards"][index]]
    parents = [s["ancestors"][index] for s in scores]
    for column, line in enumerate(parents):
        known = range(len(rewards[column]))
        if len(line) != len(rewards[column + 1]) or not all(parent in known for parent in line):
            raise ValueError(
                f"the ancestors of prompt {index} at step {scores[column]['step']} do not fit the "
                "particles there: lineage.json and manifest.json are of different runs"
            )
    tensors = [torch.tensor(each, dtype=torch.float64) for each in log_weights]
    sizes = [*(s["ess"][index] for s in scores), ess(tensors[-1]).item()]
    folded = [s["resampled"][index] for s in scores]
    log_z, so_far = [], 0.0
    for values, fold in zip(tensors, [*folded, False], strict=True):
        log_z.append(so_far + log_mean_exp(values).item())
        so_far = log_z[-1] if fold else so_far
    return Genealogy(
        steps=[*(s["step"] for s in scores), lineage["num_steps"]],
        rewards=rewards,
        weights=[normalize(values).tolist() for values in tensors],
        ess=sizes,
        log_z=[*log_z[:-1], results["log_z"][index]],
        parents=parents,
        resampled=folded,
    )


def fates(genealogy: Genealogy) -> list[list[str]]:
    """Return the fate of every particle: BEST if the best final image descends from it, ALIVE if
    another final image does, DEAD if none does."""
    last = [ALIVE] * len(genealogy.rewards[-1])
    last[genealogy.best] = BEST
    found = [last]
    for column in reversed(range(len(genealogy.parents))):
        own = [DEAD] * len(genealogy.rewards[column])
        for parent, fate in zip(genealogy.parents[column], found[0], strict=True):
            if fate == BEST or (fate == ALIVE and own[parent] == DEAD):
                own[parent] = fate
        found.insert(0, own)
    return found


def tree(genealogy: Genealogy, sprite: Sprite) -> Tree:
    """Lay out a genealogy. sprite: tiles of all columns, or only of the last one."""
    columns, rows = len(genealogy.rewards), max(map(len, genealogy.rewards))
    scale = (64 if rows <= 8 else 48) / max(sprite.tile)
    width, height = (max(8, round(side * scale)) for side in sprite.tile)
    across, down = width + _GAP, height + _CAPTION
    lives = fates(genealogy)
    return Tree(
        size=(columns * across - _GAP, _HEAD + rows * down + _FOOT),
        tile=(width, height),
        step=(across, down),
        tiles=(sprite.columns, sprite.rows),
        fates=lives,
        paths=_edges(genealogy.parents, lives, (width, height)),
    )


def _edges(
    parents: list[list[int]], lives: list[list[str]], tile: tuple[int, int]
) -> dict[str, str]:
    """Return one SVG path for each fate; BEST is last, so that it is drawn on top."""
    paths = {DEAD: "", ALIVE: "", BEST: ""}
    across, down = tile[0] + _GAP, tile[1] + _CAPTION
    middle = _HEAD + tile[1] // 2
    for column, line in enumerate(parents):
        x, end = column * across + tile[0], (column + 1) * across
        for child, parent in enumerate(line):
            y0, y1 = (middle + row * down for row in (parent, child))
            bend = (x + end) // 2
            paths[lives[column + 1][child]] += f"M{x} {y0}C{bend} {y0} {bend} {y1} {end} {y1}"
    return paths


def charts(genealogy: Genealogy, threshold: float) -> dict[str, Chart]:
    """Return charts of rewards, ESS and log Ẑ over the scored steps and the final images.

    threshold: `min_ess`; a step resamples if the ESS is below this fraction of the particles.
    """
    g, steps = genealogy, genealogy.steps
    spots = [(step, reward) for step, row in zip(steps, g.rewards, strict=True) for reward in row]
    means = [sum(row) / len(row) for row in g.rewards]
    rewards = [
        Line("particle", [x for x, _ in spots], [y for _, y in spots], 3, dots=True),
        Line("mean", steps, means, 1),
        Line("best", steps, [max(row) for row in g.rewards], 0),
    ]
    sizes = [
        Line("ESS", steps, g.ess, 0),
        Line("resampled below", steps, [threshold * len(row) for row in g.rewards], 3),
    ]
    return {
        "rewards": chart("Rewards", rewards),
        "ess": chart("ESS", sizes),
        "log_z": chart("log Ẑ so far", [Line("log Ẑ", steps, g.log_z, 0)]),
    }
