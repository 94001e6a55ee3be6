"""Sampling with a stochastic window, for policy gradients: moves with known densities.

The moves are those of steering (DDIM, rectified flow with noise) or of the SDEs of Flow-GRPO and
DanceGRPO. The loop is written out here, because the same network calls are differentiated later.
Legend: n rows, w steps of the window, `now` and `after` the noise levels around a step: ᾱ for
schedulers with betas, σ for flows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.schedulers import stochastic
from steering.transitions import Transition, ddim_transition, flow_transition, sde_transition

from .conditioning import Conditioning
from .network import Model, Reached, guide, run
from .noising import Noising

__all__ = ["SDES", "Move", "Schedule", "sample", "schedule_of"]

SDES = ("cps", "flow", "dance")  # stochastic steps of a flow
PURE = 0.999  # a time from which latents are pure noise


@dataclass(frozen=True)
class Schedule:
    """The steps of a sampler: t (steps,) in (0, 1], as `network.predict` takes it, and the levels.

    shape: the shape of one row of latents. sde: the stochastic steps of a flow. "cps" replaces a
    fraction `noise` of the noise (Flow-CPS, Wang & Yu 2025, with noise = sin(η π/2)); "flow" and
    "dance" are Euler-Maruyama steps with the rates noise √(t/(1-t)) of Flow-GRPO and noise of
    DanceGRPO. With betas, the steps are DDIM's. Raises ValueError for another sde with betas.
    """

    noising: Noising
    shape: tuple[int, ...]
    t: Tensor
    now: Tensor
    after: Tensor
    sde: str = "cps"

    def __post_init__(self) -> None:
        allowed = SDES if self.noising.flow else SDES[:1]
        if self.sde not in allowed:
            raise ValueError(f"sde is {self.sde!r} but must be one of {list(allowed)} here")

    def __len__(self) -> int:
        return len(self.t)

    def transition(self, step: int, output: Tensor, x: Tensor, noise: float) -> Transition:
        """Return the Gaussian move of a step for the network's output; noise 0 is deterministic."""
        now, after = self.now[step], self.after[step]
        if not self.noising.flow:
            return ddim_transition(output, x, now, after, noise, self.noising.prediction)
        if self.sde == "cps" or not noise:
            return flow_transition(output, x, now, after, noise * after)
        if self.sde == "dance":
            return sde_transition(output, x, now, after, noise)
        # At pure noise the rate is infinite; as published, 1 - t is then that of the next step.
        # Some schedules begin just below 1, where the rate would be hundreds.
        rest = 1 - (after if step == 0 and now > PURE else now)
        return sde_transition(output, x, now, after, noise * (now / rest).sqrt())

    def check_window(self, window: range, noise: float) -> None:
        """Raise ValueError for a window that is empty, outside the schedule or without noise."""
        last = len(self) - 1  # this step gives the image and draws no noise
        most = 1 if self.sde == "cps" else math.inf
        if not window or window.start < 0 or window.stop > last or not 0 < noise <= most:
            raise ValueError(
                f"the window of steps {window.start} to {window.stop - 1} at noise {noise} has no "
                f"moves to learn from; of {len(self)} steps 0 to {last - 1} draw noise in (0, "
                f"{most}{']' if most == 1 else ')'}"
            )


@torch.no_grad()
def schedule_of(model: Model, given: Conditioning) -> Schedule:
    """Return the steps that the call of `given` takes, as DDIM or Euler.

    A copy of the pipeline is called until it calls its network; the schedule is what that call
    sets.
    """
    scheduler: Any = stochastic(model.scheduler, 0.0)
    device, shape = torch.device("cpu"), given.form.shape
    view = model.view(device, _end)
    guide(view, given.form.guided)
    vars(view)["scheduler"] = scheduler
    with contextlib.suppress(Reached):  # what follows may need the decoder, as FLUX.2's end does
        run(view, given[:1].to(device), torch.zeros(1, *shape), model.dtype)
    noising, timesteps = model.noising, scheduler.timesteps.cpu()
    if noising.flow:
        sigmas = scheduler.sigmas.float().cpu()[-len(timesteps) - 1 :]
        return Schedule(noising, shape, sigmas[:-1], sigmas[:-1], sigmas[1:])
    every, total = scheduler.alphas_cumprod, noising.num_train_timesteps
    before = timesteps - total // scheduler.num_inference_steps
    after = torch.where(before >= 0, every[before.clamp(min=0)], scheduler.final_alpha_cumprod)
    return Schedule(noising, shape, (timesteps + 0.5) / total, every[timesteps], after)


def _end(*_: Any, **__: Any) -> Any:
    raise Reached(None)


@dataclass(frozen=True)
class Move:
    """One sampled noisy step from x to y, both (n, *shape)."""

    step: int
    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Move:
        return Move(self.step, self.x[rows], self.y[rows])


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
    schedule: Schedule,
    start: Tensor,
    given: Conditioning,
    window: range,
    noise: float,
    draws: Tensor,
) -> tuple[Tensor, list[Move]]:
    """Sample latents (n, *shape) from pure noise `start`; return them and the window's moves.

    predict(x (n, ...), t (), given): the network's output. draws (w, n, *shape): the noise of each
    move. Steps outside the window are deterministic
    (Flow-GRPO-Fast; MixGRPO). A `start` of (1, *shape) is evaluated as one row until the window.
    """
    x, moves = start, []
    rows = draws.shape[1]
    shared = len(start) == 1 and rows > 1
    for step in range(len(schedule)):
        if shared and step == window.start:
            x, shared = x.expand(rows, *x.shape[1:]), False
        mine = given[:1] if shared else given
        output = predict(x, schedule.t[step].to(x.device), mine)
        if step in window:
            move = schedule.transition(step, output, x, noise)
            y = move.mean + move.std * draws[step - window.start].to(x)
            moves.append(Move(step, x, y))
            x = y
        else:
            x = schedule.transition(step, output, x, 0.0).mean
    return x, moves
