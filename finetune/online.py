"""One online epoch: sample images, score them, compute advantages.

Shared by GrpoTrainer and NftTrainer. Prompts and noise depend on (seed, epoch, group) alone, so a
run that is resumed, or split among processes, samples the same images.
Legend: g groups, k images per group, n = g·k rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .buckets import dealt
from .chains import Move, Schedule, sample
from .conditioning import Conditioning, Form
from .groups import MOST_DROPPED
from .learner import Learner, draws, in_step
from .policy_losses import group_advantages

__all__ = [
    "Batch",
    "Compared",
    "Samples",
    "Score",
    "Settings",
    "Task",
    "advantages_of",
    "check_guidance",
    "mean",
    "only",
]

DECODED = 8  # latents that are decoded at once
MINIBATCHES = (
    "disjoint parts of an epoch's groups, each with optimiser steps of its own, `updates` of them"
)
POPULATION = (  # the help of a setting of all methods
    "divide advantages by the population's standard deviation, as the code of Flow-GRPO, "
    "DiffusionNFT and AWM does, instead of the sample's"
)

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]  # x (n, ...), t (), given -> output
# images (n, 3, h, w) and prompts -> the total (n,) and its components by name
Score = Callable[[Tensor, list[str]], tuple[Tensor, dict[str, Tensor]]]


class Settings(Protocol):
    """The settings that `Samples` uses."""

    seed: int
    groups: int
    k: int
    minibatches: int
    micro_groups: int
    micro_images: int
    compile: bool
    advantage_clip: float
    spread: str
    population: bool
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
    """Return clipped advantages (g, k): of the total, or a sum over the rewards (`each_reward`).

    With `each_reward` each component is normalised, weighted and added, so that no component
    dominates by its range. kept: as in `group_advantages`. Components of weight 0 are ignored.
    """
    of = partial(group_advantages, spread=s.spread, kept=kept, population=s.population)
    if not s.each_reward:
        found = of(total)
    else:
        found = torch.stack([w * of(components[name]) for name, w in weights.items() if w]).sum(0)
    return found.clamp(-s.advantage_clip, s.advantage_clip)


class Compared(NamedTuple):
    """The advantages of an epoch's images.

    advantages: (n,) for each batch, 0 for images without a score; kept: on the CPU, which have one;
    scored: the number that have one in the batches of all processes at this place.
    """

    advantages: list[Tensor]
    kept: list[Tensor]
    scored: list[int]


def only(kept: Tensor, loss: Tensor, seen: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss of rows (n,), 0 for those without a score, and the statistics of the others.

    kept (n,): which have a score, on the CPU.
    """
    if kept.all():
        return loss, seen
    return loss.masked_fill(~kept.to(loss.device), 0), {n: x[kept] for n, x in seen.items()}


@dataclass(frozen=True)
class Batch:
    """Images of some of an epoch's groups: rows (n, ...), rewards and components (g, k).

    given, plain: the conditioning with which they were sampled, and the same without guidance.
    images (n, 3, h, w): on the CPU, to save GPU memory.
    """

    groups: Sequence[int]
    given: Conditioning
    plain: Conditioning
    latents: Tensor
    moves: list[Move]
    images: Tensor
    prompts: list[str]
    rewards: Tensor
    components: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """The prompts and the reward of an online run.

    prompts, given: the training prompts and their conditioning, one row each; decode: maps latents
    to images in [0, 1]; score: the reward. A reward that is trained as well has `observe(images,
    prompts, epoch)`, which is called with each epoch's samples, and its state is saved. weights: of
    components, for `each_reward`; plain: the conditioning without guidance, if `given` has it.
    """

    schedule: Schedule
    prompts: Sequence[str]
    given: Conditioning
    decode: Callable[[Tensor], Tensor]
    score: Score
    weights: dict[str, float] = field(default_factory=dict)
    plain: Conditioning | None = None


