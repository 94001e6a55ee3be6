"""Calibration of scores by a sample of reference images, which is saved in a file.

    reward = rewards.load("clip + ocr")
    calibrate.save("scale.json", calibrate.measure(reward, images, prompts))
    spec = "a=calibrated(clip, file=scale.json) + b=calibrated(ocr, file=scale.json)"
    rewards.load(spec, imports=True)

The file is JSON, {"components": {spec: [scores in ascending order]}}. The spec, with every argument
that is not a default, is the fingerprint; a reward with another spec is an error. The weights of
a folder are not part of it.

Legend: n images, v the N reference scores.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..combine import Aggregate, Part, WeightedSum, call_of
from ..spec import Call, Term, format_terms, parse
from .aggregate import bounds, build, ends, pointwise, single

__all__ = ["by_fingerprint", "calibrated", "fingerprint", "measure", "read", "save"]

METHODS = ("affine", "quantile")


def calibrated(*parts: WeightedSum, file: str, method: str = "affine") -> Aggregate:
    """A score on the scale of a reference sample, from a file that `save` wrote.

    The method affine is the z-score (r - mean v) / std v with the standard deviation of the sample
    itself, √((1/N) Σ (v - mean v)²). quantile is the share of the sample below r, plus half of
    the share equal to it, in [0, 1]; it is linear between neighbouring scores, so that it has a
    gradient, and constant outside the sample.
    """
    part = single("calibrated", parts)
    check_choice("calibrated's method", method, METHODS)
    v = read(file, part)
    if v[0] == v[-1]:
        raise ValueError(
            f"all {len(v)} reference scores of {part} in {file} are {v[0].item():g}; "
            "calibrate on images that have different scores"
        )
    if method == "affine":
        mean, std = v.mean().item(), v.std(unbiased=False).item()
        low, high = ((end - mean) / std for end in ends([part]))
        range_, apply = bounds(low[0], high[0]), partial(_affine, mean=mean, std=std)
    else:
        range_, apply = (0.0, 1.0), partial(_quantile, v=v)
    return build(
        "calibrated", parts, pointwise(parts, apply), range_, file=str(file), method=method
    )


def measure(
    reward: WeightedSum, images: Tensor, prompts: Sequence[str], *, references: Any = None
) -> dict[str, Tensor]:
    """{fingerprint: scores (n,)} of the sum and of each of its components, for `save`.

    Measure a sample that is too large for one call in several, and join them by torch.cat.
    """
    with torch.no_grad():
        total, components = reward.evaluate(images, prompts, references=references)
    return by_fingerprint(reward, total, components)


def by_fingerprint(
    reward: WeightedSum, total: Any, components: Mapping[str, Any]
) -> dict[str, Any]:
    """{fingerprint: scores} from the total and the components that `evaluate` returned."""
    return {fingerprint(reward): total} | {
        spec: components[name] for name, spec in _fingerprints(reward)
    }


def save(path: str | Path, measured: Mapping[str, Tensor | Sequence[float]]) -> None:
    """Write the file atomically, replacing an existing one.

    NaN is left out. Raises ValueError for infinite scores and for fewer than two.
    """
    components = {}
    for spec, scores in measured.items():
        values = [float(x) for x in scores]
        values = sorted(x for x in values if not math.isnan(x))
        if len(values) < 2 or math.isinf(values[0]) or math.isinf(values[-1]):
            raise ValueError(
                f"a calibration of {spec} needs two or more finite scores but got {len(values)} "
                f"that are not NaN, from {min(values, default='none')} to "
                f"{max(values, default='none')}"
            )
        components[spec] = values
    path = Path(os.path.expanduser(path))
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"components": components}, indent=1), encoding="utf-8")
    os.replace(part, path)


def read(path: str | Path, reward: WeightedSum) -> Tensor:
    """Read the reference scores of `reward`, float64 (N,), ascending; ValueError if missing."""
    if not isinstance(path, str | Path) or not os.path.isfile(os.path.expanduser(path)):
        raise ValueError(
            f"there is no calibration file {path!r}; write it with "
            "rewards.algebra.calibrate.save(...)"
        )
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        components = json.loads(text)["components"]
        found = {spec: torch.tensor(v, dtype=torch.float64) for spec, v in components.items()}
        if any(v.ndim != 1 or len(v) < 2 or not v.isfinite().all() for v in found.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a calibration file, {{'components': {{spec: [scores]}}}}; "
            "write it with rewards.algebra.calibrate.save(...)"
        ) from error
    spec = fingerprint(reward)
    if spec not in found:
        raise ValueError(
            f"{path} was measured for {sorted(found)}, not for {spec}; "
            "measure this reward with rewards.algebra.calibrate.measure(...)"
        )
    return found[spec].sort().values


def fingerprint(reward: WeightedSum) -> str:
    """Return the spec without aliases and without arguments that equal their defaults."""
    return format_terms(tuple(Term(_call(part), part.weight) for part in reward.parts))


def _call(part: Part) -> Call:
    call = call_of(part.reward, part.call)
    if not isinstance(part.reward, Aggregate):
        return call
    sums = (parse(fingerprint(member)) for member in part.reward.members)
    return Call(call.name, (), call.kwargs, tuple(sums))


def _fingerprints(reward: WeightedSum) -> list[tuple[str, str]]:
    """Name and fingerprint of each component, including those inside aggregators."""
    found = []
    for part in reward.parts:
        found.append((part.name, str(_call(part))))
        if isinstance(part.reward, Aggregate):
            for member in part.reward.members:
                found += _fingerprints(member)
    return found


def _affine(r: Tensor, mean: float, std: float) -> Tensor:
    return (r[0] - mean) / std


def _shares(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct scores (k,), ascending, and the share below each plus half its own."""
    at, counts = v.unique(return_counts=True)
    share = (counts.cumsum(0) - counts / 2) / len(v)
    return at, share


def _quantile(r: Tensor, v: Tensor) -> Tensor:
    """Return the interpolation of `_shares`, in r's precision, constant outside of its points."""
    at, share = (x.to(r) for x in _shares(v.to(r.dtype)))
    x = r[0].clamp(at[0], at[-1])
    if len(at) == 1:  # scores that differ in float64 only
        return x * 0 + share[0]
    right = torch.searchsorted(at, x.detach().contiguous()).clamp(1, len(at) - 1)
    left = right - 1
    slope = (share[right] - share[left]) / (at[right] - at[left])
    return share[left] + slope * (x - at[left])
