"""LoRA on one network: attach, switch off for the reference, average, save where diffusers loads.

Hu et al. 2021. The adapter's name is "default", its weights are float32 whatever the network is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "attach", "parameters", "reference", "save"]


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
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Average:
    """An exponential moving average of the adapter, decay min(decay, step / 1000) (GDRO, §1.3)."""

    def __init__(self, weights: dict[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the average's decay is {decay} but must be in [0, 1)")
        self.decay, self.step = decay, 0
        self.weights = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, nn.Parameter]) -> None:
        """Move towards the present weights."""
        self.step += 1
        decay = min(self.decay, self.step / 1000)
        for name, mean in self.weights.items():
            mean.lerp_(weights[name].detach().to(mean), 1 - decay)

    @contextmanager
    def applied(self, weights: dict[str, nn.Parameter]) -> Iterator[None]:
        """Within it the network carries the average."""
        own = {name: p.detach().clone() for name, p in weights.items()}
        _copy(self.weights, weights)
        try:
            yield
        finally:
            _copy(own, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        _copy(state["weights"], self.weights)


@torch.no_grad()
def _copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name, value in target.items():
        value.copy_(source[name])


def save(pipe_class: Any, part: str, network: Any, folder: Path) -> Path:
    """Write the adapter as `pipe.load_lora_weights(folder)` reads it, and return the file.

    part: the network's attribute of the pipeline, "unet" or "transformer".
    """
    from peft.utils import get_peft_model_state_dict

    layers: dict[str, Tensor] = get_peft_model_state_dict(network)
    about = network.peft_config["default"].to_dict()  # alpha, which the weights do not show
    pipe_class.save_lora_weights(
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": about}
    )
    return Path(folder) / "pytorch_lora_weights.safetensors"
