"""Evaluation: comparison of a model's variants by any scores, on the same prompts and noise.

Pure functions of arrays. Legend: p prompts, m images of each, d features; all in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import Interval, bootstrap, wins

__all__ = [
    "Measure",
    "compared",
    "markdown",
    "numbers",
    "of_tasks",
    "of_text",
    "spread",
]


def spread(features: Tensor) -> Tensor:
    """Return the mean distance 1 - cos of two different images: (p, m, d), m ≥ 2 -> (p,)."""
    x = F.normalize(features.double(), dim=-1)
    m = x.shape[-2]
    # |Σx|² is the sum over all pairs, of which m pair an image with itself
    return 1 - (x.sum(-2).square().sum(-1) - m) / (m * (m - 1))


@dataclass(frozen=True)
class Measure:
    """One quantity of every variant, the base first: (p, m), or (p, 1) for sets of images.

    rows: indices of the prompts; weights, strata: see `bootstrap`; less: smaller is better.
    """

    name: str
    values: dict[str, Tensor]
    rows: list[int]
    weights: Tensor | None = None
    strata: Sequence[str] = ()
    less: bool = False

    def only(self, keep: Sequence[bool], name: str = "") -> Measure:
        """Return the measure restricted to these prompts."""
        places = [i for i, kept in enumerate(keep) if kept]
        return replace(
            self,
            name=name or self.name,
            values={variant: values[places] for variant, values in self.values.items()},
            rows=[self.rows[i] for i in places],
            weights=None if self.weights is None else self.weights[places],
            strata=[self.strata[i] for i in places] if self.strata else (),
        )

    def finite(self) -> Measure:
        """Return the measure without prompts that have a non-finite value in any variant."""
        found = torch.stack([values.isfinite().all(-1) for values in self.values.values()])
        return self.only(found.all(0).tolist())


def compared(measure: Measure, seed: int) -> dict[str, dict[str, Interval]]:
    """Return each variant's mean, and its paired difference and win rate over the base.

    Returns {variant: {"mean": ..., "difference": ..., "wins": ...}}; the base has only its mean.
    """

    def over(values: Tensor, weights: Tensor | None = None) -> Interval:
        # the same draws each time, so that a figure does not depend on the other figures
        draws = torch.Generator().manual_seed(seed)
        return bootstrap(values, draws, weights=weights, strata=measure.strata)

    base, *_ = measure.values.values()
    found = {}
    for name, values in measure.values.items():
        found[name] = {"mean": over(values.mean(-1), measure.weights)}
        if values is not base:
            better = wins(base, values) if measure.less else wins(values, base)
            found[name]["difference"] = over((values - base).mean(-1), measure.weights)
            found[name]["wins"] = over(better.mean(-1))
    return found


def markdown(measures: Sequence[Measure], seed: int) -> str:
    """Return a Markdown table with a line for each variant of each measure."""
    lines = ["| | prompts | | mean | minus base | wins over base |", "|---|---|---|---|---|---|"]
    for measure in measures:
        name = measure.name + " (less is better)" * measure.less
        head = f"| {name} | {len(measure.rows)} |"
        found = compared(measure, seed) if measure.rows else {}
        for variant, row in found.items():
            more = row["difference"].text("+") if "difference" in row else ""
            won = row["wins"].text() if "wins" in row else ""
            lines.append(f"{head} {variant} | {row['mean'].text()} | {more} | {won} |")
            head = "| | |"
        if not found:
            lines.append(f"{head} | no prompt has a value | | |")
    return "\n".join(lines)


def numbers(measure: Measure, seed: int) -> dict[str, Any]:
    """Return the same as JSON values, with the mean of every prompt; null for unknown values."""
    found = compared(measure, seed) if measure.rows else {}
    variants = {
        variant: {
            key: {k: None if math.isnan(v) else v for k, v in asdict(value).items()}
            for key, value in row.items()
        }
        | {"values": measure.values[variant].mean(-1).tolist()}
        for variant, row in found.items()
    }
    about = {"name": measure.name, "less_is_better": measure.less, "prompts": measure.rows}
    return about | {"variants": variants}


def of_text(
    columns: Mapping[str, dict[str, Tensor]],
    readers: Mapping[str, str],
    rows: list[int],
    letters: Sequence[int],
) -> list[Measure]:
    """Return the exact rate and the character error rate by each reader.

    columns: {"exact" + reader, "cer" + reader: {variant: (p, m)}}, with "cer" negated as a reward;
    readers: the names to show; letters: the number of letters that each prompt requests.
    """
    weights, measures = torch.tensor(letters, dtype=torch.float64), []
    for reader, name in readers.items():
        errors = {variant: -scores for variant, scores in columns[f"cer{reader}"].items()}
        label = f"character error rate{name}"
        measures += [
            Measure(f"exact{name}", columns[f"exact{reader}"], rows),
            Measure(label, errors, rows, weights, less=True),
        ]
    return measures


def of_tasks(
    values: dict[str, Tensor], rows: list[int], tags: Sequence[str], order: Sequence[str]
) -> list[Measure]:
    """Return the rate of each task, in `order`, and their mean; tags: the task of each prompt."""
    every = Measure("", values, rows)
    tasks = [every.only([tag == task for tag in tags], task) for task in order if task in tags]
    return [*tasks, replace(every, name=f"mean of {len(tasks)} tasks", strata=tags)]