def check_guidance(scale: float | None, form: Form) -> None:
    """Raise ValueError for a scale below 1, unless it is an input of the network."""
    if scale is not None and scale < 1 and not form.embedded:
        raise ValueError(
            f"guidance_scale is {scale}, but pipelines treat values below 1 as no guidance, "
            "like 1; set 1 or more"
        )


class Samples:
    """Samples and scores the images of a run's epochs.

    Raises ValueError for a guidance_scale below 1, unless it is an input of the network.
    """

    def __init__(self, learner: Learner, task: Task, settings: Settings) -> None:
        check_guidance(settings.guidance_scale, task.given.form)
        self.learner, self.task, self.settings = learner, task, settings
        self.schedule, self.score = task.schedule, cast(Any, task.score)
        self.drawn = self.dropped = 0  # images of all epochs, and how many of them have no score

    @property
    def learns(self) -> bool:
        """Whether the reward is trained as well."""
        return hasattr(self.score, "observe")

    def with_score(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add the counts of images and the state of a trained reward to a trainer's state."""
        state = state | {"drawn": self.drawn, "dropped": self.dropped}
        return state | {"score": self.score.state_dict()} if self.learns else state

    def load_score(self, state: dict[str, Any]) -> None:
        self.drawn, self.dropped = int(state["drawn"]), int(state["dropped"])
        if self.learns:
            self.score.load_state_dict(state["score"])

    def shares(self, epoch: int) -> list[list[int]]:
        """Return this process's groups of an epoch, in lists that are evaluated at once.

        The lists of a minibatch are neighbours. Those of all processes have equal sizes, and the
        groups of a list are of one kind (`finetune.buckets`), so that each is one pass.
        """
        s, accelerator = self.settings, self.learner.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        kinds = [
            tuple(source[[i]].kind() for source in (self.task.given, self.task.plain) if source)
            for i in self._chosen(epoch)
        ]
        size = s.groups // s.minibatches
        return [
            [first + i for i in part]
            for first in range(0, s.groups, size)
            for part in dealt(kinds[first : first + size], rank, world, s.micro_groups)
        ]

    def minibatches(self, batches: Sequence[Batch]) -> list[list[int]]:
        """Return the places of each minibatch's batches."""
        s, size = self.settings, self.settings.groups // self.settings.minibatches
        of = [batch.groups[0] // size for batch in batches]
        return [[i for i, part in enumerate(of) if part == one] for one in range(s.minibatches)]

    def rows(
        self, compared: Compared, places: Sequence[int], idle: bool
    ) -> list[tuple[int, list[int]]]:
        """Return (place, rows of the batch) for all that is evaluated at once in these batches.

        idle: whether groups whose advantages are all 0 add nothing to the gradient. These are left
        out, unless all processes must make equal numbers of passes. What is compiled would be
        compiled anew for fewer groups, so that whole batches are left out there. Some rows remain,
        since processes exchange gradients after their last pass.
        """
        s, k = self.settings, self.settings.k
        skips = idle and not in_step(self.learner.accelerator)
        found, every = [], []
        for place in places:
            advantages = compared.advantages[place].view(-1, k)
            live = (advantages != 0).any(1).cpu()
            live = live.any().expand_as(live) if s.compile else live
            rows = torch.arange(advantages.numel()).view(-1, k)
            for chosen, into in ((rows, every), (rows[live], found)):
                flat = chosen.flatten().tolist()
                into += [(place, flat[piece]) for piece in self.learner.pieces(len(flat))]
        return (found or every[:1]) if skips else every

    def batch(
        self,
        policy: Predict,
        epoch: int,
        groups: Sequence[int],
        window: range,
        noise: float,
        share_start: bool,
    ) -> Batch:
        """Sample and score images of some of the epoch's groups, with the window's moves."""
        k, chosen = self.settings.k, self._chosen(epoch)
        drawn = [
            self._drawn(policy, epoch, i, chosen[i], window, noise, share_start) for i in groups
        ]
        prompts = [self.task.prompts[chosen[i]] for i in groups for _ in range(k)]
        latents = torch.cat([rows for rows, _ in drawn])
        at_once = min(DECODED, self.settings.micro_images or DECODED)
        images = torch.cat([self.task.decode(x).clamp(0, 1) for x in latents.split(at_once)])
        with torch.no_grad():
            total, components = self.score(images, prompts)
        moves = [
            Move(step[0].step, *(torch.cat([getattr(m, end) for m in step]) for end in "xy"))
            for step in zip(*(taken for _, taken in drawn), strict=True)
        ]
        grouped = {name: values.view(-1, k) for name, values in components.items()}
        rows = [chosen[i] for i in groups]
        given, plain = self._given(rows), self._given(rows, self.task.plain)
        rewards = total.view(-1, k)
        return Batch(groups, given, plain, latents, moves, images.cpu(), prompts, rewards, grouped)

    def _chosen(self, epoch: int) -> list[int]:
        """Return the prompt index of each group; prompts repeat only after all were drawn."""
        s, order = self.settings, []
        while len(order) < s.groups:
            generator = draws(s.seed, epoch, f"prompts {len(order) // len(self.task.prompts)}")
            order += torch.randperm(len(self.task.prompts), generator=generator).tolist()
        return order[: s.groups]

    def _drawn(
        self,
        policy: Predict,
        epoch: int,
        group: int,
        prompt: int,
        window: range,
        noise: float,
        share_start: bool,
    ) -> tuple[Tensor, list[Move]]:
        """Sample the latents (k, *shape) and the window's moves of one group."""
        s, shape = self.settings, self.schedule.shape
        device = self.learner.accelerator.device
        generator = draws(s.seed, epoch, f"group {group}")
        start = torch.randn(1 if share_start else s.k, *shape, generator=generator)
        drawn = torch.randn(len(window), s.k, *shape, generator=generator).to(device)
        given = self._given([prompt])
        return sample(policy, self.schedule, start.to(device), given, window, noise, drawn)

    def _given(self, rows: Sequence[int], source: Conditioning | None = None) -> Conditioning:
        """Return `source`, or the task's conditioning, for k images of each of these prompts."""
        k, device = self.settings.k, self.learner.accelerator.device
        return (source or self.task.given)[rows].to(device).repeated(k)

    def compared(self, batches: Sequence[Batch]) -> Compared:
        """Return the advantages; a global spread is taken over all processes.

        Images whose reward is not finite are left out of their group. Raises FloatingPointError, in
        all processes, if these are more than one and more than MOST_DROPPED of the run's images.
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
        parts = (x[own].split(sizes) for x in (found, scored.cpu()))
        advantages, kept = ([x.flatten() for x in part] for part in parts)
        places = scored.cpu().view(accelerator.num_processes, sum(sizes), -1).sum((0, 2))
        return Compared(advantages, kept, [int(x.sum()) for x in places.split(sizes)])

    def _refuse(self, scored: Tensor, prompts: Sequence[str]) -> None:
        bad = (~scored.flatten()).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{self.dropped} of {self.drawn} images have no finite reward, such as one of "
            f"{prompts[bad[0]]!r}: more than {MOST_DROPPED:.0%}; use a reward that can score them, "
            "or leave out the prompts that it cannot judge"
        )

    def told(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Return means over the scored images of all processes, and the number without a score."""
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
        """Show the images to a trained reward, and return its statistics."""
        if not self.learns:
            return {}
        images = torch.cat([batch.images for batch in batches])
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        return self.score.observe(images, prompts, epoch)


def _spread(rewards: Tensor) -> Tensor:
    """Return the standard deviation of each group's scored images, (g,)."""
    found = rewards.std(1).masked_fill((rewards == rewards[:, :1]).all(1), 0.0)
    for i in (~rewards.isfinite()).any(1).nonzero().flatten().tolist():
        own = rewards[i][rewards[i].isfinite()]
        found[i] = own.std() if len(own.unique()) > 1 else 0.0
    return found


def mean(seen: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each statistic of an epoch's last steps, one for each minibatch."""
    return {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]}
