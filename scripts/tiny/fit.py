"""One training loop for the embedded models: a budget of minutes, checkpoints, resuming, an EMA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    modules: nn.ModuleDict,
    loss: Callable[[torch.Generator], Tensor],
    checkpoint: Path,
    *,
    minutes: float,
    batch: int,
    lr: float,
    seed: int = 0,
    ema_decay: float = 0.999,
    warmup: int = 100,
    every: int = 100,
) -> dict[str, float]:
    """Minimise `loss(generator)` for a budget of minutes; leave the EMA weights in `modules`.

    Muon for the matrices and AdamW for the rest, at one learning rate, which warms up, stays, and
    falls linearly to zero over the last half of the budget (the fall is where most of the last
    gains are made). With minutes=0 nothing is trained and the checkpoint's averages are handed
    over as they are.
    Returns images seen, minutes spent and the last smoothed loss. Writes `checkpoint` (a
    state dict, read back with weights_only) every `every` steps and resumes from it.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    matrices, others = split(modules)
    optimizers = _optimizers(matrices, others, lr)
    ema = {name: value.detach().clone() for name, value in modules.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    step, spent, smooth = 0, 0.0, float("nan")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device())
        modules.load_state_dict(state["weights"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema, step, spent, smooth = state["ema"], state["step"], state["spent"], state["smooth"]
        generator.set_state(state["generator"].cpu())
        print(f"resumed {checkpoint} at step {step}, {spent / 60:.1f} min", flush=True)

    def save() -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        state = {"weights": modules.state_dict(), "optimizers": states, "ema": ema}
        numbers = {"step": step, "spent": spent, "smooth": smooth}
        _write(checkpoint, state | numbers | {"generator": generator.get_state()})

    modules.train()
    start, first = time.monotonic() - spent, step
    began = spent
    while spent < minutes * 60:
        rate = lr * min(1.0, (step + 1) / warmup) * _decay(spent / (minutes * 60))
        value = loss(generator)
        modules.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for weight, matrix in matrices.items():
            matrix.grad = None if weight.grad is None else _flat(weight.grad, weight)
        _step(optimizers, rate)
        step += 1
        _average(ema, modules, min(ema_decay, (1 + step) / (10 + step)))
        spent = time.monotonic() - start
        smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
        if step % every == 0:
            print(
                f"step {step} loss {smooth:.4f} lr {rate:.2e} {spent / 60:.1f} min"
                f" {(step - first) * batch / (spent - began):.0f} images/s",
                flush=True,
            )
            save()
    if step > first:
        save()
    modules.load_state_dict(ema)
    modules.eval()
    return {"images": step * batch, "minutes": spent / 60, "loss": smooth}


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


def _step(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


def _flat(value: Tensor, weight: Tensor) -> Tensor:
    """A weight (out, in, h, w), or its gradient, as a matrix with columns in the weight's order.

    Of the weight itself it is a view, whether its channels come last or not.
    """
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        value = value.permute(0, 2, 3, 1)
    return value.reshape(len(weight), -1)


def _write(file: Path, state: dict) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _decay(share: float) -> float:
    return min(1.0, max(0.0, 2 * (1 - share)))


@torch.no_grad()
def _average(ema: dict[str, Tensor], modules: nn.Module, decay: float) -> None:
    for name, value in modules.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)
