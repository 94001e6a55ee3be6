"""LoRA (Hu et al. 2021) on one network: attach, disable, average, save and read.

The adapter is named "default"; its weights are float32, and are saved in the format of diffusers.
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
    """Add a new adapter (B = 0) to the layers whose names end in `targets`; freeze all else.

    A is Kaiming-uniform, as in peft, drawn from `generator`. Returns the trainable parameters by
    name. Raises ValueError if no layer matches, and lists names that would.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not any(name == t or name.endswith(f".{t}") for name in linear for t in targets):
        ends = sorted({re.sub(r"^.*\.(?=[a-z]\w*(\.\d+)?$)", "", name) for name in linear})
        raise ValueError(
            f"no layer of {type(network).__name__} is named {list(targets)}; the names of its "
            f"linear layers end in {ends[:12]}"
        )
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    if hasattr(network, "add_adapter"):
        network.add_adapter(config)
    else:  # networks of diffusers without its LoRA methods, such as PixArt's
        inject_adapter_in_model(config, network)
    _materialised(network)
    found = parameters(network)
    for name, parameter in found.items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            bound = (1 / parameter[0].numel()) ** 0.5  # kaiming_uniform_(a=√5)
            draws = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.data.copy_((2 * draws - 1) * bound)
    return found


def _materialised(network: nn.Module) -> None:
    """Allocate adapters on the CPU that peft left without memory, as their layers are (`meta`)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in (part for part in network.modules() if isinstance(part, BaseTunerLayer)):
        for adapter in (getattr(layer, name) for name in layer.adapter_layer_names):
            if any(weight.is_meta for weight in adapter.parameters()):
                adapter.to_empty(device="cpu")
                for weight in adapter.parameters():
                    weight.data.zero_()


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name."""
    return {name: p for name, p in network.named_parameters() if ".lora_" in name}


@contextmanager
def reference(network: nn.Module) -> Iterator[None]:
    """Disable the adapter within the context, so that the network is the original one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in network.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
        for name in layer.adapter_layer_names:
            # peft freezes disabled adapters, and FSDP would keep the first gathered parameters
            # frozen
            getattr(layer, name).requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def warm_up(step: int) -> float:
    """Return the usual bound on an average's decay at update s = 1, ...: (1 + s) / (10 + s)."""
    return (1 + step) / (10 + step)


class Average:
    """An exponential moving average of the adapter, with decay min(decay, bound(step)).

    The state stores the name of the bound, since a different bound gives a different average.
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
        """Update the average with the present weights."""
        self.step += 1
        decay = min(self.decay, self.bound(self.step))
        present = [weights[name].detach() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), present, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the whole weights and the bound's name; all processes must call it."""
        law = self.bound.__name__
        return {"step": self.step, "weights": whole(self.weights), "law": law}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a state; raises ValueError if its bound is another one."""
        law = state.get("law")
        if self.decay and law != self.bound.__name__:
            raise ValueError(
                f"its average has the decay bound {law or 'of an earlier version'}, not "
                f"{self.bound.__name__}"
            )
        self.step = int(state["step"])
        fill(self.weights, state["weights"])


def copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a detached copy of the weights."""
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def fill(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy weights by name; raises ValueError, before any is copied, if names or shapes differ."""
    shapes = {name: tuple(value.shape) for name, value in source.items()}
    unlike = [n for n, value in target.items() if shapes.get(n) != tuple(value.shape)]
    if unlike or len(source) != len(target):
        raise ValueError(
            f"the weights do not match: {len(unlike)} of {len(target)} differ in name or shape"
            + (f", such as {unlike[0]}" if unlike else "")
        )
    for name, value in target.items():
        value.copy_(like(source[name], value))


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with FSDP shards gathered, for which all processes must call this."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in weights.items()
    }


def like(value: Tensor, target: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor if `target` is sharded, else the tensor."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def swapped(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the weights by others, such as an average, within the context."""
    own = copy(weights)
    fill(weights, others)
    try:
        yield
    finally:
        fill(weights, own)


def _saver(part: str) -> Any:
    """Return the loader of diffusers that writes a network of this attribute, as all of them do."""
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    return StableDiffusionLoraLoaderMixin if part == "unet" else SD3LoraLoaderMixin


def save(pipe_class: Any, part: str, network: Any, folder: Path, main: bool = True) -> Path:
    """Write the adapter in the format of `pipe.load_lora_weights(folder)`; return the file.

    A pipeline without that method (PixArt, ...) loads it by `steering.adapters.load_lora`.

    part: the pipeline's attribute of the network, "unet" or "transformer"; main: whether this
    process writes. All processes must call this.
    """
    from peft.utils import get_peft_model_state_dict

    layers = whole(get_peft_model_state_dict(network))
    about = network.peft_config["default"].to_dict()  # stores alpha
    stored = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": about}
    if part not in getattr(pipe_class, "_lora_loadable_modules", ()):
        pipe_class = _saver(part)
    pipe_class.save_lora_weights(folder, is_main_process=main, **stored)
    return Path(folder) / FILE


def read(folder: Path, part: str, weights: Mapping[str, Tensor], alpha: int) -> dict[str, Tensor]:
    """Read the weights that `save` wrote, for an adapter of the same layers, rank and alpha.

    weights: those of the adapter to fill. Raises ValueError if the two do not match, or if a value
    is not finite.
    """
    folder = Path(os.path.expanduser(folder))
    try:
        file = folder / FILE if folder.is_dir() else folder
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{folder} holds no readable LoRA ({said})") from None
    names = {f"{part}.{name.replace('.default.', '.')}": name for name in weights}
    fits = [k for k, n in names.items() if k in tensors and tensors[k].shape == weights[n].shape]
    rest = sorted((names.keys() | tensors.keys()) - set(fits))
    found = about.get(f"{part}.lora_alpha")
    if rest or found != alpha:
        what = f"{len(fits)} of its {len(tensors)} tensors fit the {len(names)} of this adapter"
        raise ValueError(
            f"the LoRA {folder} has other layers, another rank or another alpha ({what}"
            f"{f', and {rest[0]} does not' if rest else ''}; its alpha is {found}, not {alpha}); "
            "set targets=, rank= and alpha= to those it was trained with, or give one of this model"
        )
    bad = [key for key in names if not tensors[key].isfinite().all()]
    if bad:
        raise ValueError(f"the LoRA {folder} has values that are not finite, such as in {bad[0]}")
    return {name: tensors[key] for key, name in names.items()}
