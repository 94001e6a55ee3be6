"""An adapter in training: its weights, their average, the optimiser, the reference, the state.

What every way of training shares. Randomness comes from (seed, step, purpose) alone, so that a run
that is resumed, or split among processes, takes the very same steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import lora, zero
from .models import Family
from .ranges import FLAG, SEED, TEXTS, check, number, setting, whole

__all__ = ["TIMES", "Learner", "Tuning", "check_shares", "draws"]

TIMES = ("logit_normal", "uniform")  # how the noise's share of the way is drawn
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's names


@dataclass
class Tuning:
    """The settings of an adapter and its optimiser."""

    rank: int = setting(16, whole(1), "LoRA rank")
    alpha: int = setting(16, whole(1), "LoRA alpha; the scale of the adapter is alpha/rank")
    targets: list[str] = setting(
        list, TEXTS, "names of the layers to adapt; by default the attention layers"
    )
    lr: float = setting(1e-4, number(0, ends="(]"), "learning rate")
    warmup: int = setting(10, whole(0), "steps over which the learning rate rises")
    weight_decay: float = setting(0.0, number(0), "weight decay of AdamW")
    max_grad_norm: float = setting(
        1.0, number(0, ends="(]"), "gradients that are longer are cut to this norm"
    )
    ema: float = setting(
        0.5,
        number(0, 1, "[)"),
        "highest decay of the average of the weights, which is min((1 + s)/(10 + s), ema) at "
        "update s",
    )
    refresh: int = setting(
        0, whole(0), "steps between moves of the reference to the present weights; 0: never"
    )
    eight_bit: bool = setting(False, FLAG, "AdamW of bitsandbytes, in 8 bits")
    gradient_checkpointing: bool = setting(False, FLAG, "less memory, a third more time")
    compile: bool = setting(False, FLAG, "torch.compile the network")
    seed: int = setting(0, SEED, "seed of everything")

    def __post_init__(self) -> None:
        check(self)


def draws(seed: int, step: int, purpose: str) -> torch.Generator:
    """The generator of one purpose of one step."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Learner:
    """One network with its adapter, and what moves it.

    network is what to call with gradients, bare the module itself. The reference is the network
    without its adapter, unless `start_from` or `settings.refresh` moves it. The adapter, its
    average and the optimiser's state are float32, whatever the network is.
    """

    def __init__(self, network: Any, family: Family, settings: Tuning, accelerator: Any) -> None:
        self.settings, self.family, self.accelerator = settings, family, accelerator
        self.bare, self.step = network, 0
        half = _autocast(network, accelerator)
        targets = settings.targets or family.targets
        generator = draws(settings.seed, 0, "adapter")
        self.weights = lora.attach(network, targets, settings.rank, settings.alpha, generator)
        self.anchor: dict[str, Tensor] | None = None  # the reference's adapter
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if settings.compile:  # in place: the reference and samples take the compiled one, too
            network.compile(dynamic=False)
        optimizer = _optimizer(list(self.weights.values()), settings)
        self.zero = zero.is_on(accelerator)
        if half == torch.float16:
            _scale_gradients(accelerator, self.zero)
        if self.zero:
            count = sum(value.numel() for value in self.weights.values())
            zero.configure(accelerator, settings.max_grad_norm, count, settings.eight_bit)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.weights = lora.parameters(network)  # FSDP puts shares in their place
        if accelerator.is_fsdp2:  # else what the root holds stays whole after a forward
            network.set_reshard_after_forward(True)
        self.average = lora.Average(self.weights, settings.ema)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin at an adapter (`lora.read`) that made the data: it is the reference then."""
        self._fill(weights)
        lora.fill(self.average.weights, weights)
        self.anchor = lora.copy(self.weights)

    def reference(self) -> AbstractContextManager[None]:
        """Within it the bare network is the reference."""
        if self.anchor is None:
            return lora.reference(self.bare)
        return lora.swapped(self.weights, self.anchor)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network carries the average of its adapter."""
        return lora.swapped(self.weights, self.average.weights)

    def descend(
        self, parts: Sequence[Callable[[], tuple[Tensor, dict[str, Tensor]]]], count: int
    ) -> dict[str, float]:
        """One move of the optimiser by the mean of losses, over `count` rows of all processes.

        Each part gives its rows' losses and what to log of them when its turn comes; it is asked
        again where gradients in float16 overflow. FloatingPointError, and no move, where the
        gradient is not finite. Returns the means of what to log, and the gradient's norm.
        """
        world, norm = self.accelerator.num_processes, None
        sums: dict[str, Tensor] = {}
        while norm is None:
            sums.clear()
            for place, part in enumerate(parts):
                with self._accumulating(last=place == len(parts) - 1):
                    loss, seen = self._part(part)
                    # processes' gradients are averaged, so that this is the mean over all rows
                    self.accelerator.backward(loss.sum() * world / count)
                _add(sums, seen if "loss" in seen else seen | {"loss": loss})
            norm = self._update()
        return self.reduced(sums, count) | {"grad_norm": norm}

    def _part(self, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step}: {error}") from None

    def _accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a part of a step.

        Processes wait for one another at the last part alone, so that they may have unequally many.
        """
        if self.zero:  # its engine moves the weights within the last part's backward pass
            self._set_rate()
            self.accelerator.sync_gradients = last
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.network)

    def _update(self) -> float | None:
        """One move of the optimiser by the gradients that were added; their norm.

        None, and no move, where they may be too large for float16 alone.
        """
        s, scaler = self.settings, self.accelerator.scaler
        self._set_rate()
        if scaler is not None and not self.accelerator.native_amp:  # whose own it divides itself
            scaler.unscale_(self.optimizer.optimizer)
        found = self.accelerator.clip_grad_norm_(list(self.weights.values()), s.max_grad_norm)
        norm = float(lora.whole({"norm": found})["norm"])
        if not math.isfinite(norm) and scaler is not None and scaler.get_scale() > 1:
            scaler.update(scaler.get_scale() / 2)
            self.optimizer.zero_grad()
            return None
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {self.step} is not finite: lower the learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.weights)
        self.step += 1
        if s.refresh and self.step % s.refresh == 0:
            self.anchor = lora.copy(self.weights)
        return norm

    def _set_rate(self) -> None:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.step + 1) / max(s.warmup, 1))

    def _fill(self, weights: dict[str, Tensor]) -> None:
        lora.fill(self.weights, weights)
        if self.zero:  # it moves copies, and would write these over the weights
            self.optimizer.optimizer.refresh_fp32_params()

    def reduced(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Sums of this process -> means over `count`, over all processes."""
        values = torch.stack([value.detach().float() for value in sums.values()])
        total = self.accelerator.reduce(values.to(self.accelerator.device))
        return dict(zip(sums, (total / count).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs, on however many processes; all of them have to ask."""
        if self.zero:
            optimizer = zero.state(self.optimizer, list(self.weights.values()), self.accelerator)
        else:
            optimizer = self.optimizer.state_dict()
        scaler = self.accelerator.scaler
        moments = {i: lora.whole(state) for i, state in optimizer["state"].items()}
        return {
            "step": self.step,
            "weights": {name: p.detach().cpu() for name, p in lora.whole(self.weights).items()},
            "anchor": None if self.anchor is None else lora.whole(self.anchor),
            "average": self.average.state_dict(),
            "optimizer": optimizer | {"state": moments},
            "scale": scaler and scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self._fill(state["weights"])
        if state["anchor"] is not None:
            self.anchor = lora.copy(self.weights)
            lora.fill(self.anchor, state["anchor"])
        self.average.load_state_dict(state["average"])
        if self.accelerator.scaler and state.get("scale"):
            self.accelerator.scaler.load_state_dict(state["scale"])
        if self.zero:
            zero.load_state(self.optimizer, state["optimizer"], self.accelerator)
            return
        parts = list(self.weights.values())
        moments = {
            i: {k: lora.like(v, parts[i]) if isinstance(v, Tensor) and v.ndim else v for k, v in m}
            for i, m in ((i, m.items()) for i, m in state["optimizer"]["state"].items())
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def check_shares(groups: int, world: int, equal: bool = False) -> None:
    """ValueError for groups that leave a process without work, or with more than another."""
    if groups < world or (equal and groups % world):
        what = "as many for each" if equal else "at least one for each"
        raise ValueError(f"groups is {groups} but {world} processes need {what}")


def _optimizer(weights: list[Any], settings: Tuning) -> torch.optim.Optimizer:
    lr, decay = settings.lr, settings.weight_decay
    if not settings.eight_bit:
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay, fused=True)
    try:
        import bitsandbytes as bnb  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("eight_bit needs bitsandbytes: pip install bitsandbytes") from error
    return bnb.optim.AdamW8bit(weights, lr=lr, weight_decay=decay)


def _autocast(network: Any, accelerator: Any) -> torch.dtype | None:
    """What calls of the network compute in, where that is half precision: as accelerate was told,
    which sees to it itself, or else as its weights are, by autocast within its forward pass.

    Around the call it would not reach the network: DeepSpeed's engine switches it off. Latents,
    the adapter's weights and all that a loss is made of stay float32.
    """
    if accelerator.mixed_precision != "no":
        return PRECISIONS.get(accelerator.mixed_precision)
    own = next(p.dtype for p in network.parameters() if p.is_floating_point())
    if own not in PRECISIONS.values():
        return None
    network.forward = torch.autocast(accelerator.device.type, own)(network.forward)
    return own


def _scale_gradients(accelerator: Any, zero: bool) -> None:
    """Let losses be scaled before a backward pass in float16, where they would come out as 0."""
    if zero or accelerator.is_fsdp2:
        raise ValueError(
            "float16 needs gradients that are scaled, which is not done with DeepSpeed and FSDP; "
            "take bfloat16"
        )
    if accelerator.scaler is None:  # accelerate has its own where it was told fp16
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)


def _add(sums: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    """Add what was seen, by name, where it is: a look from the CPU would wait for the GPU."""
    for name, value in seen.items():
        total = value.detach().sum()
        sums[name] = sums[name] + total if name in sums else total
