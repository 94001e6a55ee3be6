"""Steer a diffusion model towards p(x0 | prompt) exp(λ r(x0, prompt)) while it samples."""

import importlib
from typing import TYPE_CHECKING

from steering.filter import FeynmanKac, Population, Transition, particle_filter

if TYPE_CHECKING:
    from steering.pipeline import Steered, generators, steer

__all__ = [
    "FeynmanKac",
    "Population",
    "Steered",
    "Transition",
    "generators",
    "particle_filter",
    "steer",
]

# Imported on first use, because importing diffusers takes seconds.
_FROM_PIPELINE = ("Steered", "generators", "steer")


def __getattr__(name: str) -> object:
    if name in ("schedulers", "tiny"):
        return importlib.import_module(f"steering.{name}")
    if name in _FROM_PIPELINE:
        importlib.import_module("steering.attention").shield()
        return getattr(importlib.import_module("steering.pipeline"), name)
    raise AttributeError(f"module 'steering' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
