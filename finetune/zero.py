"""DeepSpeed ZeRO 2 for a `Learner`: the optimiser of each process holds one flat shard.

Every process has all weights. AdamW updates a copy of this process's shard: the weights are
flattened, concatenated, padded, and split into as many equal shards as there are processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["configure", "is_on", "load_state", "state"]


def is_on(accelerator: Any) -> bool:
    """Return whether DeepSpeed is in use."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure(accelerator: Any, max_grad_norm: float, count: int, eight_bit: bool) -> None:
    """Set the DeepSpeed options that it would otherwise infer wrongly, before the engine is made.

    count: number of trained values. Raises ValueError for an 8-bit optimiser, whose state cannot be
    divided among another number of processes.
    """
    if eight_bit:
        raise ValueError("eight_bit=true does not work with DeepSpeed; leave one of them out")
    accelerator.wait_for_everyone()  # the engine's own process group waits for minutes only
    config = accelerator.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1  # required without a data loader, but unused
    config["gradient_accumulation_steps"] = 1  # else it divides losses that are means already
    config["gradient_clipping"] = max_grad_norm
    config["zero_optimization"]["reduce_bucket_size"] = count  # the default buffer has 2 GB


def state(optimizer: Any, weights: Sequence[Tensor], accelerator: Any) -> dict[str, Any]:
    """Return AdamW's state as that of a single process; all processes must call this."""
    found = optimizer.optimizer.optimizer.state_dict()
    sizes = [value.numel() for value in weights]
    own: dict[str, Tensor] = found["state"].get(0, {})
    every: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(weights))} if own else {}
    for name, value in own.items():
        whole = [value] * len(weights)  # the step count
        if value.ndim:
            flat = accelerator.gather(value)[: sum(sizes)]
            whole = [part.view_as(w) for part, w in zip(flat.split(sizes), weights, strict=True)]
        for i, part in enumerate(whole):
            every[i][name] = part.clone()
    groups = [found["param_groups"][0] | {"params": list(range(len(weights)))}]
    return {"state": every, "param_groups": groups}


def load_state(optimizer: Any, stored: dict[str, Any], accelerator: Any) -> None:
    """Load this process's shard of the result of `state`, from any number of processes."""
    inner = optimizer.optimizer.optimizer
    size, rank = inner.param_groups[0]["params"][0].numel(), accelerator.process_index
    own = {}
    for name, value in stored["state"].get(0, {}).items():
        own[name] = value
        if value.ndim:
            flat = torch.cat([stored["state"][i][name].flatten() for i in sorted(stored["state"])])
            flat = pad(flat, (0, size * accelerator.num_processes - len(flat)))
            own[name] = flat[rank * size : (rank + 1) * size]
    groups = [stored["param_groups"][0] | {"params": [0]}]
    inner.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})
