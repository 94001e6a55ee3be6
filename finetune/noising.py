"""How latents are noised for training, by the scheduler of a pipeline.

Legend: n rows; t in (0, 1) is the time, 0 for clean latents and 1 for pure noise: the noise level
of a flow, or with betas the timestep over T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.schedulers import StochasticFlow, stochastic

__all__ = ["Noising", "noising_of"]


@dataclass(frozen=True)
class Noising:
    """How latents are noised, and what the network predicts.

    Flows: x_t = (1 - t) x0 + t ε, target ε - x0 ("velocity"). With betas: x = √ᾱ x0 + √(1 - ᾱ) ε at
    the timestep floor(t·T), target by `prediction` ("epsilon", "v_prediction" or "sample").
    """

    prediction: str
    num_train_timesteps: int
    alphas_cumprod: Tensor | None = None

    @property
    def flow(self) -> bool:
        """Whether the latents are those of a flow, not of a diffusion with betas."""
        return self.alphas_cumprod is None

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the network's timesteps (n,): floats up to T for a flow, else integers."""
        t = t.to(_precise(t))  # in 16 bits, the product would be rounded to whole steps and more
        if self.flow:
            return t * self.num_train_timesteps
        return (t * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_t, target), both shaped as x0 (n, ...), for t (n,)."""
        shape = (-1,) + (1,) * (x0.ndim - 1)
        if self.alphas_cumprod is None:
            share = t.view(shape)
            return (1 - share) * x0 + share * noise, noise - x0
        kept = self.alphas_cumprod.to(x0.device)[self.timesteps(t)].view(shape).to(_precise(x0))
        signal, spread = kept.sqrt().to(x0.dtype), (1 - kept).sqrt().to(x0.dtype)
        x = signal * x0 + spread * noise
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - spread * x0,
            "sample": lambda: x0,
        }
        return x, targets[self.prediction]()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return ½|dλ/dt| times the factor from the prediction's squared error to ε's, (n,).

        λ is the log signal-to-noise ratio (Kingma et al. 2021). With this weight, and β multiplied
        by the number of an image's elements, implicit scores averaged over t ~ U(0, 1) are
        log-likelihood ratios; see `losses.elbo_weight` for flows.
        """
        if self.alphas_cumprod is None:
            return (1 - t) / t
        kept = self.alphas_cumprod.double().to(t.device)
        ratio = (kept / (1 - kept)).log()
        slope = -torch.gradient(ratio)[0] * self.num_train_timesteps  # dλ/dt, positive
        at = self.timesteps(t)
        kept, slope = kept[at], slope[at]
        factor = {"epsilon": 1.0, "v_prediction": kept, "sample": kept / (1 - kept)}
        return (slope / 2 * factor[self.prediction]).to(t.dtype)

    def velocity_weight(self, t: Tensor) -> Tensor:
        """Return the factor from the prediction's squared error to that of the velocity, (n,).

        v = α ε - σ x0 with betas (Salimans & Ho 2022, App. D). Near pure noise, where an image's
        layout is decided, the error of ε is uninformative, because x is nearly ε itself.
        """
        if self.alphas_cumprod is None:
            return torch.ones_like(t)
        kept = self.alphas_cumprod.to(t.device, _precise(t))[self.timesteps(t)]
        one = torch.ones_like(kept)
        factor = {"epsilon": 1 / kept, "v_prediction": one, "sample": 1 / (1 - kept)}
        return factor[self.prediction].to(t.dtype)

    def x0_error(self, t: Tensor) -> Tensor:
        """Return the factor from the prediction's error to that of x0, without its sign, (n,)."""
        if self.alphas_cumprod is None:
            return t
        kept = self.alphas_cumprod.to(t.device, _precise(t))[self.timesteps(t)]
        one, spread = torch.ones_like(kept), (1 - kept).sqrt()
        factor = {"epsilon": spread / kept.sqrt(), "v_prediction": spread, "sample": one}
        return factor[self.prediction].to(t.dtype)


def _precise(value: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for 16 bits, in which 1 - ᾱ vanishes."""
    return torch.promote_types(value.dtype, torch.float32)


def noising_of(pipe: Any) -> Noising:
    """Return the pipeline's noising, from its scheduler's configuration.

    Schedulers of other classes count as the DDIM or the Euler scheduler that steering replaces them
    by. Raises ValueError as `steering.schedulers.stochastic` does.
    """
    scheduler: Any = stochastic(pipe.scheduler, 0.0)
    steps = int(scheduler.config.num_train_timesteps)
    if isinstance(scheduler, StochasticFlow):
        return Noising("velocity", steps)
    kind = str(scheduler.config.get("prediction_type", "epsilon"))
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"the scheduler predicts {kind!r}; supported are epsilon, v_prediction and sample"
        )
    return Noising(kind, steps, scheduler.alphas_cumprod.double())
