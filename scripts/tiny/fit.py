"""One training loop for the embedded models: a budget of minutes, checkpoints, resuming, an EMA."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..parser import parser_of

RUN = Path("runs/tiny")
WARMUP = 100  # steps until the learning rate is reached
EVERY = 100  # steps between checkpoints


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_parser(about: str | None, minutes: float, batch: int) -> argparse.ArgumentParser:
    """The options of the scripts that train for a number of minutes, with their own defaults."""
    made = parser_of(about)
    made.add_argument("--run", type=Path, default=RUN, help="the folder of checkpoints and weights")
    made.add_argument("--minutes", type=float, default=minutes)
    made.add_argument("--batch", type=int, default=batch)
    return made


class _Run:
    """The state of a run: weights, optimisers, averages, generator and progress."""

    def __init__(self, modules: nn.ModuleDict, checkpoint: Path, lr: float) -> None:
        self.modules, self.checkpoint = modules, checkpoint
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.matrices, others = split(modules)
        self.optimizers = _optimizers(self.matrices, others, lr)
        self.ema = {name: value.detach().clone() for name, value in modules.state_dict().items()}
        self.generator = torch.Generator().manual_seed(0)
        self.progress: dict[str, Any] = {"step": 0, "spent": 0.0, "smooth": math.nan}
        if checkpoint.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location=device())
        self.modules.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        self.generator.set_state(state["generator"].cpu())
        self.progress = {name: state[name] for name in self.progress}
        print(f"resumed {self.checkpoint}: {self}", flush=True)

    def __str__(self) -> str:
        """How far the run is."""
        step, spent, smooth = self.progress.values()
        return f"step {step}, {spent / 60:.1f} min, loss {smooth:.4f}"

    def save(self) -> None:
        """Write the checkpoint whole, or leave the earlier one."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"weights": self.modules.state_dict(), "optimizers": states, "ema": self.ema}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | self.progress | {"generator": self.generator.get_state()}, partial)
        partial.replace(self.checkpoint)

    def update(self, loss: Tensor, lr: float, ema_decay: float) -> None:
        """One step of the optimisers and of the averages."""
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for weight, matrix in self.matrices.items():
            matrix.grad = None if weight.grad is None else _flat(weight.grad, weight)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        step = self.progress["step"] = self.progress["step"] + 1
        _average(self.ema, self.modules, min(ema_decay, (1 + step) / (10 + step)))
        before, value = self.progress["smooth"], loss.item()
        self.progress["smooth"] = value if math.isnan(before) else 0.98 * before + 0.02 * value


def fit(
    modules: nn.ModuleDict,
    loss: Callable[[torch.Generator], Tensor],
    run: Path,
    name: str,
    *,
    minutes: float,
    batch: int,
    lr: float,
    ema_decay: float = 0.999,
) -> dict[str, float]:
    """Minimise `loss(generator)` for a budget of minutes; leave the EMA weights in `modules`.

    Muon for the matrices and AdamW for the rest, at one learning rate, which warms up, stays, and
    falls linearly to zero over the last half of the budget (most of the last gains are made during
    the fall). With minutes=0 nothing is trained, and `modules` get the averages of the checkpoint.
    A second call resumes from the checkpoint run/name.pt, a state dict. run/name.json holds what
    this returns: images seen, minutes spent and the last smoothed loss.
    """
    state, budget = _Run(modules, run / f"{name}.pt", lr), minutes * 60
    progress, first = state.progress, state.progress["step"]
    modules.train()
    start = time.monotonic() - progress["spent"]
    while progress["spent"] < budget:
        decay = min(1.0, 2 * (1 - progress["spent"] / budget))
        rate = lr * min(1.0, (progress["step"] + 1) / WARMUP) * decay
        state.update(loss(state.generator), rate, ema_decay)
        progress["spent"] = time.monotonic() - start
        if progress["step"] % EVERY == 0:
            print(f"{state}, lr {rate:.2e}", flush=True)
            state.save()
    if progress["step"] > first:
        state.save()
    modules.load_state_dict(state.ema)
    modules.eval()
    images, spent = progress["step"] * batch, progress["spent"] / 60
    return report(run, name, images=images, minutes=spent, loss=progress["smooth"])


def report(run: Path, name: str, **found: float) -> dict[str, float]:
    """Print what was trained, and write it to run/name.json, which the cards quote."""
    run.mkdir(parents=True, exist_ok=True)
    (run / f"{name}.json").write_text(json.dumps(found))
    print(found)
    return found


def split(modules: nn.Module) -> tuple[dict[nn.Parameter, nn.Parameter], list[nn.Parameter]]:
    """What Muon trains, {weight: the same memory as a matrix (out, in)}, and what AdamW trains.

    Muon (Jordan et al. 2024) is for the inner linear maps and convolutions: not for embeddings,
    gains and biases, nor for the layers that touch latents or pixels.
    """
    matrices, others = {}, []
    for name, weight in modules.named_parameters():
        outer = any(word in name for word in ("embed", "conv_in", "conv_out", "norm_out"))
        if not weight.requires_grad:
            continue
        if weight.ndim in (2, 4) and not outer and min(weight.shape[:2]) > 8:
            matrices[weight] = nn.Parameter(_flat(weight.detach(), weight))
        else:
            others.append(weight)
    return matrices, others


def _optimizers(
    matrices: dict[nn.Parameter, nn.Parameter], others: list[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon where there are matrices, whose updates are scaled to the size of AdamW's."""
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01)
    if not matrices:
        return [adamw]
    settings: Any = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    return [adamw, torch.optim.Muon(matrices.values(), lr, **settings)]


def _flat(value: Tensor, weight: Tensor) -> Tensor:
    """A weight (out, in, h, w), or its gradient, as a matrix with columns in the weight's order.

    The matrix of the weight itself is a view, also if its channels come last.
    """
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        value = value.permute(0, 2, 3, 1)
    return value.reshape(len(weight), -1)


@torch.no_grad()
def _average(ema: dict[str, Tensor], modules: nn.Module, decay: float) -> None:
    for name, value in modules.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)
