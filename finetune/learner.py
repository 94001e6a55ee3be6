"""An adapter in training: its weights, their average, the optimiser, the reference, the state.

All trainers share it. Random numbers depend on (seed, step, purpose) alone, so a run that is
resumed, or split among processes, takes exactly the same steps.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from . import lora, sharding, zero
from .conditioning import Conditioning
from .network import Model, targets_of
from .ranges import FLAG, SEED, TEXTS, check, number, setting, whole

__all__ = ["TIMES", "Learner", "Tuning", "check_shares", "draws", "in_step"]

TIMES = ("logit_normal", "uniform")  # distributions of t
_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
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
        1.0, number(0, ends="(]"), "maximum norm, to which gradients are clipped"
    )
    ema: float = setting(
        0.5,
        number(0, 1, "[)"),
        "highest decay of the moving average of the weights; at update s the decay is "
        "min((1 + s)/(10 + s), ema)",
    )
    refresh: int = setting(
        0,
        whole(0),
        "optimiser steps between updates of the reference to the present weights; 0: never",
    )
    micro_images: int = setting(
        0,
        whole(0),
        "images that a process evaluates at once, if fewer than those of its groups; 0: all of "
        "them",
    )
    eight_bit: bool = setting(False, FLAG, "use the 8-bit AdamW of bitsandbytes")
    gradient_checkpointing: bool = setting(False, FLAG, "saves memory, takes a third more time")
    compile: bool = setting(False, FLAG, "compile the network with torch.compile")
    seed: int = setting(0, SEED, "seed of all random numbers")

    def __post_init__(self) -> None:
        check(self)


def draws(seed: int, step: int, purpose: str) -> torch.Generator:
    """Return the CPU generator for one purpose of one step."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Learner:
    """A network with its adapter, the adapter's average, and the optimiser.

    `network` is the prepared module to call with gradients, `bare` the module itself. The reference
    is the network without its adapter, unless `start_from` or `settings.refresh` changes it. The
    adapter, its average and the optimiser's state are float32 for any dtype of the network.
    """

    def __init__(self, network: Any, model: Model, settings: Tuning, accelerator: Any) -> None:
        self.settings, self.model, self.accelerator = settings, model, accelerator
        self.bare, self.step = network, 0
        half = _autocast(network, accelerator)
        targets = settings.targets or targets_of(network)
        generator = draws(settings.seed, 0, "adapter")
        self.weights = lora.attach(network, targets, settings.rank, settings.alpha, generator)
        self.anchor: dict[str, Tensor] | None = None  # the reference's adapter
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if settings.compile:  # in place, so that reference and sampling use the compiled network
            network.compile(dynamic=False)
        optimizer = _optimizer(list(self.weights.values()), settings)
        self.zero = zero.is_on(accelerator)
        if half == torch.float16:
            _scale_gradients(accelerator, self.zero)
        if self.zero:
            count = sum(value.numel() for value in self.weights.values())
            zero.configure(accelerator, settings.max_grad_norm, count, settings.eight_bit)
        self.network, self.optimizer = sharding.prepare(accelerator, network, optimizer)
        self.weights = lora.parameters(network)  # FSDP replaces them by shards
        self.average = lora.Average(self.weights, settings.ema)

    def predicts(self, network: Any) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """Return predict(x, t, given), the output of `network` in float32 (`Model.predict`).

        It evaluates no more rows at once than `pieces` has.
        """

        def predict(x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
            found = [
                self.model.predict(network, given[rows], x[rows], t[rows] if t.ndim else t).float()
                for rows in self.pieces(len(x))
            ]
            return found[0] if len(found) == 1 else torch.cat(found)

        return predict

    def pieces(self, count: int) -> list[slice]:
        """Return `count` rows as slices of rows that are evaluated at once (`micro_images`)."""
        most = self.settings.micro_images or max(count, 1)
        return [slice(i, i + most) for i in range(0, count, most)]

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Start from the adapter (`lora.read`) that made the data; it becomes the reference."""
        self._fill(weights)
        lora.fill(self.average.weights, weights)
        self.anchor = lora.copy(self.weights)

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which the bare network is the reference."""
        if self.anchor is None:
            return lora.reference(self.bare)
        return lora.swapped(self.weights, self.anchor)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the average of its adapter."""
        return lora.swapped(self.weights, self.average.weights)

    def descend(
        self, parts: Sequence[Callable[[], tuple[Tensor, dict[str, Tensor]]]], count: int
    ) -> dict[str, float]:
        """Make one optimiser step on the mean loss over `count` rows of all processes.

        Each part is a function that returns its rows' losses and statistics to log; it is called
        again if float16 gradients overflow. Raises FloatingPointError, without a step, if the
        gradient is not finite. Returns the mean of each statistic over the entries of all parts,
        and the gradient's norm. A statistic "loss" replaces the mean loss over `count` rows.
        """
        world, norm = self.accelerator.num_processes, None
        main = self.accelerator.is_main_process
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        while norm is None:
            sums.clear()
            counts.clear()
            for place, part in enumerate(parts):
                with self._accumulating(last=place == len(parts) - 1):
                    loss, seen = self._part(part)
                    # gradients are averaged over processes, so this gives the mean over all rows
                    self.accelerator.backward(loss.sum() * world / count + self._touched())
                counts.update({name: value.numel() for name, value in seen.items()})
                if "loss" not in seen:
                    seen, counts["loss"] = seen | {"loss": loss}, count if main else 0
                _add(sums, seen)
            norm = self._update()
        return self._means(sums, counts) | {"grad_norm": norm}

    def _touched(self) -> Tensor | float:
        """Return 0 as a function of every weight, for DistributedDataParallel.

        It waits for the gradients of all weights, but some networks (Qwen-Image) do not use those
        of the text's queries in their last block.
        """
        if self.accelerator.distributed_type not in _DDP:
            return 0.0
        return 0.0 * torch.stack([weight.sum() for weight in self.weights.values()]).sum()

    def _part(self, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step}: {error}") from None

    def _accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of one part of a step.

        Processes synchronise only at the last part, so their numbers of parts may differ.
        """
        if self.zero:  # its engine updates the weights in the last part's backward pass
            self._set_rate()
            self.accelerator.sync_gradients = last
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.network)

    def _update(self) -> float | None:
        """Make one optimiser step with the accumulated gradients; return their norm.

        Returns None, without a step, if the gradients overflow float16 at the present scale.
        """
        s, scaler = self.settings, self.accelerator.scaler
        self._set_rate()
        if scaler is not None and not self.accelerator.native_amp:  # accelerate unscales its own
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
        if self.zero:  # its optimiser updates copies, with which it would overwrite the weights
            self.optimizer.optimizer.refresh_fp32_params()

    def _means(self, sums: dict[str, Tensor], counts: Counter[str]) -> dict[str, float]:
        """Return sums over counts, each of all processes, by name."""
        found = torch.stack([value.detach().float() for value in sums.values()])
        over = torch.tensor([float(counts[name]) for name in sums])
        both = torch.stack([found.to(self.accelerator.device), over.to(self.accelerator.device)])
        total, entries = self.accelerator.reduce(both)
        return dict(zip(sums, (total / entries.clamp(min=1)).tolist(), strict=True))

    def reduced(self, sums: dict[str, Tensor], count: int) -> dict[str, float]:
        """Return means over `count` from the sums of each process, over all processes."""
        values = torch.stack([value.detach().float() for value in sums.values()])
        total = self.accelerator.reduce(values.to(self.accelerator.device))
        return dict(zip(sums, (total / count).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs, on any number of processes; all must call this."""
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


def in_step(accelerator: Any) -> bool:
    """Return whether all processes must make equal numbers of passes.

    FSDP needs equal numbers of forward passes, ZeRO of backward passes.
    """
    return accelerator.is_fsdp2 or zero.is_on(accelerator)


def check_shares(groups: int, world: int, equal: bool = False, minibatches: int = 1) -> None:
    """Raise ValueError if a process has no groups in a minibatch, or if `equal`, more than another
    process."""
    parts = world * minibatches
    if groups < parts or (equal and groups % parts):
        what = "equal numbers of them" if equal else "at least one each"
        who = f"{world} processes" if minibatches == 1 else f"{minibatches} minibatches"
        who += f" on {world} processes" if minibatches > 1 and world > 1 else ""
        raise ValueError(f"groups is {groups} but {who} need {what}")


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
    """Return the half-precision dtype in which the network computes, or None: accelerate's
    mixed_precision if set, else the weights' dtype, for which this enables autocast in `forward`.

    Autocast around the call would have no effect, since DeepSpeed's engine disables it. Latents,
    the adapter's weights and everything in the loss stay float32.
    """
    if accelerator.mixed_precision != "no":
        return PRECISIONS.get(accelerator.mixed_precision)
    own = next(p.dtype for p in network.parameters() if p.is_floating_point())
    if own not in PRECISIONS.values():
        return None
    network.forward = torch.autocast(accelerator.device.type, own)(network.forward)
    return own


def _scale_gradients(accelerator: Any, zero: bool) -> None:
    """Enable loss scaling for float16, in which small gradients would underflow."""
    if zero or accelerator.is_fsdp2:
        raise ValueError(
            "float16 needs gradient scaling, which is not supported with DeepSpeed and FSDP; "
            "set dtype=bfloat16"
        )
    if accelerator.scaler is None:  # accelerate has one with mixed_precision fp16
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)


def _add(sums: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    """Add statistics by name on their device, without synchronising with the CPU."""
    for name, value in seen.items():
        total = value.detach().sum()
        sums[name] = sums[name] + total if name in sums else total
