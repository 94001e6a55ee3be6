"""Set up FSDP 2 and DeepSpeed ZeRO 2 through accelerate, also on CPUs."""

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
    """Enable FSDP or DeepSpeed if the launcher asked for it; ValueError if its settings are not
    supported.

    accelerate itself silently ignores both on CPUs.
    """
    if _asked("ACCELERATE_USE_FSDP"):
        _fsdp(accelerator)
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        _zero(accelerator)


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
