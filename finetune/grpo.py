"""Policy gradients for diffusion: sample groups, score them, reinforce the better images.

GRPO on the moves of a stochastic window (Flow-GRPO, Liu et al. 2025; the window as in MixGRPO).
`online.Samples` samples and scores the images of an epoch.
Legend: g groups, k images per group, n = g·k rows, w steps of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steering.transitions import Transition, log_prob

from .chains import Move, Policy
from .learner import Learner, Tuning, check_shares
from .losses import SPREADS, clipped, policy_loss
from .models import Family
from .online import Batch, Compared, Samples, Score, Task, advantages_of, only
from .ranges import FLAG, number, one_of, optional, setting, whole

__all__ = ["Grpo", "GrpoTrainer", "Score", "advantages_of", "mean_log_prob"]


@dataclass
class Grpo(Tuning):
    """The settings of a run.

    DDPO's importance-weighted form (Black et al. 2023) is window_size = num_inference_steps - 1,
    noise = 1 (ancestral sampling for schedulers with betas), share_start = False and clip = 1e-4.
    Its code normalises by a running mean and deviation of each prompt's last 16 rewards, for
    batches without groups; here rewards are normalised within their group. The last step, which
    draws no noise here, is not trained on.
    """

    steps: int = setting(200, whole(1), "number of epochs (sample, score, update)")
    groups: int = setting(4, whole(1), "prompts per epoch, over all processes")
    k: int = setting(8, whole(2), "images per prompt")
    micro_groups: int = setting(1, whole(1), "groups that a process evaluates at once")
    updates: int = setting(1, whole(1), "optimiser steps on the same samples")
    num_inference_steps: int = setting(10, whole(1, 10_000), "steps of the sampler")
    window_start: int = setting(0, whole(0), "first stochastic step")
    window_size: int = setting(2, whole(1), "number of stochastic steps, which are trained on")
    window_moves: bool = setting(False, FLAG, "move the window by one step per epoch (MixGRPO)")
    noise: float = setting(
        0.8,
        number(0, 1, "(]"),
        "noise of the stochastic steps: DDIM's eta, or the fraction of a flow's noise that is "
        "replaced",
    )
    share_start: bool = setting(
        True, FLAG, "images of a group share the initial noise and branch at the window"
    )
    guidance_scale: float | None = setting(
        None,
        optional(number(0)),
        "guidance scale in sampling and training; by default none, or the pipeline's default for "
        "a guidance-distilled network (FLUX.1-dev)",
    )
    clip: float = setting(
        1e-4, number(0, ends="(]"), "PPO clip range of the per-element probability ratio"
    )
    advantage_clip: float = setting(5.0, number(0, ends="(]"), "largest absolute advantage")
    spread: str = setting(
        "group",
        one_of(*SPREADS),
        "whose standard deviation divides advantages: group, global (all images) or none",
    )
    each_reward: bool = setting(False, FLAG, "normalise each reward separately before adding them")
    kl: float = setting(0.0, number(0), "weight of the divergence from the reference")

    def window(self, epoch: int) -> range:
        """Return the stochastic steps of an epoch; a moving window moves by one step per epoch."""
        first = self.window_start
        if self.window_moves:
            first += epoch % max(1, self.num_inference_steps - self.window_size - first)
        return range(first, first + self.window_size)


def mean_log_prob(transition: Transition, x: Tensor) -> Tensor:
    """Return log N(x; mean, std² I) divided by the number of elements, (n,) for x (n, *shape).

    The mean makes the clip range of the ratio independent of the resolution (as in Flow-GRPO).
    """
    raised = Transition(transition.mean[:, None], transition.std, transition.x0[:, None])
    return log_prob(raised, x[:, None])[:, 0] / x[0].numel()


class GrpoTrainer:
    """Trains a network on its own samples, one epoch at a time."""

    def __init__(
        self, network: Any, family: Family, task: Task, settings: Grpo, accelerator: Any
    ) -> None:
        task.schedule.check_window(settings.window(0), settings.noise)
        check_shares(settings.groups, accelerator.num_processes, equal=True)
        self.settings, self.schedule, self.empty = settings, task.schedule, task.empty
        self.learner = Learner(network, family, settings, accelerator)
        self.samples = Samples(self.learner, task, settings)

    @property
    def step(self) -> int:
        """The number of epochs so far."""
        return self.learner.step // self.settings.updates

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, including the state of a trained reward."""
        return self.samples.with_score(self.learner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.samples.load_score(state)

    def train_step(self) -> dict[str, float]:
        """Run one epoch: sample, score, and make `updates` optimiser steps."""
        s, epoch = self.settings, self.step
        batches = [self._sampled(epoch, part) for part in self.samples.shares()]
        compared = self.samples.compared(batches)
        old: list[list[Tensor]] = []
        if s.updates > 1:
            with torch.no_grad():
                old = [[self._density(b, m)[1] for m in b.moves] for b in batches]
        seen: dict[str, float] = {}
        for _ in range(s.updates):
            seen = self._update(batches, compared, old)
        return self.samples.told(batches) | seen | self.samples.observed(batches, epoch)

    def _policy(self, network: Any) -> Policy:
        family, s = self.learner.family, self.settings
        scale = 1.0 if s.guidance_scale is None else s.guidance_scale
        return Policy(network, family, self.schedule.noising, scale, self.empty)

    def _sampled(self, epoch: int, groups: Sequence[int]) -> Batch:
        """Sample images of some of the epoch's groups, with the moves of its window."""
        s, window = self.settings, self.settings.window(epoch)
        self.schedule.check_window(window, s.noise)
        policy = self._policy(self.learner.bare)
        return self.samples.batch(policy, epoch, groups, window, s.noise, s.share_start)

    def _density(self, batch: Batch, move: Move) -> tuple[Transition, Tensor]:
        """Return the move that the network now proposes, and the log-density of the sampled one."""
        step = move.step
        output = self._policy(self.learner.network)(
            move.x, self.schedule.t[step].to(move.x.device), batch.given
        )
        transition = self.schedule.transition(step, output, move.x, self.settings.noise)
        return transition, mean_log_prob(transition, move.y)

    def _update(
        self,
        batches: Sequence[Batch],
        compared: Compared,
        old: Sequence[Sequence[Tensor]],
    ) -> dict[str, float]:
        """Make one optimiser step over all groups and all steps of the window."""
        parts = [
            partial(self._kept, compared.kept[i], batch, move, compared.advantages[i], before)
            for i, batch in enumerate(batches)
            for j, move in enumerate(batch.moves)
            for before in [old[i][j] if old else None]
        ]
        return self.learner.descend(parts, max(1, compared.scored) * len(batches[0].moves))

    def _kept(self, kept: Tensor, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return only(kept, *self._loss(*given))

    def _loss(
        self, batch: Batch, move: Move, advantages: Tensor, before: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each row (n,), and statistics to log."""
        s = self.settings
        # the reference first, since it may swap the weights that the autograd graph needs unchanged
        ref = self._reference(batch, move) if s.kl else None
        transition, now = self._density(batch, move)
        # the first update is on-policy, so its ratio is exactly 1 despite rounding
        before = now.detach() if before is None else before
        loss = policy_loss(now, before, advantages.flatten(), clip=s.clip)
        seen = {"clipped": clipped(now, before, clip=s.clip), "ratio": (now - before).exp()}
        if ref is not None:
            apart = (transition.mean - ref.mean).square().flatten(1).mean(1)
            seen["kl"] = divergence = apart / (2 * transition.std.square())  # between Gaussians
            loss = loss + s.kl * divergence
        return loss, seen

    def _reference(self, batch: Batch, move: Move) -> Transition:
        """Return the move that the reference proposes."""
        with torch.no_grad(), self.learner.reference():
            output = self._policy(self.learner.bare)(
                move.x, self.schedule.t[move.step].to(move.x.device), batch.given
            )
        return self.schedule.transition(move.step, output, move.x, self.settings.noise)
