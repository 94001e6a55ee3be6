"""One online epoch: sample images, score them, compute advantages.

What GrpoTrainer and NftTrainer share. Every epoch draws prompts and noise from (seed, epoch, group)
alone, so a run that is resumed, or split among processes, samples the same images.
Legend: g groups, k images a group, n = g·k rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .chains import Move, Policy, Schedule, sample
from .groups import MOST_DROPPED
from .learner import Learner, draws
from .losses import group_advantages
from .models import Conditioning

__all__ = [
    "Batch",
    "Compared",
    "Samples",
    "Score",
    "Settings",
    "Task",
    "advantages_of",
    "only",
]

DECODED = 8  # latents at once

# images (n, 3, h, w) and prompts -> the total (n,) and its components by name
Score = Callable[[Tensor, list[str]], tuple[Tensor, dict[str, Tensor]]]


class Settings(Protocol):
    """What of a run's settings says how its images are made and compared."""

    seed: int
    groups: int
    k: int
    micro_groups: int
    advantage_clip: float
    spread: str
    each_reward: bool
    kl: float
    guidance_scale: float | None


def advantages_of(
    total: Tensor,
    components: dict[str, Tensor],
    weights: dict[str, float],
    s: Settings,
    kept: Tensor | None = None,
) -> Tensor:
    """Advantages (g, k), clipped: of the total or, with `each_reward`, Σ weight · the component's.

    Normalising each reward before adding them keeps one of a wide range from drowning the others.
    kept: as in `group_advantages`. A component of weight 0 is not looked at.
    """
    if not s.each_reward:
        found = group_advantages(total, spread=s.spread, kept=kept)
    else:
        parts = [
            w * group_advantages(components[name], spread=s.spread, kept=kept)
            for name, w in weights.items()
            if w
        ]
        found = torch.stack(parts).sum(0)
    return found.clamp(-s.advantage_clip, s.advantage_clip)


class Compared(NamedTuple):
    """An epoch's images beside those of their groups.

    advantages, kept: (g, k) of each batch, 0 and False where an image has no score; scored: how
    many have one, of all processes.
    """

    advantages: list[Tensor]
    kept: list[Tensor]
    scored: int


