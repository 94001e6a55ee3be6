"""The machine that a measurement ran on, and the memory that it used."""

import contextlib
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

__all__ = ["about", "peak", "resident"]


def about(device: torch.device, dtype: torch.dtype) -> str:
    """Device, dtype, threads and versions, in one line."""
    name = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    kind = str(dtype).removeprefix("torch.")
    return f"{name}, {kind}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Most:
    """Peak memory in 10⁹ bytes: of the GPU, or of this process since its start."""

    gigabytes: float = 0.0


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Most]:
    """The peak memory while the block runs; on a CPU, since the start of the process."""
    most = Most()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield most
    if device.type == "cuda":
        most.gigabytes = torch.cuda.max_memory_allocated(device) / 1e9
    else:
        most.gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resident() -> float:
    """This process's resident memory in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
