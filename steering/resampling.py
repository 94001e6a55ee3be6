"""Resampling schemes: draw `num` ancestors so that particle i has num * W_i children on average.

Every scheme is `f(weights (b, k), num, generator) -> ancestors (b, num)` int64. `weights` need not
sum to one; a particle of weight zero is never drawn. `generator` is one torch.Generator, or a
sequence of b generators, one per prompt; a prompt's ancestors then do not depend on the rest of the
batch. Nothing is read back from the device. Generators may live on the CPU while the weights do
not, so the same seed gives the same ancestors on every device.

Douc & Cappé (2005) compare the first four; Gerber, Chopin & Whiteley (2019), "Negative
association, ordering and convergence of resampling methods", treat ssp and show that systematic
resampling, unlike the others, need not converge.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

__all__ = [
    "RESAMPLERS",
    "Resampler",
    "multinomial",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]


class Resampler(Protocol):
    """Maps weights (b, k), num and generator to ancestors (b, num) int64 (see the module)."""

    def __call__(
        self, weights: Tensor, num: int, generator: Generator | Sequence[Generator]
    ) -> Tensor: ...


def multinomial(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Draw `num` independent ancestors from the weights."""
    return _inverse_cdf(weights, _uniforms(weights, num, generator))


def stratified(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Draw one uniform in each of `num` equal intervals (Kitagawa 1996): |N_i - num W_i| < 2."""
    return _inverse_cdf(weights, _strata(_uniforms(weights, num, generator), num))


def systematic(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Draw one uniform for all of `num` equal intervals: N_i is num W_i rounded down or up."""
    return _inverse_cdf(weights, _strata(_uniforms(weights, 1, generator), num))


def residual(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Give each particle floor(num W_i) children, draw the rest by remainder (Liu & Chen 1998)."""
    counts, remainders = _whole_and_remainder(weights, num)
    # The number left to draw differs between prompts; drawing `num` for each and using only the
    # last ones keeps the shapes fixed.
    drawn = _inverse_cdf(remainders, _uniforms(weights, num, generator))
    settled = counts.sum(dim=1, keepdim=True)
    return torch.where(_slots(drawn) < settled, _repeat(counts, num), drawn)


def ssp(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Srinivasan sampling process: N_i is num W_i rounded down or up (Gerber et al. 2019).

    The remainders are rounded in pairs. Two remainders p and q with p+q <= 1 become (p+q, 0) or
    (0, p+q), otherwise (1, p+q-1) or (p+q-1, 1), with probabilities that keep both means. One of
    the two is then an integer, and the other is paired with the next particle's remainder.
    """
    counts, remainders = _whole_and_remainder(weights, num)
    b, k = weights.shape
    uniforms = _uniforms(weights, k, generator)
    holder = torch.zeros(b, 1, dtype=torch.int64, device=weights.device)
    held = remainders[:, :1]
    for j in range(1, k):
        other, u = remainders[:, j : j + 1], uniforms[:, j : j + 1]
        total = held + other
        over = total > 1
        up = torch.where(over, u * (2 - total) < 1 - other, u * total < held)
        stays = up != over
        settled = torch.where(stays, j, holder)
        counts = counts.scatter_add(1, settled, over.to(counts.dtype))
        holder = torch.where(stays, holder, j)
        held = torch.where(over, total - 1, total)
    # The last remainder is 0 or 1 up to round-off; the counts determine which.
    counts = counts.scatter_add(1, holder, num - counts.sum(dim=1, keepdim=True))
    return _repeat(counts, num)


RESAMPLERS: dict[str, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def _uniforms(weights: Tensor, num: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Draw (b, num) uniforms in [0, 1), in float64 if the device supports it."""
    b = weights.shape[0]
    dtype = _precision(weights)
    if isinstance(generator, Generator):
        drawn = torch.rand(b, num, generator=generator, device=generator.device, dtype=dtype)
    elif len(generator) == b:
        rows = [torch.rand(num, generator=g, device=g.device, dtype=dtype) for g in generator]
        drawn = torch.stack(rows)
    else:
        raise ValueError(
            f"resampling got {len(generator)} generators for {b} prompts: "
            "pass one torch.Generator, or one for each prompt"
        )
    return drawn.to(weights.device, non_blocking=True)


def _precision(weights: Tensor) -> torch.dtype:
    return torch.float32 if weights.device.type == "mps" else torch.float64


def _strata(uniforms: Tensor, num: int) -> Tensor:
    slots = torch.arange(num, device=uniforms.device, dtype=uniforms.dtype)
    return (slots + uniforms) / num


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the particle whose interval of the cumulated weights contains each uniform."""
    cdf = weights.to(uniforms.dtype).cumsum(dim=1)
    # Dividing by the last value keeps every uniform below the end. Clamping below 1 and searching
    # to the right ensure that a particle of weight zero is never drawn.
    cdf = cdf / cdf[:, -1:]
    below_one = 1 - torch.finfo(uniforms.dtype).eps
    found = torch.searchsorted(cdf, uniforms.clamp(max=below_one).contiguous(), right=True)
    return found.clamp(max=weights.shape[1] - 1)


def _whole_and_remainder(weights: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Split num W into int64 counts and remainders in [0, 1)."""
    weights = weights.to(_precision(weights))
    expected = num * weights / weights.sum(dim=1, keepdim=True)
    # A value within round-off of an integer counts as that integer: 49 * (1/49) is 1, not 0.99...
    slack = 16 * num * torch.finfo(expected.dtype).eps
    whole = torch.floor(expected + slack)
    remainders = expected - whole
    remainders = torch.where(remainders < slack, torch.zeros_like(remainders), remainders)
    return whole.to(torch.int64), remainders


def _repeat(counts: Tensor, num: int) -> Tensor:
    """Return `num` ancestors: particle i repeated counts_i times, in order."""
    slots = torch.arange(num, device=counts.device).expand(counts.shape[0], num).contiguous()
    found = torch.searchsorted(counts.cumsum(dim=1), slots, right=True)
    return found.clamp(max=counts.shape[1] - 1)


def _slots(ancestors: Tensor) -> Tensor:
    return torch.arange(ancestors.shape[1], device=ancestors.device)
