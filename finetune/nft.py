"""DiffusionNFT: learn from one's own samples by regression, without log-probabilities.

Zheng et al. 2025. Images are sampled without noise from the old policy, a slow copy of the trained
one; then their noised latents pull the prediction towards the good ones and away from the bad.
There is no ratio, and so nothing that depends on how a batch was split or rounded.
Legend: g groups, k images a group, n = g·k rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import lora
from .chains import Policy
from .learner import TIMES, Learner, Tuning, check_shares, draws
from .losses import SPREADS, nft_loss
from .models import Conditioning, Family, predict
from .online import Batch, Samples, Task, only
from .ranges import FLAG, number, one_of, optional, setting, whole

__all__ = ["Nft", "NftTrainer", "draw_times"]


@dataclass
class Nft(Tuning):
    """The settings of a run.

    beta: how far the implicit policies lie from the old one; noisings: of each image in an update,
    each at its own time; old_decay: the highest decay of the old policy, which is min(epoch / 1000,
    old_decay) as in the paper; guidance_scale: of sampling alone, the prediction that is trained is
    the conditional one; kl: weight of mean|v - v_ref|², 1e-4 in the paper's code. That code writes
    the loss with x0, each half over its own mean error; here it is the paper's eq. 5.
    """

    steps: int = setting(200, whole(1), "epochs: sample, score, update")
    groups: int = setting(4, whole(1), "prompts of an epoch, over all processes")
    k: int = setting(8, whole(2), "images of a prompt")
    micro_groups: int = setting(1, whole(1), "groups that a process evaluates at once")
    updates: int = setting(1, whole(1), "moves of the optimiser on the same samples")
    noisings: int = setting(
        2, whole(1), "noised copies of an image in an update, each at a time of its own"
    )
    num_inference_steps: int = setting(10, whole(1, 10_000), "steps of the sampler")
    guidance_scale: float | None = setting(
        None,
        optional(number(0)),
        "guidance of sampling; what is trained is the conditional prediction; by default none, "
        "or what the pipeline tells a distilled network",
    )
    beta: float = setting(
        1.0,
        number(0, ends="(]"),
        "how far the good and the bad policy lie from the one that sampled",
    )
    advantage_clip: float = setting(5.0, number(0, ends="(]"), "advantages are cut to this range")
    spread: str = setting(
        "global",
        one_of(*SPREADS),
        "what advantages are divided by: the deviation of the group, global, or none",
    )
    each_reward: bool = setting(False, FLAG, "normalise each reward by itself before adding them")
    old_decay: float = setting(
        0.5,
        number(0, 1, "[)"),
        "the one that samples is an average of those before; its highest decay",
    )
    times: str = setting("logit_normal", one_of(*TIMES), "logit_normal or uniform")
    shift: float = setting(
        1.0,
        number(0, ends="(]"),
        "shift of the times: above 1 they lean towards noise, where the content is settled",
    )
    kl: float = setting(0.0, number(0), "weight of the divergence from the reference")


def draw_times(count: int, kind: str, shift: float, generator: torch.Generator) -> Tensor:
    """t (count,) in (0, 1): "uniform" or "logit_normal", shifted (Esser et al. 2024, eqs. 19, 23).

    A shift above 1 moves them towards noise.
    """
    normal = kind == "logit_normal"
    t = (torch.randn if normal else torch.rand)(count, generator=generator)
    t = t.sigmoid() if normal else t
    return (shift * t / (1 + (shift - 1) * t)).clamp(1e-3, 1 - 1e-3)


def slowly(step: int) -> float:
    """The paper's bound on the old policy's decay at its `step`-th move: step / 1000."""
    return step / 1000


class NftTrainer:
    """A network that learns from the samples of its slow copy, an epoch at a time."""

    def __init__(
        self, network: Any, family: Family, task: Task, settings: Nft, accelerator: Any
    ) -> None:
        check_shares(settings.groups, accelerator.num_processes, equal=True)
        self.settings, self.noising, self.empty = settings, task.schedule.noising, task.empty
        self.learner = Learner(network, family, settings, accelerator)
        self.old = lora.Average(self.learner.weights, settings.old_decay, slowly)
        self.samples = Samples(self.learner, task, settings)

    @property
    def step(self) -> int:
        """How many epochs there have been."""
        return self.learner.step // self.settings.updates

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs, the old policy and a learning reward included."""
        return self.samples.with_score(self.learner.state_dict() | {"old": self.old.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self.old.load_state_dict(state["old"])
        self.samples.load_score(state)

    def train_step(self) -> dict[str, float]:
        """One epoch: sample from the old policy, score, and `updates` moves of the optimiser."""
        s, epoch = self.settings, self.step
        if epoch == 0:  # it may begin at a LoRA that was read since this was made
            lora.fill(self.old.weights, self.learner.weights)
        batches = [self._sampled(epoch, part) for part in self.samples.shares()]
        compared = self.samples.compared(batches)
        good = [a.flatten() / s.advantage_clip / 2 + 0.5 for a in compared.advantages]
        seen: dict[str, float] = {}
        for turn in range(s.updates):
            parts = [
                partial(self._kept, compared.kept[i], batch, good[i], epoch, f"noise {turn} {j}")
                for i, batch in enumerate(batches)
                for j in range(s.noisings)
            ]
            seen = self.learner.descend(parts, max(1, compared.scored) * s.noisings)
        self.old.update(self.learner.weights)
        return self.samples.told(batches) | seen | self.samples.observed(batches, epoch)

    def _sampled(self, epoch: int, groups: Sequence[int]) -> Batch:
        """Images of some of the epoch's groups, by the old policy and without noise."""
        learner, scale = self.learner, self.settings.guidance_scale
        scale = 1.0 if scale is None else scale
        policy = Policy(learner.bare, learner.family, self.noising, scale, self.empty)
        with lora.swapped(learner.weights, self.old.weights):
            return self.samples.batch(policy, epoch, groups, range(0), 0.0, share_start=False)

    def _kept(self, kept: Tensor, *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return only(kept, *self._loss(*given))

    def _loss(
        self, batch: Batch, good: Tensor, epoch: int, purpose: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row (n,), and what to log of it."""
        s, learner = self.settings, self.learner
        x, t, target = self._noised(batch, epoch, purpose)
        # the others' first: they change the weights, which a graph for gradients must keep
        with torch.no_grad(), lora.swapped(learner.weights, self.old.weights):
            old = self._predicted(learner.bare, x, t, batch.given)
        ref = None
        if s.kl:
            with torch.no_grad(), learner.reference():
                ref = self._predicted(learner.bare, x, t, batch.given)
        pred = self._predicted(learner.network, x, t, batch.given)
        loss = nft_loss(pred, old, target, good, beta=s.beta)
        seen = {"moved": _distance(pred, old)}
        if ref is not None:
            seen["kl"] = divergence = _distance(pred, ref)
            loss = loss + s.kl * divergence
        return loss, seen

    def _noised(self, batch: Batch, epoch: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, target) of a batch's rows, whose noise and times come from their group."""
        s, times, noise = self.settings, [], []
        for group in batch.groups:
            generator = draws(s.seed, epoch, f"{purpose} {group}")
            times.append(draw_times(s.k, s.times, s.shift, generator))
            noise.append(torch.randn(s.k, *batch.latents.shape[1:], generator=generator))
        x0 = batch.latents.float()
        t = torch.cat(times).to(x0.device)
        x, target = self.noising.noised(x0, torch.cat(noise).to(x0), t)
        return x, t, target

    def _predicted(self, network: Any, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        return predict(network, self.learner.family, self.noising, x, t, given).float()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
