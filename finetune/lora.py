"""LoRA on one network: attach, switch off for the reference, average, save where diffusers loads.

Hu et al. 2021. The adapter's name is "default", its weights are float32 whatever the network is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "Average",
    "attach",
    "copy",
    "fill",
    "like",
    "parameters",
    "read",
    "reference",
    "save",
    "swapped",
    "whole",
]

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def attach(
    network: Any, targets: Sequence[str], rank: int, alpha: int, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """Add an untouched adapter (B = 0) to the layers whose names end in `targets`.

    Everything else is frozen. A is Kaiming-uniform as peft makes it, from `generator`. Returns the
    trainable parameters by name. ValueError where no layer matches, with names that would.
    """
    from peft import LoraConfig

    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not any(name == t or name.endswith(f".{t}") for name in linear for t in targets):
        ends = sorted({re.sub(r"^.*\.(?=[a-z]\w*(\.\d+)?$)", "", name) for name in linear})
        raise ValueError(
            f"no layer of {type(network).__name__} is called {list(targets)}; its linear layers "
            f"end in {ends[:12]}"
        )
    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    )
    found = parameters(network)
    for name, parameter in found.items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            bound = (1 / parameter[0].numel()) ** 0.5  # kaiming_uniform_(a=√5)
            draws = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.data.copy_((2 * draws - 1) * bound)
    return found


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: p for name, p in network.named_parameters() if ".lora_" in name}


@contextmanager
def reference(network: nn.Module) -> Iterator[None]:
    """Within it the network is the one that the adapter was attached to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in network.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
        for name in layer.adapter_layer_names:
            # peft freezes adapters that are off, and FSDP would keep the first gathered parameters
            # frozen
            getattr(layer, name).requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def warm_up(step: int) -> float:
    """The usual bound on an average's decay at its `step`-th move, from 1: (1 + s) / (10 + s)."""
    return (1 + step) / (10 + step)


class Average:
    """An exponential moving average of the adapter, decay min(decay, bound(step)).

    A state says which bound it was made with, by its name: another law would be another average.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        decay: float,
        bound: Callable[[int], float] = warm_up,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the average's decay is {decay} but must be in [0, 1)")
        self.decay, self.bound, self.step = decay, bound, 0
        self.weights = copy(weights)

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter]) -> None:
        """Move towards the present weights."""
        self.step += 1
        decay = min(self.decay, self.bound(self.step))
        present = [weights[name].detach() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), present, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        law = self.bound.__name__
        return {"step": self.step, "weights": whole(self.weights), "law": law}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        law = state.get("law")
        if self.decay and law != self.bound.__name__:
            raise ValueError(
                f"its average was begun by {law or 'an earlier'} law of the decay, not "
                f"{self.bound.__name__}, as by an earlier version"
            )
        self.step = int(state["step"])
        fill(self.weights, state["weights"])


def copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are now."""
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def fill(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy weights by name; ValueError, before any is copied, where names or shapes differ."""
    shapes = {name: tuple(value.shape) for name, value in source.items()}
    unlike = [n for n, value in target.items() if shapes.get(n) != tuple(value.shape)]
    if unlike or len(source) != len(target):
        raise ValueError(
            f"the weights are not alike: {len(unlike)} of {len(target)} differ in name or shape"
            + (f", as {unlike[0]}" if unlike else "")
        )
    for name, value in target.items():
        value.copy_(like(source[name], value))


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the shares of other processes (FSDP), which all have to call it then."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in weights.items()
    }


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as this process's share of it, where that is what target is."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def swapped(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the network carries other weights, an average's for example."""
    own = copy(weights)
    fill(weights, others)
    try:
        yield
    finally:
        fill(weights, own)


def save(pipe_class: Any, part: str, network: Any, folder: Path, main: bool = True) -> Path:
    """Write the adapter as `pipe.load_lora_weights(folder)` reads it, and return the file.

    part: the network's attribute of the pipeline, "unet" or "transformer"; main: of several
    processes, which all have to call it, the one that writes.
    """
    from peft.utils import get_peft_model_state_dict

    layers = whole(get_peft_model_state_dict(network))
    about = network.peft_config["default"].to_dict()  # alpha, which the weights do not show
    stored = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": about}
    pipe_class.save_lora_weights(folder, is_main_process=main, **stored)
    return Path(folder) / FILE


def read(folder: Path, part: str, weights: Mapping[str, Tensor], alpha: int) -> dict[str, Tensor]:
    """The weights that `save` wrote, for an adapter of the same layers, rank and alpha.

    weights: those of the adapter to fill. ValueError where the two are not alike, and for a number
    that is not finite.
    """
    folder = Path(os.path.expanduser(folder))
    try:
        file = folder / FILE if folder.is_dir() else folder
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder} holds no LoRA that can be read ({said})") from None
    names = {f"{part}.{name.replace('.default.', '.')}": name for name in weights}
    fits = [k for k, n in names.items() if k in tensors and tensors[k].shape == weights[n].shape]
    rest = sorted((names.keys() | tensors.keys()) - set(fits))
    found = about.get(f"{part}.lora_alpha")
    if rest or found != alpha:
        what = f"{len(fits)} of its {len(tensors)} tensors fit {len(names)}, alpha is {found}"
        raise ValueError(
            f"the LoRA {folder} has other layers, another rank or another alpha ({what}"
            f"{f'; not so {rest[0]}' if rest else ''}); set targets, rank and alpha to those it "
            "was trained with, or give one of this model"
        )
    bad = [key for key in names if not tensors[key].isfinite().all()]
    if bad:
        raise ValueError(f"the LoRA {folder} holds numbers that are not finite, as in {bad[0]}")
    return {name: tensors[key] for key, name in names.items()}
