"""What is promised of a picture that is drawn again in a batch of another shape.

The sentence stands in docs/checked.md. A row of a network's output depends in its last digits on
how many rows are computed at once, so bits are compared only where both sides make the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEVELS, SHARE = 1, 0.01  # grey levels, and the share of a picture's values that are off at all


def assert_same_picture(one: Any, other: Any) -> None:
    """Of two 8-bit pictures, PIL's or arrays: equal but for a grey level in 1 % of the values."""
    a, b = np.asarray(one).astype(int), np.asarray(other).astype(int)
    assert a.shape == b.shape
    off = np.abs(a - b)
    assert off.max() <= LEVELS, f"{off.max()} grey levels off"
    assert (off > 0).mean() <= SHARE, f"{(off > 0).mean():.2%} of the values are off"


def assert_same_pictures(some: Sequence[Any], others: Sequence[Any]) -> None:
    """Of as many pictures as others, each the same as its own."""
    for one, other in zip(some, others, strict=True):
        assert_same_picture(one, other)