def only(kept: Tensor, loss: Tensor, seen: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of rows (n,), and what to log of it, with 0 for the rows that have no score."""
    rows = ~kept.flatten()
    return loss.masked_fill(rows, 0), {n: x.masked_fill(rows, 0) for n, x in seen.items()}


@dataclass(frozen=True)
class Batch:
    """Images of some of an epoch's groups: rows (n, ...), rewards and components (g, k).

    images (n, 3, h, w): on the CPU, as an epoch has many.
    """

    groups: Sequence[int]
    given: Conditioning
    latents: Tensor
    moves: list[Move]
    images: Tensor
    prompts: list[str]
    rewards: Tensor
    components: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a run samples for, and what scores it.

    prompts and given: what is trained on, and its conditioning, a row each; decode: latents to
    images in [0, 1]; score: the reward, which may learn too: where it has `observe(images, prompts,
    epoch)`, that is called with what was sampled, and its state is kept. weights: of components,
    for `each_reward`; empty: the negative prompt's conditioning, for guidance.
    """

    schedule: Schedule
    prompts: Sequence[str]
    given: Conditioning
    decode: Callable[[Tensor], Tensor]
    score: Score
    weights: dict[str, float] = field(default_factory=dict)
    empty: Conditioning | None = None


class Samples:
    """The samples of a run's epochs.

    ValueError for a guidance_scale below 1, unless it is an input of the network.
    """

    def __init__(self, learner: Learner, task: Task, settings: Settings) -> None:
        scale = settings.guidance_scale
        if scale is not None and scale < 1 and "guidance" not in task.given:
            raise ValueError(
                f"guidance_scale is {scale}, but pipelines take any below 1 for none, as 1 is; set "
                "1, or more"
            )
        self.learner, self.task, self.settings = learner, task, settings
        self.schedule, self.score = task.schedule, cast(Any, task.score)
        self.drawn = self.dropped = 0  # images of all epochs, and those of them without a score

    @property
    def learns(self) -> bool:
        """Whether the score does."""
        return hasattr(self.score, "observe")

    def with_score(self, state: dict[str, Any]) -> dict[str, Any]:
        """A trainer's state, how many images had no score, and the state of a learning reward."""
        state = state | {"drawn": self.drawn, "dropped": self.dropped}
        return state | {"score": self.score.state_dict()} if self.learns else state

    def load_score(self, state: dict[str, Any]) -> None:
        self.drawn, self.dropped = int(state["drawn"]), int(state["dropped"])
        if self.learns:
            self.score.load_state_dict(state["score"])

    def shares(self) -> list[list[int]]:
        """This process's groups, those that are evaluated at once together."""
        s, accelerator = self.settings, self.learner.accelerator
        mine = list(range(accelerator.process_index, s.groups, accelerator.num_processes))
        return [mine[i : i + s.micro_groups] for i in range(0, len(mine), s.micro_groups)]

    def batch(
        self,
        policy: Policy,
        epoch: int,
        groups: Sequence[int],
        window: range,
        noise: float,
        share_start: bool,
    ) -> Batch:
        """Images of some of the epoch's groups, with the noisy moves of the window."""
        k, chosen = self.settings.k, self._chosen(epoch)
        drawn = [
            self._drawn(policy, epoch, i, chosen[i], window, noise, share_start) for i in groups
        ]
        prompts = [self.task.prompts[chosen[i]] for i in groups for _ in range(k)]
        latents = torch.cat([rows for rows, _ in drawn])
        images = torch.cat([self.task.decode(x).clamp(0, 1) for x in latents.split(DECODED)])
        with torch.no_grad():
            total, components = self.score(images, prompts)
        moves = [
            Move(step[0].step, *(torch.cat([getattr(m, end) for m in step]) for end in "xy"))
            for step in zip(*(taken for _, taken in drawn), strict=True)
        ]
        grouped = {name: values.view(-1, k) for name, values in components.items()}
        given = self._given([chosen[i] for i in groups])
        rewards = total.view(-1, k)
        return Batch(groups, given, latents, moves, images.cpu(), prompts, rewards, grouped)

    def _chosen(self, epoch: int) -> list[int]:
        """The prompt of each of the epoch's groups, none twice as long as they last."""
        s, order = self.settings, []
        while len(order) < s.groups:
            generator = draws(s.seed, epoch, f"prompts {len(order) // len(self.task.prompts)}")
            order += torch.randperm(len(self.task.prompts), generator=generator).tolist()
        return order[: s.groups]

    def _drawn(
        self,
        policy: Policy,
        epoch: int,
        group: int,
        prompt: int,
        window: range,
        noise: float,
        share_start: bool,
    ) -> tuple[Tensor, list[Move]]:
        """Latents (k, *shape) and the noisy moves of one group."""
        s, shape = self.settings, self.schedule.shape
        device = self.learner.accelerator.device
        generator = draws(s.seed, epoch, f"group {group}")
        start = torch.randn(1 if share_start else s.k, *shape, generator=generator)
        drawn = torch.randn(len(window), s.k, *shape, generator=generator).to(device)
        given = self._given([prompt])
        return sample(policy, self.schedule, start.to(device), given, window, noise, drawn)

    def _given(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of k images of each of these prompts."""
        k, device = self.settings.k, self.learner.accelerator.device
        return {
            name: value[list(rows)].repeat_interleave(k, 0).to(device)
            for name, value in self.task.given.items()
        }

    def compared(self, batches: Sequence[Batch]) -> Compared:
        """The advantages; a global spread is over all processes.

        An image whose reward is not finite is left out of its group. FloatingPointError, in all
        processes, where that were more than MOST_DROPPED of the run's images, and more than one.
        """
        accelerator, sizes = self.learner.accelerator, [len(b.rewards) for b in batches]
        gather, first = accelerator.gather, accelerator.process_index * sum(sizes)
        total = gather(torch.cat([b.rewards for b in batches]))
        scored = total.isfinite()
        missing = total.numel() - int(scored.sum())
        self.drawn, self.dropped = self.drawn + total.numel(), self.dropped + missing
        if missing and self.dropped > max(1, MOST_DROPPED * self.drawn):
            self._refuse(scored, gather_object([p for b in batches for p in b.prompts]))
        parts = {
            name: gather(torch.cat([b.components[name] for b in batches]))
            for name in batches[0].components
        }
        kept = scored if missing else None
        found = advantages_of(total, parts, self.task.weights, self.settings, kept)
        own = slice(first, first + sum(sizes))
        split = list(found[own].split(sizes)), list(scored[own].split(sizes))
        return Compared(*split, total.numel() - missing)

    def _refuse(self, scored: Tensor, prompts: Sequence[str]) -> None:
        bad = (~scored.flatten()).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{self.dropped} of {self.drawn} images have no finite reward, as one of "
            f"{prompts[bad[0]]!r}: more than {MOST_DROPPED:.0%}; take a reward that has an answer, "
            "or leave out the prompts that it cannot judge"
        )

    def told(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Means over the images of all processes that have a score; how many have none."""
        values = {"reward": [b.rewards for b in batches]}
        for name in batches[0].components:
            values[name] = [b.components[name] for b in batches]
        values["spread"] = [_spread(b.rewards) for b in batches]
        values["flat_groups"] = [(spread == 0).float() for spread in values["spread"]]
        sums: dict[str, Tensor] = {}
        for name, parts in values.items():
            every = torch.cat([part.flatten() for part in parts])
            there = every.isfinite()
            sums |= {name: every.masked_fill(~there, 0).sum(), f"{name} count": there.sum()}
        found = self.learner.reduced(sums, 1)
        means = {n: found[n] / c if (c := found[f"{n} count"]) else math.nan for n in values}
        images = self.settings.groups * self.settings.k
        return means | {"dropped": images - found["reward count"]}

    def observed(self, batches: Sequence[Batch], epoch: int) -> dict[str, float]:
        """What a learning reward says, having seen the images."""
        if not self.learns:
            return {}
        images = torch.cat([batch.images for batch in batches])
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        return self.score.observe(images, prompts, epoch)


def _spread(rewards: Tensor) -> Tensor:
    """The standard deviation in each group (g,), of the images that have a score."""
    found = rewards.std(1)
    for i in (~rewards.isfinite()).any(1).nonzero().flatten().tolist():
        own = rewards[i][rewards[i].isfinite()]
        found[i] = own.std() if len(own) > 1 else 0.0
    return found
