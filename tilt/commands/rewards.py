"""List the built-in rewards with their descriptions, weights, sizes, licences and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rewards
from rewards.catalogue import factory_of
from tilt.exit_status import of_command
from tilt.options import Options

__all__ = ["OPTIONS", "listing", "main"]


@dataclass
class Rewards:
    """No settings."""


OPTIONS = Options("tilt rewards", Rewards, __doc__ or "")


def listing() -> str:
    """Return the list of built-in rewards: description, weights, size, licence, range, gradient."""
    width = max(map(len, [*rewards.available(), *rewards.aggregators()])) + 2
    lines = []
    for name, line in rewards.available().items():
        about = _about(factory_of(name)).items()
        lines += [f"{name:{width}}{line}", *(f"{'':{width}}{key:10}{text}" for key, text in about)]
    lines += ["", "combinations of rewards, as in 'min(clip, 0.5*ocr)':"]
    lines += [f"{name:{width}}{line}" for name, line in rewards.aggregators().items()]
    return "\n".join(lines)


def _about(factory: Any) -> dict[str, str]:
    """Return the lines below a reward's name; a reward in development may have no card yet."""
    gradient = "yes" if getattr(factory, "differentiable", False) else "no"
    card = getattr(factory, "card", None)
    if card is None:
        return {"gradient": gradient, "card": "none yet, so weights and licence are unknown"}
    return {
        "weights": (card.weights or "none") + (f" ({card.size})" if card.size else ""),
        "licence": card.licence,
        "range": card.range,
        "gradient": gradient,
        "source": card.citation,
    }


def main(argv: Sequence[str]) -> int:
    """Return exit status 0, or 2 for refused input."""
    return of_command(OPTIONS, argv, lambda settings: print(listing()))
