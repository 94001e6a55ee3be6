"""A reward with an upper limit, or relative to reference scores or images.

Legend: n images, r the score of the part, v the N reference scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..arguments import check_number
from ..combine import Aggregate, WeightedSum
from ..images import to_images
from .aggregate import bounds, build, ends, pointwise, single
from .calibrate import read

__all__ = ["clip_above", "delta", "par", "reference_scores"]


def clip_above(*parts: WeightedSum, at: float | str, quantile: float = 0.95) -> Aggregate:
    """min(r, at): gains above `at` do not count and have no gradient.

    Up to a constant, the negative of ReFL's relu(2 - r) of ImageReward (Xu et al. 2023, arXiv
    2304.05977). `at` is a score, or a calibration file of which `quantile` is used.
    """
    part = single("clip_above", parts)
    quantile = check_number("clip_above's quantile", quantile, 0, 1)
    if isinstance(at, str):
        top = read(at, part).quantile(quantile).item()
    else:
        top = check_number("clip_above's at", at)
    low, high = (end.clamp(max=top) for end in ends(parts))
    score = pointwise(parts, lambda r: r[0].clamp(max=top))
    return build("clip_above", parts, score, bounds(low, high), at=at, quantile=quantile)


def par(*parts: WeightedSum, ref: float | str | None = None) -> Aggregate:
    """(1/N) Σ_j σ(r - v_j), the probability of being preferred: Preference As Reward.

    Fu et al. 2025 (arXiv 2502.18770): bounded, steepest at the reference, flat far above it. The
    v_j are one score, those of a calibration file, or, by default, the scores of the prompt's
    reference images; the paper's are images of the base model.
    """
    part = single("par", parts)
    if ref is None:
        return _against("par", part, lambda r, v: torch.sigmoid(r - v).mean(), (0.0, 1.0))
    v = (
        read(ref, part)
        if isinstance(ref, str)
        else torch.tensor([check_number("par's ref", ref)], dtype=torch.float64)
    )
    return build("par", parts, pointwise(parts, partial(_par, v=v)), (0.0, 1.0), ref=ref)


def delta(*parts: WeightedSum) -> Aggregate:
    """r(image) - r(base), the gain over the base image, which `references` supplies.

    If an entry holds several images, the mean of their scores is subtracted.
    """
    part = single("delta", parts)
    low, high = ends(parts)
    return _against("delta", part, lambda r, v: r - v.mean(), bounds(low - high, high - low))


def _par(r: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(r[0][:, None] - v.to(r)).mean(1)


def _against(
    name: str, part: WeightedSum, compare: Callable[[Tensor, Tensor], Tensor], range: Any
) -> Aggregate:
    """Make an aggregate of r () and the scores v (N,) of the reference images of its prompt."""
    if part.wants_references:
        raise ValueError(
            f"{name} uses the references itself but {part} uses them too; pass a reward of image "
            "and prompt only, whose wants_references is False"
        )

    def score(images: Tensor, prompts: Sequence[str], references: Any) -> Any:
        r, components = part.evaluate(images, prompts)
        if not len(images):
            return r, components
        v = reference_scores(name, part, images, prompts, references)
        return torch.stack([compare(*pair) for pair in zip(r, v, strict=True)]), components

    return replace(build(name, [part], score, range), references=True)


def reference_scores(
    name: str, part: WeightedSum, images: Tensor, prompts: Sequence[str], references: Any
) -> list[Tensor]:
    """Return the scores (m,) of each prompt's reference images, without gradients.

    An entry that several rows share with their prompt is scored once.
    """
    if references is None or len(references) != len(prompts):
        got = "none" if references is None else f"{len(references)}"
        raise ValueError(
            f"{name} compares with reference images, an entry of references= for each of the "
            f"{len(prompts)} prompts, but got {got}"
        )
    references = list(references)  # keeps the entries of an array alive, so that ids are unique
    keys = [(id(entry), prompt) for entry, prompt in zip(references, prompts, strict=True)]
    entries = dict(zip(keys, references, strict=True))
    rows = [(key, x) for key, entry in entries.items() for x in pictures(name, entry)]
    rows.sort(key=lambda row: row[1].shape)
    found: dict[Any, list[Tensor]] = {key: [] for key in entries}
    for _, group in groupby(rows, key=lambda row: row[1].shape):
        alike = list(group)
        batch = torch.stack([x for _, x in alike]).to(images.device)
        with torch.no_grad():
            scores = part(batch, [prompt for (_, prompt), _ in alike])
        for (key, _), x in zip(alike, scores, strict=True):
            found[key].append(x)
    return [torch.stack(found[key]) for key in keys]


def pictures(name: str, entry: Any) -> list[Tensor]:
    """Return the images (3, h, w) of an entry: an image, several, or a tensor (m, 3, h, w)."""
    many = isinstance(entry, Sequence) and not isinstance(entry, Image.Image | str)
    found = [x for item in (entry if many else [entry]) for x in to_images(item)]
    if not found:
        raise ValueError(f"{name} got an empty entry in references=; give it an image")
    return found
