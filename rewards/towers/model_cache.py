"""A cache of models, which are loaded once and shared while any reward uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from .checkpoints import local, untouched

__all__ = ["loaded_once"]

T = TypeVar("T")
_MODELS: WeakValueDictionary[tuple[str, str, str], Any] = WeakValueDictionary()
_LOCK = threading.RLock()


@untouched()
def loaded_once(
    kind: str, source: str, device: torch.device | str | None, load: Callable[[], T]
) -> T:
    """Return `load()`, or the model that it returned before for this kind, source and device."""
    folder = local(source)
    place = str(folder.resolve()) if folder.exists() else source
    key = (kind, place, str(device))
    with _LOCK:
        found = _MODELS.get(key)
        if found is None:
            found = _MODELS[key] = load()
    return found
