"""Set up FSDP 2 and DeepSpeed ZeRO 2 through accelerate, also on CPUs.

With `fsdp_cpu_ram_efficient_loading`, only the main process reads the network's weights: the others
make the network without weights (on the meta device), `follow` gives it the main process's dtypes
and buffers, and `prepare` distributes the weights one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["follow", "from_main", "prepare", "reads_once", "shard", "whole_others"]

T = TypeVar("T")

_READS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def shard(accelerator: Accelerator) -> None:
    """Enable FSDP or DeepSpeed if the launcher asked for it; ValueError if its settings are not
    supported.

    accelerate itself silently ignores both on CPUs.
    """
    if accelerator.distributed_type == DistributedType.NO:  # one process, which shares with none
        return
    if _asked("ACCELERATE_USE_FSDP"):
        _fsdp(accelerator)
        whole_others()
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        _zero(accelerator)


def whole_others() -> None:
    """Have transformers load text encoders and rewards on every process, as they are not sharded.

    It takes `fsdp_cpu_ram_efficient_loading` to concern its models as well, of which it initialises
    only a part on all processes but one (which part depends on its version).
    """
    if _asked(_READS_ONCE):
        os.environ[_READS_ONCE] = "false"


def reads_once(accelerator: Accelerator) -> bool:
    """Return whether only the main process is to read the network's weights."""
    state: Any = accelerator.state
    return accelerator.is_fsdp2 and bool(state.fsdp_plugin.cpu_ram_efficient_loading)


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return the main process's work() on every process; all must call this."""
    found: list[Any] = [work() if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def follow(network: nn.Module, accelerator: Accelerator) -> None:
    """Give a network on the meta device the dtypes and the buffers of the main process's."""

    def own() -> tuple[dict[str, Any], dict[str, Any]]:
        dtypes = {name: weight.dtype for name, weight in network.named_parameters()}
        return dtypes, dict(network.named_buffers())

    dtypes, buffers = from_main(accelerator, own)
    if accelerator.is_main_process:
        return
    for name, weight in network.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    for name, value in buffers.items():
        parent, _, last = name.rpartition(".")
        network.get_submodule(parent)._buffers[last] = value


def prepare(accelerator: Accelerator, network: Any, optimizer: Any) -> tuple[Any, Any]:
    """Return the network and its optimiser as accelerate prepares them."""
    if not accelerator.is_fsdp2:
        # DDP cannot broadcast quantised weights, which every process has loaded
        packed = [n for n, p in network.named_parameters() if hasattr(p, "__tensor_flatten__")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, packed)
        return accelerator.prepare(network, optimizer)
    with _buffers_apart(network):
        network, optimizer = accelerator.prepare(network, optimizer)
    network.set_reshard_after_forward(True)  # else the root's weights stay gathered afterwards
    return network, optimizer


@contextmanager
def _buffers_apart(network: nn.Module) -> Iterator[None]:
    """Leave the buffers out of the state dict, of which accelerate distributes every entry as if it
    were sharded."""
    moved = []
    for module in network.modules():
        apart = module._non_persistent_buffers_set
        moved += [(apart, name) for name in module._buffers if name not in apart]
    for apart, name in moved:
        apart.add(name)
    try:
        yield
    finally:
        for apart, name in moved:
            apart.discard(name)


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _is_now(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    # each new AcceleratorState(), such as that of the wrapped optimiser, reads it from there
    PartialState._shared_state["distributed_type"] = kind


def _fsdp(accelerator: Accelerator) -> None:
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        _is_now(accelerator, DistributedType.FSDP)
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 1 cannot hold frozen and trained weights together; set "
            "fsdp_version: 2, as in scripts/configs/fsdp.yaml"
        )
    plugin = state.fsdp_plugin
    if plugin is None:
        return
    if accelerator.is_fsdp2 and plugin.auto_wrap_policy is None:
        # weights outside of blocks stay gathered, so a swapped adapter would have no effect
        raise ValueError(
            "FSDP needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, as in fsdp.yaml"
        )
    # the policy would round inputs, including timesteps, and the adapter's gradients
    plugin.mixed_precision_policy = None


def _zero(accelerator: Accelerator) -> None:
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        _is_now(accelerator, DistributedType.DEEPSPEED)
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.deepspeed_plugins.set_mixed_precision(state._mixed_precision)
        state.deepspeed_plugins.select(_from_accelerator_state=True)
    zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ or zero["stage"] != 2:
        raise ValueError(
            f"DeepSpeed is set to ZeRO stage {zero['stage']}, or has its own config file; only "
            "stage 2 without a file is known to train as one process does; for a network that "
            "does not fit on one GPU use FSDP with fsdp_version: 2"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"DeepSpeed would cast the adapter's weights to {accelerator.mixed_precision}; set "
            "mixed_precision: 'no', and the frozen network's dtype by dtype="
        )
    offload = zero["offload_optimizer"]["device"]
    if offload != "none":
        raise ValueError(f"offload_optimizer_device is {offload!r} but must be 'none'")
