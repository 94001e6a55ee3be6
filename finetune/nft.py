"""DiffusionNFT (Zheng et al. 2025): online training by regression, without log-probabilities.

Images are sampled deterministically from the old policy, a slow average of the trained one. A
regression on their noised latents then moves the prediction towards good images and away from bad
ones. No probability ratio is used, so the loss is not sensitive to rounding or batch splits.
The trainer takes the loss from its settings, and so trains `awm.Awm` as well.
Legend: g groups, k images per group, n = g·k rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lora
from .conditioning import Conditioning
from .learner import TIMES, Learner, Tuning, check_shares, draws
from .network import Model
from .noising import Noising
from .online import MINIBATCHES, POPULATION, Batch, Compared, Samples, Task, mean, only
from .policy_losses import SPREADS, nft_loss
from .ranges import FLAG, number, one_of, optional, setting, whole

__all__ = ["Nft", "NftTrainer", "Regression", "Rows", "draw_times"]

Index = Sequence[int] | slice
ALL = slice(None)


class Rows(NamedTuple):
    """Noised images at t (n,), and the predictions, in float32, of the trained and the old policy.

    pred, old, target: (n, *shape); advantages: (n,), clipped.
    """

    t: Tensor
    pred: Tensor
    old: Tensor
    target: Tensor
    advantages: Tensor


@dataclass
class Regression(Tuning):
    """The settings of a run that all methods of regression have; each has a `loss`.

    noisings: noised copies of each image per update, each at its own time; old_decay: highest decay
    of the old policy, whose decay is min(epoch / 1000, old_decay) as in the papers; guidance_scale:
    applies only to sampling, since the conditional prediction is trained; kl: weight of
    mean|v - v_ref|², 1e-4 in DiffusionNFT's code.
    """

    steps: int = setting(200, whole(1), "number of epochs (sample, score, update)")
    groups: int = setting(4, whole(1), "prompts per epoch, over all processes")
    k: int = setting(8, whole(2), "images per prompt")
    micro_groups: int = setting(1, whole(1), "groups that a process evaluates at once")
    updates: int = setting(1, whole(1), "optimiser steps on the same samples")
    minibatches: int = setting(1, whole(1), MINIBATCHES)
    noisings: int = setting(
        2, whole(1), "noised copies of each image per update, each at its own time"
    )
    num_inference_steps: int = setting(10, whole(1, 10_000), "steps of the sampler")
    guidance_scale: float | None = setting(
        None,
        optional(number(0)),
        "guidance scale in sampling; the conditional prediction is trained; by default none, or "
        "the pipeline's default for a guidance-distilled network",
    )
    advantage_clip: float = setting(5.0, number(0, ends="(]"), "largest absolute advantage")
    spread: str = setting(
        "global",
        one_of(*SPREADS),
        "whose standard deviation divides advantages: group, global (all images) or none",
    )
    population: bool = setting(False, FLAG, POPULATION)
    each_reward: bool = setting(False, FLAG, "normalise each reward separately before adding them")
    old_decay: float = setting(
        0.5,
        number(0, 1, "[)"),
        "highest decay of the averaged weights that draw the samples (the old policy)",
    )
    times: str = setting("logit_normal", one_of(*TIMES), "distribution of the training times")
    shift: float = setting(
        1.0,
        number(0, ends="(]"),
        "shift of the times; above 1 favours high noise levels, where the content is decided",
    )
    kl: float = setting(0.0, number(0), "weight of the divergence from the reference")

    # not settings of all methods: see `awm.Awm`
    on_policy = False
    old_kl = 0.0

    @property
    def in_epoch(self) -> int:
        """The number of optimiser steps in an epoch."""
        return self.updates * self.minibatches

    @property
    def idle(self) -> bool:
        """Whether groups whose advantages are all 0 add nothing to the gradient.

        NFT pulls the predictions of such groups towards those of the old policy.
        """
        return False

    def loss(self, noising: Noising, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each row (n,) without the divergence, and statistics to log."""
        raise NotImplementedError


