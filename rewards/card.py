"""What a user wants to know of a reward before loading it."""

from dataclasses import dataclass

__all__ = ["Card"]


@dataclass(frozen=True)
class Card:
    """Class attribute `card` of every built-in reward; `scripts/score.py --list` prints it."""

    weights: str  # the default source, or "" where nothing is learned
    size: str  # of those weights in memory, float32
    licence: str  # of the weights; "unknown" where no licence was found
    range: str
    citation: str
