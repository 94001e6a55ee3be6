"""Digests of what a run is made of: a run goes on only where files hold what they held."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rewards
from tilt.prompts import read_texts

__all__ = ["of_run", "of_texts", "of_weights"]


def of_weights(name: str | None) -> str | None:
    """What tells the weights of a LoRA, a file or a folder, from others; a hub id as it is."""
    place = os.path.expanduser(name or "")
    if not (os.path.isdir(place) or os.path.isfile(place)):
        return name
    path = Path(place)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def of_texts(texts: Sequence[str]) -> str:
    """What tells these lines, and their order, from others."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def of_run(settings: Any, spec: str, **more: str) -> dict[str, str]:
    """Digests of what the run is made of, by the setting that names it; more: the command's own.

    spec: of the reward that is trained on, "" if it is not known.

    A run is not carried on where a file or a folder holds something else under the same name.
    """
    found = {"lora": of_weights(settings.lora) or ""} | more
    if settings.check.prompts:
        found["check.prompts"] = of_texts(read_texts(settings.check.prompts))
    if settings.check.every and (checked := settings.check.reward or spec):
        found["check.reward"] = rewards.identity(checked)
    return found
