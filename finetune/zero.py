"""DeepSpeed's ZeRO 2 under a `Learner`: its optimiser holds one flat share of all weights.

The weights themselves lie whole on every process. What AdamW moves is a copy of this process's part
of them, laid end to end, padded, and cut into as many equal shares as there are processes.
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
    """Whether DeepSpeed's engine trains."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure(accelerator: Any, max_grad_norm: float, count: int, eight_bit: bool) -> None:
    """Set the DeepSpeed options that it would otherwise infer wrongly, before the engine is made.

    count: how many numbers are trained.

    ValueError for an optimiser of 8 bits, whose state cannot be shared out anew.
    """
    if eight_bit:
        raise ValueError("eight_bit=true does not go with DeepSpeed; leave one of them out")
    config = accelerator.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1  # no loader tells it; nothing depends on it
    config["gradient_accumulation_steps"] = 1  # it would divide by it what is a mean already
    config["gradient_clipping"] = max_grad_norm
    config["zero_optimization"]["reduce_bucket_size"] = count  # a buffer, of 2 GB unless it is said


def state(optimizer: Any, weights: Sequence[Tensor], accelerator: Any) -> dict[str, Any]:
    """The state of AdamW as one process alone has it; every process has to ask."""
    found = optimizer.optimizer.optimizer.state_dict()
    sizes = [value.numel() for value in weights]
    own: dict[str, Tensor] = found["state"].get(0, {})
    every: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(weights))} if own else {}
    for name, value in own.items():
        whole = [value] * len(weights)  # the count of steps
        if value.ndim:
            flat = accelerator.gather(value)[: sum(sizes)]
            whole = [part.view_as(w) for part, w in zip(flat.split(sizes), weights, strict=True)]
        for i, part in enumerate(whole):
            every[i][name] = part.clone()
    groups = [found["param_groups"][0] | {"params": list(range(len(weights)))}]
    return {"state": every, "param_groups": groups}


def load_state(optimizer: Any, stored: dict[str, Any], accelerator: Any) -> None:
    """Take this process's share of what `state` gave on however many."""
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
