"""Shallow copies of a pipeline, and recordings of the head of its call.

A pipeline's call has a head (encode the prompt, prepare latents, images and masks), a loop and a
tail (unpack, decode, safety checker, watermark). `Tape` records the results of the head's methods,
so that the same call can be repeated without computing them again.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SHARED", "Tape", "view_of"]

_HEAD = re.compile(r"_?(encode|prepare)_(?!extra_step_kwargs)\w+")

# Protects pipelines shared by threads: fast tokenizers, causal video decoders and the upcast of the
# SDXL decoder keep state in the shared object during a call.
SHARED = threading.RLock()


def view_of(pipe: DiffusionPipeline, **replaced: Any) -> Any:
    """Return a shallow copy of a pipeline with some attributes replaced.

    `pipe` is not modified, nor are its guidance and schedulers when the copy is called.
    """
    view = copy.copy(pipe)
    for name, value in (_stateful(pipe, replaced.keys()) | replaced).items():
        vars(view)[name] = value  # not setattr, which would re-register the pipeline's config
    return view


def _stateful(pipe: DiffusionPipeline, without: Collection[str]) -> dict[str, Any]:
    """Return copies of the components that a call modifies: guidance and other schedulers.

    Modules with their own `to` are included: that of unCLIP's normalizer assigns new weights.
    """
    from diffusers.configuration_utils import ConfigMixin

    return {
        name: copy.deepcopy(part)
        for name, part in pipe.components.items()
        if name not in without
        and isinstance(part, ConfigMixin)
        and (not isinstance(part, torch.nn.Module) or "to" in vars(type(part)))
    }


class Tape:
    """The results of the head's methods in one pipeline call, in order."""

    def __init__(self, results: dict[str, list[Any]] | None = None) -> None:
        self.results: dict[str, list[Any]] = results or {}
        self._depth = 0

    def record(self, view: Any) -> None:
        """Record the results of the head's methods of `view`, a copy of the pipeline."""
        for name in dir(type(view)):
            if _HEAD.fullmatch(name):
                self.results[name] = []
                vars(view)[name] = self._recorder(name, getattr(view, name))

    def _recorder(self, name: str, method: Callable) -> Callable:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with SHARED:
                self._depth += 1
                try:
                    result = method(*args, **kwargs)
                finally:
                    self._depth -= 1
            if self._depth == 0:  # calls within another recorded method are not replayed
                self.results[name].append(result)
            return result

        return recorded

    def players(self, view: Any, latents: Tensor | None = None) -> dict[str, Callable]:
        """Return methods that replay the recorded results, with `latents` as the prepared ones.

        Calls beyond those recorded go to `view` itself.
        """
        return {name: self._player(name, getattr(view, name), latents) for name in self.results}

    @property
    def prepared(self) -> bool:
        """Whether the head prepared latents by a method, so that they can be replaced."""
        return bool(self.results.get("prepare_latents"))

    def _player(self, name: str, method: Callable, latents: Tensor | None) -> Callable:
        results = enumerate(list(self.results[name]), 1)

        def play(*args: Any, **kwargs: Any) -> Any:
            try:
                number, result = next(results)
            except StopIteration:
                return method(*args, **kwargs)
            # unCLIP also prepares latents for its prior, before those of the image
            is_last = number == len(self.results[name])
            if name != "prepare_latents" or latents is None or not is_last:
                return result
            return (latents, *result[1:]) if isinstance(result, tuple) else latents

        return play
