"""The memory that PyTorch's allocator gives out on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

BETWEEN = "between operations"


class _Marks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with record_function(BETWEEN):
            return out


def real_peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` held between two of its operations.

    What an operation takes and gives back while it works, a workspace or its weights in another
    layout, is left out: it depends on the library and on the processor.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, _Marks():
        run()
    profiler: Any = seen.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() in ("[memory]", BETWEEN)]
    events.sort(key=lambda e: e.start_ns())
    live = torch.tensor([e.nbytes() if e.name() == "[memory]" else 0 for e in events]).cumsum(0)
    return int(live[torch.tensor([e.name() == BETWEEN for e in events])].max())
