"""Evaluation: what the same prompts and noise come to in variants of a model, by any scores.

Pure functions of arrays. Legend: p prompts, m pictures of each, d features; all in float64.
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
    """The mean distance 1 - cos of two different pictures: (p, m, d), m ≥ 2 -> (p,), float64."""
    x = F.normalize(features.double(), dim=-1)
    m = x.shape[-2]
    # |Σx|² is the sum over all pairs, of which m are a picture with itself
    return 1 - (x.sum(-2).square().sum(-1) - m) / (m * (m - 1))


@dataclass(frozen=True)
class Measure:
    """One quantity of every variant, the base first: (p, m), or (p, 1) of a prompt's whole set.

    rows: which of all prompts they are; weights, strata: see `bootstrap`; less: less is better.
    """

    name: str
    values: dict[str, Tensor]
    rows: list[int]
    weights: Tensor | None = None
    strata: Sequence[str] = ()
    less: bool = False

    def only(self, keep: Sequence[bool], name: str = "") -> Measure:
        """Of these prompts alone."""
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
        """Without the prompts that have, in any variant, a value that is not finite."""
        found = torch.stack([values.isfinite().all(-1) for values in self.values.values()])
        return self.only(found.all(0).tolist())


def compared(measure: Measure, seed: int) -> dict[str, dict[str, Interval]]:
    """Of each variant its mean, and over the base, in pairs, the difference and share of wins.

    Returns {variant: {"mean": ..., "difference": ..., "wins": ...}}, the base with its mean alone.
    """

    def over(values: Tensor, weights: Tensor | None = None) -> Interval:
        # the same draws each time, so that no figure depends on what else is reported
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
    """A table, a line a variant of each measure; one without prompts says so."""
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
    """The same as values for JSON, with the mean of every prompt; null for what is not known."""
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
    """Exact rate and character error rate by each reader. letters: how many each prompt asks for.

    columns: {"exact" + reader, "cer" + reader: {variant: (p, m)}}, "cer" negated, as rewards are;
    readers: what to call each.
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
    """The rate of each task, in that order, and their mean. tags: the task of each prompt."""
    every = Measure("", values, rows)
    tasks = [every.only([tag == task for tag in tags], task) for task in order if task in tags]
    return [*tasks, replace(every, name=f"mean of {len(tasks)} tasks", strata=tags)]
