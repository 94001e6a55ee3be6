"""Seconds of calls, and ratios of alternating pairs of them."""

import time
from collections.abc import Callable

import torch

__all__ = ["ratios", "seconds"]


def _wait() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call, until the device has finished."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def ratios(first: Callable[[], object], second: Callable[[], object], pairs: int) -> list[float]:
    """Seconds of `first` over those of `second` in each pair, after a warm-up of both.

    Which of a pair comes first alternates, so that a drift in speed favours neither.
    """
    second()
    first()
    found = []
    for pair in range(pairs):
        order = (first, second) if pair % 2 else (second, first)
        a, b = map(seconds, order)
        found.append(a / b if pair % 2 else b / a)
    return found
