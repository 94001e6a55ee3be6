"""Policy gradients for diffusion: sample groups, score them, move towards their better halves.

GRPO on the moves of a stochastic window (Flow-GRPO, Liu et al. 2025; the window as MixGRPO). Every
epoch draws prompts and noise from (seed, epoch, group) alone, so a run that is resumed, or split
among processes, samples the same images.
Legend: g groups, k images a group, n = g·k rows, w steps of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.transitions import Transition, log_prob

from .chains import Move, Policy, Schedule, sample
from .learner import Learner, Tuning, check_shares, draws
from .losses import clipped, group_advantages, policy_loss
from .models import Conditioning, Family

__all__ = ["Grpo", "Score", "Trainer", "advantages_of", "mean_log_prob"]

# images (n, 3, h, w) and prompts -> the total (n,) and its components by name
Score = Callable[[Tensor, list[str]], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Grpo(Tuning):
    """The settings of a run; scripts/train_adversarial.py explains each."""

    steps: int = 200
    groups: int = 4
    k: int = 8
    micro_groups: int = 1
    updates: int = 1
    num_inference_steps: int = 10
    window_start: int = 0
    window_size: int = 2
    window_moves: bool = False
    noise: float = 0.8
    share_start: bool = True
    guidance_scale: float = 1.0
    clip: float = 1e-4
    advantage_clip: float = 5.0
    spread: str = "group"
    each_reward: bool = False
    kl: float = 0.0

    def __post_init__(self) -> None:
        self.check_positive("steps", "groups", "micro_groups", "updates", "clip", "advantage_clip")
        if self.k < 2:
            raise ValueError(
                f"k is {self.k}; a group of one image has no advantage, give 2 or more"
            )
        if self.kl < 0:
            raise ValueError(f"kl is {self.kl} but must not be negative")
        if self.spread not in ("group", "global", "none"):
            raise ValueError(f"spread is {self.spread!r}; take 'group', 'global' or 'none'")

    def window(self, epoch: int) -> range:
        """The stochastic steps of an epoch; a moving window slides on by one step an epoch."""
        first = self.window_start
        if self.window_moves:
            first += epoch % max(1, self.num_inference_steps - self.window_size - first)
        return range(first, first + self.window_size)


def mean_log_prob(transition: Transition, x: Tensor) -> Tensor:
    """log N(x; mean, std² I) over the number of x's elements, (n,) from x (n, *shape).

    The mean, so that a clip of the ratio means the same at every resolution (Flow-GRPO's choice).
    """
    raised = Transition(transition.mean[:, None], transition.std, transition.x0[:, None])
    return log_prob(raised, x[:, None])[:, 0] / x[0].numel()


def advantages_of(
    total: Tensor, components: dict[str, Tensor], weights: dict[str, float], s: Grpo
) -> Tensor:
    """Advantages (g, k), clipped: of the total or, with `each_reward`, Σ weight · the component's.

    Normalising each reward before adding them keeps one of a wide range from drowning the others.
    """
    if not s.each_reward:
        found = group_advantages(total, spread=s.spread)
    else:
        parts = [
            w * group_advantages(components[name], spread=s.spread) for name, w in weights.items()
        ]
        found = torch.stack(parts).sum(0)
    return found.clamp(-s.advantage_clip, s.advantage_clip)


@dataclass(frozen=True)
class Batch:
    """One epoch's images of this process, group by group: (g, k, ...)."""

    given: Conditioning
    moves: list[Move]
    images: Tensor
    prompts: list[str]
    rewards: Tensor
    components: dict[str, Tensor]


class Trainer:
    """A network that learns from its own samples, an epoch at a time.

    prompts and given: what is trained on, and its conditioning, a row each; decode: latents to
    images in [0, 1]; score: the reward, which may learn too: where it has `observe(images, prompts,
    epoch)`, that is called with what was sampled, and its state is kept. weights: of components,
    for `each_reward`; empty: the negative prompt's conditioning, for guidance.
    """

    def __init__(
        self,
        network: Any,
        family: Family,
        schedule: Schedule,
        prompts: Sequence[str],
        given: Conditioning,
        decode: Callable[[Tensor], Tensor],
        score: Score,
        settings: Grpo,
        accelerator: Any,
        weights: dict[str, float] | None = None,
        empty: Conditioning | None = None,
    ) -> None:
        schedule.check_window(settings.window(0), settings.noise)
        check_shares(settings.groups, accelerator.num_processes, equal=True)
        self.settings, self.schedule = settings, schedule
        self.prompts, self.given, self.empty = list(prompts), given, empty
        self.decode, self.weights = decode, weights or {}
        self.score: Any = score
        self.learner = Learner(network, family, settings, accelerator)

    @property
    def step(self) -> int:
        """How many epochs there have been."""
        return self.learner.step // self.settings.updates

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs, that of a learning reward included."""
        state = self.learner.state_dict()
        return state | {"score": self.score.state_dict()} if self._learns else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        if self._learns:
            self.score.load_state_dict(state["score"])

    @property
    def _learns(self) -> bool:
        return hasattr(self.score, "observe")

    def train_step(self) -> dict[str, float]:
        """One epoch: sample, score, and `updates` moves of the optimiser."""
        s, epoch = self.settings, self.step
        mine = list(range(self.learner.accelerator.process_index, s.groups, self._world))
        batches = [self._sampled(epoch, part) for part in _split(mine, s.micro_groups)]
        advantages = self._advantages(batches)
        old: list[list[Tensor]] = []
        if s.updates > 1:
            with torch.no_grad():
                old = [[self._density(b, m)[1] for m in b.moves] for b in batches]
        seen: dict[str, float] = {}
        for _ in range(s.updates):
            seen = self._update(batches, advantages, old)
        told = self._told(batches) | seen
        if self._learns:
            images = torch.cat([batch.images for batch in batches])
            prompts = [prompt for batch in batches for prompt in batch.prompts]
            told |= self.score.observe(images, prompts, epoch)
        return told

    @property
    def _world(self) -> int:
        return self.learner.accelerator.num_processes

    def _policy(self, network: Any) -> Policy:
        family, s = self.learner.family, self.settings
        return Policy(network, family, self.schedule.noising, s.guidance_scale, self.empty)

    def _sampled(self, epoch: int, groups: Sequence[int]) -> Batch:
        """Images of some of the epoch's groups."""
        s, chosen = self.settings, self._chosen(epoch)
        drawn = [self._drawn(epoch, i, chosen[i]) for i in groups]
        prompts = [self.prompts[chosen[i]] for i in groups for _ in range(s.k)]
        images = self.decode(torch.cat([latents for latents, _ in drawn])).clamp(0, 1)
        with torch.no_grad():
            total, components = self.score(images, prompts)
        _check_finite(total, prompts)
        moves = [
            Move(step[0].step, *(torch.cat([getattr(m, end) for m in step]) for end in "xy"))
            for step in zip(*(taken for _, taken in drawn), strict=True)
        ]
        grouped = {name: values.view(-1, s.k) for name, values in components.items()}
        given = self._given([chosen[i] for i in groups], s.k)
        return Batch(given, moves, images, prompts, total.view(-1, s.k), grouped)

    def _chosen(self, epoch: int) -> list[int]:
        """The prompt of each of the epoch's groups, none twice as long as they last."""
        s, order = self.settings, []
        while len(order) < s.groups:
            generator = draws(s.seed, epoch, f"prompts {len(order) // len(self.prompts)}")
            order += torch.randperm(len(self.prompts), generator=generator).tolist()
        return order[: s.groups]

    def _drawn(self, epoch: int, group: int, prompt: int) -> tuple[Tensor, list[Move]]:
        """Latents (k, *shape) and the noisy moves of one group."""
        s, device = self.settings, self.learner.accelerator.device
        window, shape = s.window(epoch), self.schedule.shape
        self.schedule.check_window(window, s.noise)
        generator = draws(s.seed, epoch, f"group {group}")
        start = torch.randn(1 if s.share_start else s.k, *shape, generator=generator)
        noise = torch.randn(len(window), s.k, *shape, generator=generator)
        with self.learner.accelerator.autocast():
            return sample(
                self._policy(self.learner.bare),
                self.schedule,
                start.to(device),
                self._given([prompt], s.k),
                window,
                s.noise,
                noise.to(device),
            )

    def _given(self, rows: Sequence[int], k: int) -> Conditioning:
        device = self.learner.accelerator.device
        return {
            name: value[list(rows)].repeat_interleave(k, 0).to(device)
            for name, value in self.given.items()
        }

    def _advantages(self, batches: Sequence[Batch]) -> list[Tensor]:
        """(g, k) of each batch; a global spread is over all processes."""
        accelerator, sizes = self.learner.accelerator, [len(b.rewards) for b in batches]
        gather, first = accelerator.gather, accelerator.process_index * sum(sizes)
        total = gather(torch.cat([b.rewards for b in batches]))
        parts = {
            name: gather(torch.cat([b.components[name] for b in batches]))
            for name in batches[0].components
        }
        found = advantages_of(total, parts, self.weights, self.settings)
        return list(found[first : first + sum(sizes)].split(sizes))

    def _density(self, batch: Batch, move: Move) -> tuple[Transition, Tensor]:
        """The move that the network would make now, and the log-density of the one it made."""
        step = move.step
        with self.learner.accelerator.autocast():
            output = self._policy(self.learner.network)(
                move.x, self.schedule.t[step].to(move.x.device), batch.given
            )
        transition = self.schedule.transition(step, output, move.x, self.settings.noise)
        return transition, mean_log_prob(transition, move.y)

    def _update(
        self,
        batches: Sequence[Batch],
        advantages: Sequence[Tensor],
        old: Sequence[Sequence[Tensor]],
    ) -> dict[str, float]:
        """One move of the optimiser over all groups and all steps of the window."""
        s, sums = self.settings, {}
        work = [(i, j) for i, b in enumerate(batches) for j in range(len(b.moves))]
        count = s.groups * s.k * len(batches[0].moves)
        for number, (i, j) in enumerate(work):
            with self.learner.accumulating(last=number == len(work) - 1):
                before = old[i][j] if old else None
                loss, seen = self._loss(batches[i], batches[i].moves[j], advantages[i], before)
                self.learner.accelerator.backward(loss.sum() * self._world / count)
            for name, value in (seen | {"loss": loss}).items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().sum().cpu()
        norm = self.learner.update()
        return self.learner.reduced(sums, count) | {"grad_norm": norm}

    def _loss(
        self, batch: Batch, move: Move, advantages: Tensor, before: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row (n,), and what to log of it."""
        s = self.settings
        transition, now = self._density(batch, move)
        # the first update is on the policy that sampled: its ratio is 1, whatever is rounded
        before = now.detach() if before is None else before
        loss = policy_loss(now, before, advantages.flatten(), clip=s.clip)
        seen = {"clipped": clipped(now, before, clip=s.clip), "ratio": (now - before).exp()}
        if s.kl:
            seen["kl"] = divergence = self._divergence(batch, move, transition)
            loss = loss + s.kl * divergence
        return loss, seen

    def _divergence(self, batch: Batch, move: Move, own: Transition) -> Tensor:
        """KL of a move to the reference's, mean|μ - μ_ref|² / (2 σ²), (n,)."""
        with torch.no_grad(), self.learner.reference(), self.learner.accelerator.autocast():
            output = self._policy(self.learner.bare)(
                move.x, self.schedule.t[move.step].to(move.x.device), batch.given
            )
        ref = self.schedule.transition(move.step, output, move.x, self.settings.noise)
        return (own.mean - ref.mean).square().flatten(1).mean(1) / (2 * own.std.square())

    def _told(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Means over all images of all processes."""
        s = self.settings
        sums = {"reward": torch.stack([b.rewards.sum() for b in batches]).sum()}
        for name in batches[0].components:
            sums[name] = torch.stack([b.components[name].sum() for b in batches]).sum()
        spread = torch.cat([b.rewards.std(1) for b in batches])
        sums["spread"] = s.k * spread.sum()
        sums["flat_groups"] = s.k * (spread == 0).float().sum()
        return self.learner.reduced(sums, s.groups * s.k)


def _split(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _check_finite(rewards: Tensor, prompts: Sequence[str]) -> None:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{len(bad)} of {len(rewards)} rewards are not finite, as that of an image of "
            f"{prompts[bad[0]]!r}"
        )
