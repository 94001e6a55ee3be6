"""Rewards of a set of images, and the contribution of each image to its set.

Legend: n images, m references, d features; x (n, d) and y (m, d) are their features, μ a mean and
Σ a covariance (divided by n - 1). Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_choice
from .images import check_inputs

__all__ = ["METRICS", "SetReward", "frechet", "leave_one_out", "mmd", "vendi"]

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance of the Gaussians fitted to x and y, squared, as FID reports it.

        |μx - μy|² + tr(Σx + Σy - 2 (Σx Σy)^½)         (Heusel et al. 2017, arXiv 1706.08500)

    The eigenvalues of Σx Σy are the squared singular values of the product of the two centred
    sets, so no matrix square root is needed and singular covariances are no special case.
    x is (n, d) and y (m, d) with n, m ≥ 2. Returns a scalar, float64; 0 for equal sets.
    """
    x, y = _features(x, "x", 2), _features(y, "y", 2)
    return _frechet(x, _gaussian(y))


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    sigma: float = CMMD_SIGMA,
    scale: float = CMMD_SCALE,
    unbiased: bool = False,
) -> Tensor:
    """Squared maximum mean discrepancy with the kernel exp(-|a - b|²/(2σ²)), times `scale`.

    σ = 10 and 1000 are CMMD's (Jayasumana et al. 2024, arXiv 2401.09603), whose features are
    unit vectors. Its published code includes the pairs of an image with itself, as here by default
    (Gretton et al. 2012, eq. 5; never negative); its text describes `unbiased`, without them (eq.
    3; n, m ≥ 2, may be negative). x is (n, d) and y (m, d). Returns a scalar, float64.
    """
    least = 2 if unbiased else 1
    x, y = _features(x, "x", least), _features(y, "y", least)
    within = [_kernel_mean(_kernel(z, z, sigma), unbiased) for z in (x, y)]
    return scale * (within[0] + within[1] - 2 * _kernel(x, y, sigma).mean())


def vendi(x: Tensor) -> Tensor:
    """Return the effective number of different images, from 1 (all equal) to n (all orthogonal).

    It is the exponential of the entropy of the eigenvalues of K/n, with K the cosines of x (n, d)
    (Friedman and Dieng 2022, arXiv 2210.02410, eq. 1). Returns a scalar, float64.
    """
    x = _features(x, "x", 1)
    lengths = x.norm(dim=1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"the features of image {row} are all 0, so it has no direction")
    # K = x xᵀ, whose eigenvalues are the squared singular values of x
    shares = torch.linalg.svdvals(F.normalize(x, dim=1)).square() / len(x)
    return torch.special.entr(shares).sum().exp()


# these return closures that hold everything that depends only on the references; larger is better


def _minus_frechet(y: Tensor) -> Callable[[Tensor], Tensor]:
    target = _gaussian(_features(y, "references", 2))
    return lambda x: leave_one_out(lambda z: -_frechet(z, target), _features(x, "images", 3))


def _minus_mmd(y: Tensor) -> Callable[[Tensor], Tensor]:
    y = _features(y, "references", 1)

    def contributions(x: Tensor) -> Tensor:
        x = _features(x, "images", 2)
        n = len(x)
        within, across = _kernel(x, x, CMMD_SIGMA), _kernel(x, y, CMMD_SIGMA).mean(1)
        # without i: its row, its column and its own corner leave the sum of the kernel
        kept = (within.sum() - 2 * within.sum(1) + within.diagonal()) / (n - 1) ** 2
        kept = kept - 2 * (across.sum() - across) / (n - 1)
        # the term of the references is the same with and without i
        return CMMD_SCALE * (kept - (within.mean() - 2 * across.mean()))

    return contributions


def _vendi(y: None) -> Callable[[Tensor], Tensor]:
    return lambda x: leave_one_out(vendi, _features(x, "images", 2))


METRICS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "frechet": _minus_frechet,
    "mmd": _minus_mmd,
    "vendi": _vendi,
}


