"""The genealogy of a population as a picture: who was seen at each score, and who lived on.

Legend: columns are the scored steps, with the final images as the last one; column c has k_c
particles, fewer later on in a funnel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steering.weights import ess, log_mean_exp, normalize
from tilt.report.charts import Line, chart
from tilt.report.explained import CHARTS
from tilt.report.markup import escape, short
from tilt.report.thumbnails import Sprite

__all__ = ["ALIVE", "BEST", "DEAD", "Genealogy", "charts", "fates", "picture", "read"]

DEAD, ALIVE, BEST = "dead", "alive", "best"
_GAP, _CAPTION, _HEAD, _FOOT = 56, 22, 40, 16  # px: between columns and rows, above, below


@dataclass(frozen=True)
class Genealogy:
    """One prompt's run. Columns as above; parents[c][j] is the place in column c of the parent of
    particle j of column c + 1."""

    steps: list[int]  # the scored ones, then the number of all
    rewards: list[list[float]]
    weights: list[list[float]]  # each column sums to 1: before resampling
    ess: list[float]
    log_z: list[float]  # of the estimate so far
    parents: list[list[int]]
    resampled: list[bool]  # after each score: the weights were folded into log_z and set to 0

    @property
    def best(self) -> int:
        """The final particle of highest reward, the first of several."""
        final = self.rewards[-1]
        return max(range(len(final)), key=final.__getitem__)


def read(manifest: dict[str, Any], lineage: dict[str, Any], index: int) -> Genealogy:
    """That of one prompt of a folder that `Steered.save` wrote.

    Raises ValueError where the two files do not belong together.
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
    """Of every particle of every column: BEST has the best final image as descendant, ALIVE
    another one, DEAD none."""
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


def picture(genealogy: Genealogy, sprite: Sprite, address: str, label: str) -> str:
    """Columns from left to right, a line from each parent to each child.

    sprite: tiles of all columns, or of the last alone; address: where it is; label: what the
    picture is called to those who do not see it.
    """
    columns, rows = len(genealogy.rewards), max(map(len, genealogy.rewards))
    scale = (64 if rows <= 8 else 48) / max(sprite.tile)
    width, height = (max(8, round(side * scale)) for side in sprite.tile)
    across, down = width + _GAP, height + _CAPTION
    total = (columns * across - _GAP, _HEAD + rows * down + _FOOT)
    lives = fates(genealogy)
    style = (
        f"width:{total[0]}px;height:{total[1]}px;--w:{width}px;--h:{height}px;--x:{across}px;"
        f"--y:{down}px;--n:{sprite.columns};--m:{sprite.rows};background-image:url({address})"
    )
    parts = [_edges(genealogy, lives, (width, height), total)]
    for column in range(columns):
        parts.append(_head(genealogy, column))
        shift = sprite.columns - columns  # not 0 where the last column alone has pictures
        parts += [
            _node(genealogy, (column, row), fate, column + shift)
            for row, fate in enumerate(lives[column])
        ]
    inner = "\n".join(parts)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<div class="tree" style="{style}">\n{inner}\n</div></div>'
    )


def _edges(
    genealogy: Genealogy,
    lives: list[list[str]],
    tile: tuple[int, int],
    total: tuple[int, int],
) -> str:
    """One path for each fate, the best drawn last."""
    paths = {DEAD: "", ALIVE: "", BEST: ""}
    across, down = tile[0] + _GAP, tile[1] + _CAPTION
    middle = _HEAD + tile[1] // 2
    for column, line in enumerate(genealogy.parents):
        x, end = column * across + tile[0], (column + 1) * across
        for child, parent in enumerate(line):
            y0, y1 = (middle + row * down for row in (parent, child))
            bend = (x + end) // 2
            paths[lives[column + 1][child]] += f"M{x} {y0}C{bend} {y0} {bend} {y1} {end} {y1}"
    drawn = "".join(f'<path class="{fate}" d="{path}"/>' for fate, path in paths.items() if path)
    return f'<svg width="{total[0]}" height="{total[1]}" aria-hidden="true">{drawn}</svg>'


def _head(genealogy: Genealogy, column: int) -> str:
    step, k = genealogy.steps[column], len(genealogy.rewards[column])
    last = column == len(genealogy.parents)
    name = "final" if last else f"step {step}"
    kept = "" if last or genealogy.resampled[column] else ", kept"
    return (
        f'<span class="head" style="--c:{column}">{name}<br>'
        f"<small>ESS {genealogy.ess[column]:.1f}/{k}{kept}</small></span>"
    )


def _node(genealogy: Genealogy, place: tuple[int, int], fate: str, tile: int) -> str:
    column, row = place
    reward, weight = genealogy.rewards[column][row], genealogy.weights[column][row]
    last = column == len(genealogy.parents)
    if last:
        more = "returned"
    else:
        children = genealogy.parents[column].count(row)
        more = {0: "no children", 1: "1 child"}.get(children, f"{children} children")
    where = "final image" if last else f"step {genealogy.steps[column]}"
    note = [f"particle {row}, {where}", f"reward {short(reward)}", f"weight {short(weight)}", more]
    own = f";--s:{tile}" if tile != column else ""
    shown = "<i></i>" if tile >= 0 else ""
    return (
        f'<span class="n {fate}{"" if shown else " bare"}{" last" * last}" tabindex="0" role="img" '
        f'aria-label="{"&#10;".join(note)}" style="--c:{column};--r:{row};--p:{100 * weight:.3g}'
        f'{own}">{shown}<b>{short(reward)}</b></span>'
    )


def charts(genealogy: Genealogy, threshold: float) -> str:
    """Rewards, ESS and log Ẑ over the scored steps, the final images last.

    threshold: the share of the particles below whose ESS a step resamples, `min_ess`.
    """
    g, steps = genealogy, genealogy.steps
    spots = [(step, reward) for step, row in zip(steps, g.rewards, strict=True) for reward in row]
    means = [sum(row) / len(row) for row in g.rewards]
    drawn: dict[str, Sequence[Line]] = {
        "Rewards": [
            Line("a particle", [x for x, _ in spots], [y for _, y in spots], 3, dots=True),
            Line("mean", steps, means, 1),
            Line("best", steps, [max(row) for row in g.rewards], 0),
        ],
        "ESS": [
            Line("ESS", steps, g.ess, 0),
            Line("resampled below", steps, [threshold * len(row) for row in g.rewards], 3),
        ],
        "log Ẑ so far": [Line("log Ẑ", steps, g.log_z, 0)],
    }
    k = len(g.rewards[0])
    return "".join(
        chart(title, lines, note=CHARTS[title].format(k=k)) for title, lines in drawn.items()
    )