@dataclass
class Nft(Regression):
    """The settings of a run of DiffusionNFT.

    beta: distance of the implicit policies from the old one. The loss is the paper's eq. 5; with
    `adaptive` it is that of the paper's code, of x0, each half divided by its mean absolute error
    and by β, times advantage_clip.
    """

    beta: float = setting(
        1.0,
        number(0, ends="(]"),
        "how many times as far from the old policy as the trained one the implicit policies are",
    )
    adaptive: bool = setting(
        False,
        FLAG,
        "divide each half of the loss by its own mean error in x0, as the published code does",
    )

    def loss(self, noising: Noising, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        good = rows.advantages / self.advantage_clip / 2 + 0.5
        scale = noising.x0_error(rows.t) if self.adaptive else None
        loss = nft_loss(rows.pred, rows.old, rows.target, good, beta=self.beta, x0_error=scale)
        return loss * self.advantage_clip if self.adaptive else loss, {}


def draw_times(count: int, kind: str, shift: float, generator: torch.Generator) -> Tensor:
    """Draw t (count,) in (0, 1), "uniform" or "logit_normal" (Esser et al. 2024, eqs. 19, 23).

    A shift above 1 moves them towards noise.
    """
    normal = kind == "logit_normal"
    t = (torch.randn if normal else torch.rand)(count, generator=generator)
    t = t.sigmoid() if normal else t
    return (shift * t / (1 + (shift - 1) * t)).clamp(1e-3, 1 - 1e-3)


def slowly(step: int) -> float:
    """Return the paper's bound on the old policy's decay at update `step`: step / 1000."""
    return step / 1000


class NftTrainer:
    """Trains a network by regression on samples of its slow average, one epoch at a time."""

    def __init__(
        self, network: Any, model: Model, task: Task, settings: Regression, accelerator: Any
    ) -> None:
        check_shares(settings.groups, accelerator.num_processes, True, settings.minibatches)
        self.settings, self.noising = settings, task.schedule.noising
        self.learner = Learner(network, model, settings, accelerator)
        self.old = lora.Average(self.learner.weights, settings.old_decay, slowly)
        self.sampler = self.old.weights  # those that draw the epoch's samples
        self.samples = Samples(self.learner, task, settings)

    @property
    def step(self) -> int:
        """The number of epochs so far."""
        return self.learner.step // self.settings.in_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, including the old policy and a trained reward."""
        return self.samples.with_score(self.learner.state_dict() | {"old": self.old.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.old.load_state_dict(state["old"])
        self.samples.load_score(state)

    def train_step(self) -> dict[str, float]:
        """Run one epoch: sample, score, and make `updates` optimiser steps on each minibatch."""
        s, epoch = self.settings, self.step
        if epoch == 0:  # a LoRA may have been loaded after __init__
            lora.fill(self.old.weights, self.learner.weights)
        if s.on_policy:
            self.sampler = lora.copy(self.learner.weights)
        batches = [self._sampled(epoch, part) for part in self.samples.shares(epoch)]
        compared = self.samples.compared(batches)
        seen: list[dict[str, float]] = []
        for turn in range(s.updates):
            parts = self.samples.minibatches(batches)
            seen = [self._update(batches, compared, epoch, turn, places) for places in parts]
        self.old.update(self.learner.weights)
        return self.samples.told(batches) | mean(seen) | self.samples.observed(batches, epoch)

    def _update(
        self,
        batches: Sequence[Batch],
        compared: Compared,
        epoch: int,
        turn: int,
        places: Sequence[int],
    ) -> dict[str, float]:
        """Make one optimiser step over the batches at these places."""
        s = self.settings
        parts = [
            partial(
                self._kept,
                compared.kept[i][rows],
                batches[i],
                compared.advantages[i][rows],
                epoch,
                f"noise {turn} {j}",
                rows,
            )
            for i, rows in self.samples.rows(compared, places, s.idle)
            for j in range(s.noisings)
        ]
        scored = sum(compared.scored[i] for i in places)
        return self.learner.descend(parts, max(1, scored) * s.noisings)

    def _sampled(self, epoch: int, groups: Sequence[int]) -> Batch:
        """Sample images of some of the epoch's groups, deterministically."""
        learner = self.learner
        policy = learner.predicts(learner.bare)
        with lora.swapped(learner.weights, self.sampler):
            return self.samples.batch(policy, epoch, groups, range(0), 0.0, share_start=False)

    def _kept(self, kept: Tensor, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return only(kept, *self._loss(*given))

    def _loss(
        self, batch: Batch, advantages: Tensor, epoch: int, purpose: str, rows: Index = ALL
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of some of the rows, (n,), and statistics to log."""
        s, learner = self.settings, self.learner
        x, t, target = (value[rows] for value in self._noised(batch, epoch, purpose))
        plain = batch.plain[rows]
        # these first, since they swap the weights that the autograd graph needs unchanged
        fixed = partial(self._fixed, x, t, plain)
        own = s.on_policy and s.in_epoch == 1  # the present weights drew the samples
        old = None if own else fixed(lora.swapped(learner.weights, self.sampler))
        ref = fixed(learner.reference()) if s.kl else None
        slow = None
        if s.old_kl:
            averaged = lora.swapped(learner.weights, self.old.weights)
            slow = fixed(averaged) if s.on_policy else old
        pred = learner.predicts(learner.network)(x, t, plain)
        old = pred.detach() if old is None else old
        loss, seen = s.loss(self.noising, Rows(t, pred, old, target, advantages))
        seen["moved"] = _distance(pred, old)
        for name, weight, other in (("kl", s.kl, ref), ("old_kl", s.old_kl, slow)):
            if other is not None:
                seen[name] = divergence = _distance(pred, other)
                loss = loss + weight * divergence
        return loss, seen

    def _fixed(
        self, x: Tensor, t: Tensor, given: Conditioning, weights: AbstractContextManager[None]
    ) -> Tensor:
        """Return the prediction with other weights, without gradients."""
        with torch.no_grad(), weights:
            return self.learner.predicts(self.learner.bare)(x, t, given)

    def _noised(self, batch: Batch, epoch: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x_t, t, target) of a batch's rows; noise and times depend on their groups."""
        s, times, noise = self.settings, [], []
        for group in batch.groups:
            generator = draws(s.seed, epoch, f"{purpose} {group}")
            times.append(draw_times(s.k, s.times, s.shift, generator))
            noise.append(torch.randn(s.k, *batch.latents.shape[1:], generator=generator))
        x0 = batch.latents.float()
        t = torch.cat(times).to(x0.device)
        x, target = self.noising.noised(x0, torch.cat(noise).to(x0), t)
        return x, t, target


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
