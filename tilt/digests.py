"""Digests of a run's inputs: a run is resumed only if its files have the same contents."""

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
    """Return a digest of the weights of a LoRA file or folder; a hub id is returned unchanged."""
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
    """Return a digest of these lines and their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def of_run(settings: Any, spec: str, **more: str) -> dict[str, str]:
    """Return digests of the run's inputs, by the setting that names them.

    spec: the reward that is trained on, "" if unknown; more: further digests of the command. A run
    is not resumed if a file or a folder has other contents under the same name.
    """
    found = {"lora": of_weights(settings.lora) or ""} | more
    if settings.check.prompts:
        found["check.prompts"] = of_texts(read_texts(settings.check.prompts))
    if settings.check.every and (checked := settings.check.reward or spec):
        found["check.reward"] = rewards.identity(checked)
    return found
