"""FSDP 2 and DeepSpeed's ZeRO 2, as accelerate is told of them: also on CPUs, or refused."""

from __future__ import annotations

import os
from typing import Any

from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)

__all__ = ["shard"]


def shard(accelerator: Accelerator) -> None:
    """Make of an accelerator what its launcher asked for; ValueError where that cannot be trained.

    accelerate leaves both out on CPUs, without a word.
    """
    if _asked("ACCELERATE_USE_FSDP"):
        _fsdp(accelerator)
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        _zero(accelerator)


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _is_now(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    # every AcceleratorState() takes it from there anew, as the wrapped optimiser makes one
    PartialState._shared_state["distributed_type"] = kind


def _fsdp(accelerator: Accelerator) -> None:
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        _is_now(accelerator, DistributedType.FSDP)
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 1 cannot hold frozen and trained weights together; set fsdp_version: 2"
        )
    plugin = state.fsdp_plugin
    if plugin is None:
        return
    if accelerator.is_fsdp2 and plugin.auto_wrap_policy is None:
        # weights that lie in no block stay gathered, and a swapped adapter would not be seen
        raise ValueError("FSDP needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP; set it")
    # it would round what calls are given, timesteps too, and the gradients of the adapter
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
            f"DeepSpeed is asked for ZeRO stage {zero['stage']}, or has a file of its own; only "
            "stage 2 without a file is known to train what one process does; for a network that "
            "one GPU does not hold use FSDP with fsdp_version: 2"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"DeepSpeed would turn the adapter's weights to {accelerator.mixed_precision}; set "
            "mixed_precision: 'no', the frozen network's type is dtype="
        )
    offload = zero["offload_optimizer"]["device"]
    if offload != "none":
        raise ValueError(f"offload_optimizer_device is {offload!r} but must be 'none'")
