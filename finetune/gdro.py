"""Offline group-level direct reward optimisation: rollouts with rewards -> a LoRA.

Every step draws its prompts, images, noise and time from (seed, step) alone, so a run that is
resumed, or split among processes, takes the very same steps. Neither decoder nor text encoder is
needed: latents and conditioning come from the rollouts.
Legend: g groups, k images a group, n = g·k rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import lora
from .data import Data
from .groups import draw_groups, target_entropy
from .losses import best_image_loss, gdro_loss, implicit_scores
from .models import Family, Noising, predict

__all__ = ["Gdro", "Trainer", "load_state", "save_state"]


@dataclass
class Gdro:
    """The settings of a training run; scripts/train_gdro.py explains each."""

    steps: int = 200
    groups: int = 8
    k: int = 6
    micro_groups: int = 2
    beta: float = 12.0
    temperature: float = 0.05
    form: str = "full"
    hold_best: float = 1.0  # γ
    weight: str = "constant"
    times: str = "logit_normal"
    shift: float = 1.0
    shared_noise: bool = True
    reward: str = "reward"
    reward_norm: str = "none"
    rank: int = 16
    alpha: int = 16
    targets: list[str] = dataclasses.field(default_factory=list)
    lr: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema: float = 0.5
    refresh: int = 0
    eight_bit: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "groups",
            "micro_groups",
            "beta",
            "temperature",
            "shift",
            "rank",
            "alpha",
            "lr",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be positive")
        if self.refresh < 0:
            raise ValueError(f"refresh is {self.refresh} but must not be negative")
        if self.k < 2:
            raise ValueError(f"k is {self.k} but a group needs 2 images or more")
        if self.weight not in ("constant", "elbo"):
            raise ValueError(f"weight is {self.weight!r} but must be 'constant' or 'elbo'")
        if self.times not in ("logit_normal", "uniform"):
            raise ValueError(f"times is {self.times!r} but must be 'logit_normal' or 'uniform'")


def draws(settings: Gdro, step: int, purpose: str) -> torch.Generator:
    """The generator of one purpose of one step."""
    digest = hashlib.sha256(f"{settings.seed} {step} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Trainer:
    """One network, its adapter and optimiser, and the step that improves it.

    The reference is the network without its adapter, unless `start_from` or `refresh` moves it.
    """

    def __init__(
        self,
        network: Any,
        family: Family,
        noising: Noising,
        data: Data,
        settings: Gdro,
        accelerator: Any,
    ) -> None:
        self.settings, self.family, self.noising, self.data = settings, family, noising, data
        self.accelerator, self.bare, self.step = accelerator, network, 0
        targets = settings.targets or family.targets
        generator = draws(settings, 0, "adapter")
        self.weights = lora.attach(network, targets, settings.rank, settings.alpha, generator)
        self.anchor: dict[str, Tensor] | None = None  # the reference's adapter
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.average = lora.Average(self.weights, settings.ema)
        optimizer = _optimizer(list(self.weights.values()), settings)
        model = torch.compile(network) if settings.compile else network
        self.network, self.optimizer = accelerator.prepare(model, optimizer)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin at an adapter (`lora.read`) that made the rollouts: it is the reference then."""
        lora.fill(self.weights, weights)
        lora.fill(self.average.weights, weights)
        self.anchor = lora.copy(self.weights)

    def train_step(self) -> dict[str, float]:
        """One update; what it saw, averaged over all groups of all processes."""
        s, world = self.settings, self.accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.step + 1) / max(s.warmup, 1))
        batch = list(self._micro_batches(self.step))
        sums: dict[str, Tensor] = {}
        for i, micro in enumerate(batch):
            last = i == len(batch) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss, seen = self._losses(*micro)
                # processes' gradients are averaged, so that this is the mean over all groups
                self.accelerator.backward(loss.sum() * world / s.groups)
            for name, value in seen.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().sum().cpu()
        norm = self.accelerator.clip_grad_norm_(list(self.weights.values()), s.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient of step {self.step} is not finite: lower the learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.weights)
        self.step += 1
        if s.refresh and self.step % s.refresh == 0:
            self.anchor = lora.copy(self.weights)
        total = self.accelerator.reduce(
            torch.stack(list(sums.values())).to(self.accelerator.device)
        )
        return dict(zip(sums, (total / s.groups).tolist(), strict=True)) | {
            "grad_norm": float(norm)
        }

    def _reference(self) -> AbstractContextManager[None]:
        if self.anchor is None:
            return lora.reference(self.bare)
        return lora.swapped(self.weights, self.anchor)

    def _micro_batches(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's share of the step's groups: (prompts, rows, rewards, t, noise, tie)."""
        s, rank, world = (
            self.settings,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        generator = draws(s, step, "batch")
        prompts, rows, rewards = draw_groups(self.data.groups, s.groups, s.k, generator)
        t = torch.rand(s.groups, generator=generator)
        if s.times == "logit_normal":  # Esser et al. 2024, eq. 19, m = 0, s = 1
            t = torch.randn(s.groups, generator=generator).sigmoid()
        t = s.shift * t / (1 + (s.shift - 1) * t)  # Esser et al. 2024, eq. 23
        t = t.clamp(1e-3, 1 - 1e-3)
        each = 1 if s.shared_noise else s.k
        noise = torch.randn(s.groups, each, *self.data.latents.shape[1:], generator=generator)
        ties = torch.randint(2**62, (s.groups,), generator=generator)
        mine = torch.arange(rank, s.groups, world)
        for part in mine.split(s.micro_groups):
            yield prompts[part], rows[part], rewards[part], t[part], noise[part], ties[part]

    def _losses(
        self, prompts: Tensor, rows: Tensor, rewards: Tensor, t: Tensor, noise: Tensor, ties: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each group (g,), and what to log of it."""
        s, device = self.settings, self.accelerator.device
        g, k = rows.shape
        x0 = self.data.latents[rows].to(device).float()
        noise = noise.to(device).expand_as(x0).flatten(0, 1)
        times = t.to(device).repeat_interleave(k)
        x, target = self.noising.noised(x0.flatten(0, 1), noise, times)
        given = {
            name: value[prompts].repeat_interleave(k, 0).to(device)
            for name, value in self.data.given.items()
        }
        with torch.no_grad(), self._reference(), self.accelerator.autocast():
            ref = predict(self.bare, self.family, self.noising, x, times, given)
        with self.accelerator.autocast():
            pred = predict(self.network, self.family, self.noising, x, times, given)
        pred, ref, target = (y.float().unflatten(0, (g, k)) for y in (pred, ref, target))
        weight, beta = None, s.beta
        if s.weight == "elbo":
            weight = self.noising.elbo_weight(t.to(device))[:, None]
        scores = implicit_scores(pred, ref, target, beta=beta, weight=weight)
        rewards = rewards.to(device)
        tie = [torch.Generator().manual_seed(int(seed)) for seed in ties]
        ranked = torch.cat(
            [
                gdro_loss(
                    scores[i : i + 1],
                    rewards[i : i + 1],
                    temperature=s.temperature,
                    form=s.form,
                    generator=tie[i],
                )
                for i in range(g)
            ]
        )
        held = torch.cat(
            [
                best_image_loss(pred[i : i + 1], target[i : i + 1], rewards[i : i + 1], tie[i])
                for i in range(g)
            ]
        )
        return ranked + s.hold_best * held, {
            "loss": ranked,
            "best_image": held,
            **_watched(scores, rewards, pred, ref, target, s.temperature),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs."""
        return {
            "step": self.step,
            "weights": {name: p.detach().cpu() for name, p in self.weights.items()},
            "anchor": self.anchor,
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        lora.fill(self.weights, state["weights"])
        if state["anchor"] is not None:
            self.anchor = lora.copy(self.weights)
            lora.fill(self.anchor, state["anchor"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def _watched(
    scores: Tensor, rewards: Tensor, pred: Tensor, ref: Tensor, target: Tensor, temperature: float
) -> dict[str, Tensor]:
    """What tells a healthy run, by group (g,).

    accuracy: the share of pairs, of different rewards, that implicit scores order alike; spread:
    the scores' standard deviation; entropy: of the target over log k; drift: by how much the error
    on the best image grew.
    """
    better = rewards[:, :, None] > rewards[:, None, :]
    agree = (scores[:, :, None] > scores[:, None, :]) & better
    best = rewards.argmax(1)
    at = torch.arange(len(best), device=best.device)

    def error(x: Tensor) -> Tensor:
        return (x[at, best] - target[at, best]).square().flatten(1).mean(1)

    return {
        "accuracy": agree.sum((1, 2)) / better.sum((1, 2)).clamp(min=1),
        "spread": scores.std(1),
        "entropy": target_entropy(rewards, temperature),
        "drift": error(pred) - error(ref),
    }


def _optimizer(weights: list[Any], settings: Gdro) -> torch.optim.Optimizer:
    if not settings.eight_bit:
        return torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    try:
        import bitsandbytes as bnb  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("eight_bit needs bitsandbytes: pip install bitsandbytes") from error
    return bnb.optim.AdamW8bit(weights, lr=settings.lr, weight_decay=settings.weight_decay)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Write the state whole or not at all, so that a full disk leaves the last good one."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".state.new"
    try:
        torch.save(trainer.state_dict(), scratch)
        scratch.replace(folder / "state.pt")
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        scratch.unlink(missing_ok=True)
        raise ValueError(
            f"the state of step {trainer.step} cannot be written to {folder} ({error}); the one "
            "written before it is kept"
        ) from error


def load_state(trainer: Trainer, folder: Path) -> bool:
    """Carry on from a state if there is one; read without unpickling."""
    file = folder / "state.pt"
    if not file.exists():
        return False
    trainer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return True
