"""Moving a pipeline to a device: whole, or its parts or layers only while they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finetune.ranges import one_of

__all__ = ["ABOUT_OFFLOAD", "OFFLOAD", "apart", "check", "place", "place_part"]

OFFLOAD = one_of("none", "model", "group")
ABOUT_OFFLOAD = (
    "what leaves the device for the host's memory when it does not compute: model: each of text "
    "encoders, network and decoder; group: each layer, slowest and smallest; images stay the same"
)


def check(offload: str, quantize: str) -> None:
    """Raise ValueError for settings that do not go together."""
    if offload == "group" and quantize == "4bit":
        raise ValueError(
            "offload is 'group' and quantize is '4bit', whose layers can only be moved as a whole; "
            "set offload=model, or quantize=8bit"
        )


def place(pipe: Any, device: Any, offload: str = "none", keep: Sequence[str] = ()) -> Any:
    """Return the pipeline, which computes on `device` from now on.

    offload: "none", "model" or "group"; keep: parts that stay on the device with "group".
    """
    device = torch.device(device)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:  # without streams, which no GPU has tried here; "leaf_level" hooks decode() as well
        pipe.enable_group_offload(device, offload_type="leaf_level", exclude_modules=list(keep))
    return pipe


@contextmanager
def apart(pipe: Any, offload: str) -> Iterator[None]:
    """Take "model" offloading off the pipeline while its LoRA is changed.

    The loaders of diffusers put it back for a device of their own choice, or fail without a GPU.
    """
    device = pipe._execution_device
    if offload == "model":
        pipe.remove_all_hooks()
    yield
    if offload == "model":
        place(pipe, device, offload)


def place_part(part: Any, device: torch.device, offload: str) -> None:
    """Move one part of a pipeline to `device`, with "group" only layer by layer as it computes."""
    if offload == "none":
        part.to(device)
    else:
        part.enable_group_offload(device, offload_type="leaf_level")
