"""List the rewards: what each is, its weights, size, licence, range and gradient."""

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
    """There is nothing to set."""


OPTIONS = Options("tilt rewards", Rewards, __doc__ or "")


def listing() -> str:
    """The built-in rewards: what each is, its weights, size, licence, range and gradient."""
    width = max(map(len, [*rewards.available(), *rewards.aggregators()])) + 2
    lines = []
    for name, line in rewards.available().items():
        about = _about(factory_of(name)).items()
        lines += [f"{name:{width}}{line}", *(f"{'':{width}}{key:10}{text}" for key, text in about)]
    lines += ["", "of other rewards, as in 'min(clip, 0.5*ocr)':"]
    lines += [f"{name:{width}}{line}" for name, line in rewards.aggregators().items()]
    return "\n".join(lines)


def _about(factory: Any) -> dict[str, str]:
    """The lines under a reward's name; a reward that is being written may have no card yet."""
    gradient = "yes" if getattr(factory, "differentiable", False) else "no"
    card = getattr(factory, "card", None)
    if card is None:
        return {"gradient": gradient, "card": "none yet, so that weights and licence are unknown"}
    return {
        "weights": (card.weights or "none") + (f" ({card.size})" if card.size else ""),
        "licence": card.licence,
        "range": card.range,
        "gradient": gradient,
        "source": card.citation,
    }


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence."""
    return of_command(OPTIONS, argv, lambda settings: print(listing()))
