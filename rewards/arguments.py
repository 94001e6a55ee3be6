"""Checks of arguments, each of which raises a ValueError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = ["check_batch_size", "check_choice", "check_number"]


def check_batch_size(batch_size: Any) -> None:
    """Require a positive integer that `torch.split` accepts."""
    if type(batch_size) is not int or not 1 <= batch_size < 2**31:
        raise ValueError(f"batch_size is {batch_size!r} but must be a whole number, at least 1")


def check_choice(what: str, value: Any, choices: Iterable[str]) -> None:
    """Require one of the given names. `what` describes the argument in the error message."""
    names = list(choices)
    if value not in names:
        close = get_close_matches(str(value), names, 1)
        hint = f"did you mean {close[0]!r} of {names}?" if close else f"take one of {names}"
        raise ValueError(f"{what} {value!r} is unknown; {hint}")


def check_number(what: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Require a finite number between two bounds, and return it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r} but must be a finite number")
    if not least <= value <= most:
        wanted = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{what} is {value!r} but must be {wanted}")
    return value
