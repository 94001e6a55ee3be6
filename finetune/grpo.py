"""Policy gradients for diffusion: sample groups, score them, reinforce the better images.

GRPO on the moves of a stochastic window (Flow-GRPO, Liu et al. 2025; the window as in MixGRPO).
`online.Samples` samples and scores the images of an epoch.
Legend: g groups, k images per group, n = g·k rows, w steps of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.transitions import Transition, log_prob

from .chains import SDES, Move, Schedule
from .conditioning import Conditioning
from .learner import Learner, Tuning, check_shares
from .network import Model
from .noising import Noising
from .online import (
    MINIBATCHES,
    POPULATION,
    Batch,
    Compared,
    Samples,
    Score,
    Task,
    advantages_of,
    mean,
    only,
)
from .policy_losses import SPREADS, clipped, guarded_log_ratio, policy_loss
from .ranges import FLAG, number, one_of, optional, setting, whole

__all__ = ["Grpo", "GrpoTrainer", "Score", "advantages_of", "check_flow", "mean_log_prob"]

RATIOS = ("density", "error", "guard")
KL_SPACES = ("moves", "outputs")


@dataclass
class Grpo(Tuning):
    """The settings of a run.

    DDPO's importance-weighted form (Black et al. 2023) is window_size = num_inference_steps - 1,
    noise = 1 (ancestral sampling for schedulers with betas), share_start = False and clip = 1e-4.
    Its code normalises by a running mean and deviation of each prompt's last 16 rewards, for
    batches without groups; here rewards are normalised within their group. The last step, which
    draws no noise here, is not trained on.

    sde, ratio: the stochastic steps of a flow (`chains.Schedule`), and what the ratio of policies
    is made of: the densities of the moves; their squared errors alone (Flow-CPS's code leaves out
    1/(2σ²), which for SD3 in ten steps of noise 0.95 grows from 0.60 to 6934); or the densities as
    in GRPO-Guard (`policy_losses.guarded_log_ratio`), with the loss divided by the step in t.
    kl_space: the divergence is that of the moves, or mean|v - v_ref|² of the outputs. The code of
    Flow-GRPO multiplies the divergence of its moves by the step in t.
    """

    steps: int = setting(200, whole(1), "number of epochs (sample, score, update)")
    groups: int = setting(4, whole(1), "prompts per epoch, over all processes")
    k: int = setting(8, whole(2), "images per prompt")
    micro_groups: int = setting(1, whole(1), "groups that a process evaluates at once")
    updates: int = setting(1, whole(1), "optimiser steps on the same samples")
    minibatches: int = setting(1, whole(1), MINIBATCHES)
    num_inference_steps: int = setting(10, whole(1, 10_000), "steps of the sampler")
    window_start: int = setting(0, whole(0), "first stochastic step")
    window_size: int = setting(2, whole(1), "number of stochastic steps, which are trained on")
    window_moves: bool = setting(False, FLAG, "move the window by one step per epoch (MixGRPO)")
    noise: float = setting(
        0.8,
        number(0, ends="(]"),
        "noise of the stochastic steps: DDIM's eta, or the fraction of a flow's noise that is "
        "replaced, both at most 1; with the sde flow or dance, the level of the noise, such as "
        "0.7 or 0.3",
    )
    sde: str = setting(
        "cps",
        one_of(*SDES),
        "stochastic steps of a flow: cps (Flow-CPS, as in steering), flow (Flow-GRPO: noise level "
        "noise*sqrt(t/(1-t))) or dance (DanceGRPO: noise level noise)",
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
    ratio: str = setting(
        "density",
        one_of(*RATIOS),
        "what the ratio of policies is made of: density (of the moves), error (their squared "
        "errors, without 1/(2 sigma^2), as Flow-CPS) or guard (normalised, as GRPO-Guard; flows)",
    )
    advantage_clip: float = setting(5.0, number(0, ends="(]"), "largest absolute advantage")
    spread: str = setting(
        "group",
        one_of(*SPREADS),
        "whose standard deviation divides advantages: group, global (all images) or none",
    )
    population: bool = setting(False, FLAG, POPULATION)
    each_reward: bool = setting(False, FLAG, "normalise each reward separately before adding them")
    kl: float = setting(0.0, number(0), "weight of the divergence from the reference")
    kl_space: str = setting(
        "moves",
        one_of(*KL_SPACES),
        "divergence of the moves (between Gaussians) or of the outputs (mean squared difference)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sde == "cps" and self.noise > 1:
            raise ValueError(f"noise is {self.noise} but must be in (0, 1] where sde is 'cps'")

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


class Proposal(NamedTuple):
    """What a network proposes for a sampled move, and the log-density of the latter, or its error.

    output: of the network, with guidance.
    """

    transition: Transition
    score: Tensor
    output: Tensor


@dataclass(frozen=True)
class Held:
    """What the sampling policy proposed: the score of each row, and for "guard" the means."""

    score: Tensor
    mean: Tensor | None

    def __getitem__(self, rows: Sequence[int]) -> Held:
        return Held(self.score[rows], None if self.mean is None else self.mean[rows])


def check_flow(settings: Grpo, noising: Noising) -> None:
    """Raise ValueError for a setting that is only for flows, if the network is none."""
    for name, value in {"sde": settings.sde, "ratio": settings.ratio}.items():
        if not noising.flow and value in ("flow", "dance", "guard"):
            raise ValueError(
                f"{name} is {value!r}, which is for flows, but this network is trained with betas; "
                f"leave {name} out"
            )


def check_window(settings: Grpo, schedule: Schedule) -> None:
    """Raise ValueError if the first window of this schedule has no moves to learn from."""
    steps = replace(schedule, sde=settings.sde)
    steps.check_window(settings.window(0), settings.noise)


class GrpoTrainer:
    """Trains a network on its own samples, one epoch at a time."""

    def __init__(
        self, network: Any, model: Model, task: Task, settings: Grpo, accelerator: Any
    ) -> None:
        check_flow(settings, task.schedule.noising)
        task = replace(task, schedule=replace(task.schedule, sde=settings.sde))
        check_window(settings, task.schedule)
        check_shares(settings.groups, accelerator.num_processes, True, settings.minibatches)
        self.settings, self.schedule = settings, task.schedule
        self.learner = Learner(network, model, settings, accelerator)
        self.samples = Samples(self.learner, task, settings)

    @property
    def step(self) -> int:
        """The number of epochs so far."""
        return self.learner.step // (self.settings.updates * self.settings.minibatches)

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, including the state of a trained reward."""
        return self.samples.with_score(self.learner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.samples.load_score(state)

    def train_step(self) -> dict[str, float]:
        """Run one epoch: sample, score, and make `updates` optimiser steps on each minibatch."""
        s, epoch = self.settings, self.step
        batches = [self._sampled(epoch, part) for part in self.samples.shares(epoch)]
        compared = self.samples.compared(batches)
        old: list[list[Held]] = []
        if s.updates * s.minibatches > 1:
            with torch.no_grad():
                old = [[self._held(self._density(b.given, m)) for m in b.moves] for b in batches]
        seen: list[dict[str, float]] = []
        for _ in range(s.updates):
            parts = self.samples.minibatches(batches)
            seen = [self._update(batches, compared, old, places) for places in parts]
        return self.samples.told(batches) | mean(seen) | self.samples.observed(batches, epoch)

    def _sampled(self, epoch: int, groups: Sequence[int]) -> Batch:
        """Sample images of some of the epoch's groups, with the moves of its window."""
        s, window = self.settings, self.settings.window(epoch)
        self.schedule.check_window(window, s.noise)
        policy = self.learner.predicts(self.learner.bare)
        return self.samples.batch(policy, epoch, groups, window, s.noise, s.share_start)

    def _density(self, given: Conditioning, move: Move) -> Proposal:
        """Return what the network now proposes, with the log-density of the sampled move."""
        return self._proposal(self.learner.network, given, move)

    def _proposal(self, network: Any, given: Conditioning, move: Move) -> Proposal:
        step = move.step
        at = self.schedule.t[step].to(move.x.device)
        output = self.learner.predicts(network)(move.x, at, given)
        transition = self.schedule.transition(step, output, move.x, self.settings.noise)
        if self.settings.ratio == "error":
            return Proposal(transition, -_distance(transition.mean, move.y), output)
        return Proposal(transition, mean_log_prob(transition, move.y), output)

    def _held(self, proposal: Proposal) -> Held:
        guard = self.settings.ratio == "guard"
        mean = proposal.transition.mean.detach() if guard else None
        return Held(proposal.score.detach(), mean)

    def _update(
        self,
        batches: Sequence[Batch],
        compared: Compared,
        old: Sequence[Sequence[Held]],
        places: Sequence[int],
    ) -> dict[str, float]:
        """Make one optimiser step over the batches at these places and all steps of the window."""
        parts = [
            partial(
                self._kept,
                compared.kept[i][rows],
                batches[i].given[rows],
                move[rows],
                compared.advantages[i][rows],
                old[i][j][rows] if old else None,
            )
            for i, rows in self.samples.rows(compared, places, idle=not self.settings.kl)
            for j, move in enumerate(batches[i].moves)
        ]
        scored = sum(compared.scored[i] for i in places)
        return self.learner.descend(parts, max(1, scored) * len(batches[0].moves))

    def _kept(self, kept: Tensor, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return only(kept, *self._loss(*given))

    def _loss(
        self, given: Conditioning, move: Move, advantages: Tensor, before: Held | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each row (n,), and statistics to log."""
        s = self.settings
        # the reference first, since it may swap the weights that the autograd graph needs unchanged
        ref = self._reference(given, move) if s.kl else None
        proposal = self._density(given, move)
        # the first update is on-policy, so its ratio is exactly 1 despite rounding
        now, old = self._scores(proposal, self._held(proposal) if before is None else before)
        loss = policy_loss(now, old, advantages, clip=s.clip)
        if s.ratio == "guard":
            loss = loss / float(self.schedule.now[move.step] - self.schedule.after[move.step])
        seen = {"clipped": clipped(now, old, clip=s.clip), "ratio": (now - old).exp()}
        if ref is not None:
            seen["kl"] = divergence = self._divergence(proposal, ref)
            loss = loss + s.kl * divergence
        return loss, seen

    def _scores(self, proposal: Proposal, before: Held) -> tuple[Tensor, Tensor]:
        """Return the two terms (n,) whose difference is the logarithm of the ratio."""
        if before.mean is None:
            return proposal.score, before.score
        transition = proposal.transition
        ratio = guarded_log_ratio(
            proposal.score, before.score, transition.mean, before.mean, transition.std
        )
        return ratio, torch.zeros_like(ratio)

    def _reference(self, given: Conditioning, move: Move) -> Proposal:
        """Return what the reference proposes."""
        with torch.no_grad(), self.learner.reference():
            return self._proposal(self.learner.bare, given, move)

    def _divergence(self, proposal: Proposal, ref: Proposal) -> Tensor:
        if self.settings.kl_space == "outputs":
            return _distance(proposal.output, ref.output)
        apart = _distance(proposal.transition.mean, ref.transition.mean)
        return apart / (2 * proposal.transition.std.square())  # between Gaussians


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