def leave_one_out(reward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the contribution of each of n rows, reward(all) - reward(all but this one), (n,).

    `reward` maps features (n, d) to a scalar of which larger is better; negate a distance.
    """
    rows = torch.arange(len(x), device=x.device)
    without = [reward(x[rows != i]) for i in range(len(x))]
    return reward(x) - torch.stack(without)


class SetReward:
    """The leave-one-out contribution of each image to the reward of its batch.

    `frechet` and `mmd` are negated distances to the references, so an image scores above 0 if the
    batch is closer to them with it than without it; `vendi` is the diversity of the batch and
    takes no references. Rewards of sets are those of DRAGON (Bai et al. 2025, arXiv 2504.15217),
    whose references may be images or, in a shared space, captions.

    The score of an image depends on the others in the call by design, which is why `rewards.load`
    does not offer this reward. Call it with a whole group, never with a chunk of one: at least 3
    images for `frechet`, else 2. Prompts are ignored.

    Args:
        tower: `rewards.towers.sources.towers(source)`, or a function of images (n, 3, h, w) to
            features (n, d).
        metric: One of `METRICS`.
        references: Features (m, d), images (m, 3, h, w) or, with towers, captions.
        batch_size: Number of images evaluated at once.
    """

    differentiable = False
    wants_references = False
    range: tuple[float | None, float | None] = (None, None)

    def __init__(
        self,
        tower: Any,
        metric: str,
        references: Tensor | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> None:
        check_choice("the set metric", metric, METRICS)
        if (references is None) != (metric == "vendi"):
            needs = "takes no" if metric == "vendi" else "compares with"
            raise ValueError(f"the metric {metric} of a set {needs} references; see SetReward")
        self.name = f"set_{metric}"
        self.tower = tower
        self.batch_size = batch_size
        self.contributions = METRICS[metric](self._of_references(references))

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        return self.contributions(self._of_images(images)).to(images.device, torch.float32)

    def _of_images(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            if not hasattr(self.tower, "image_features"):
                return torch.cat([self.tower(chunk) for chunk in images.split(self.batch_size)])
            self.tower.to(images.device)
            return self.tower.image_features(images, self.batch_size)

    def _of_references(self, references: Any) -> Tensor | None:
        if references is None:
            return None
        if isinstance(references, Tensor) and references.ndim == 4:
            check_inputs(references, [""] * len(references))
            return self._of_images(references)
        if isinstance(references, Tensor):
            return references
        if isinstance(references, str) or not (references and hasattr(self.tower, "text_features")):
            raise ValueError(
                "the references of a set are features (m, d), images (m, 3, h, w), or a list of "
                "captions if the tower is one of rewards.towers.sources"
            )
        with torch.no_grad():
            return self.tower.text_features(list(references))


def _features(x: Tensor, name: str, least: int) -> Tensor:
    """Convert to float64, on the CPU if the device lacks it."""
    if x.ndim != 2 or len(x) < least or not x.isfinite().all():
        raise ValueError(
            f"the features of {name} must be finite, of shape (n, d) with at least {least} rows, "
            f"but are {tuple(x.shape)}{'' if x.isfinite().all() else ' and not finite'}"
        )
    return (x.cpu() if x.device.type == "mps" else x).double()


def _gaussian(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and R (r, d) with Rᵀ R = Σ and at most d rows."""
    mean = y.mean(0)
    centred = (y - mean) / (len(y) - 1) ** 0.5
    root = torch.linalg.qr(centred, mode="r").R if len(y) > y.shape[1] else centred
    return mean, root


def _frechet(x: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    mean, root = _gaussian(x)
    other_mean, other_root = (part.to(x.device) for part in target)
    if x.shape[1] != len(other_mean):
        raise ValueError(
            f"features of {x.shape[1]} and {len(other_mean)} dimensions cannot be compared; "
            "take both from one tower"
        )
    cross = torch.linalg.svdvals(root @ other_root.T).sum()  # tr (Σx Σy)^½
    spread = root.square().sum() + other_root.square().sum() - 2 * cross
    return (mean - other_mean).square().sum() + spread.clamp(min=0)


def _kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared; "
            "take both from one tower"
        )
    squares = torch.cdist(x, y.to(x.device), compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-squares / (2 * sigma**2))


def _kernel_mean(kernel: Tensor, unbiased: bool) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - n) / (n * (n - 1)) if unbiased else kernel.mean()
