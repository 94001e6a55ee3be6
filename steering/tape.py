"""A copy of a pipeline, and what the head of its call returned.

A pipeline's call has a head (encode the prompt, prepare latents, images and masks), a loop and a
tail (unpack, decode, safety checker, watermark). `Tape` records what the head returned while the
pipeline runs, so that the same call can be made again without it.
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

# Pipelines shared by threads: fast tokenizers, causal video decoders and the upcast of the SDXL
# decoder keep state in the object while they work.
SHARED = threading.RLock()


def view_of(pipe: DiffusionPipeline, **replaced: Any) -> Any:
    """A shallow copy of a pipeline with some attributes replaced; `pipe` itself never sees them.

    Nor does it see what the copy's call does to its guidance and its schedulers.
    """
    view = copy.copy(pipe)
    for name, value in (_stateful(pipe, replaced.keys()) | replaced).items():
        vars(view)[name] = value  # not setattr, which would re-register the pipeline's config
    return view


def _stateful(pipe: DiffusionPipeline, without: Collection[str]) -> dict[str, Any]:
    """Copies of the parts that keep a state while a call runs: guidance, other schedulers.

    And of modules with a `to` of their own, which unCLIP's normalizer takes new weights by.
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
    """What the head of one pipeline call returned, in the order of the calls."""

    def __init__(self) -> None:
        self._results: dict[str, list[Any]] = {}
        self._depth = 0

    def record(self, view: Any) -> None:
        """Let the head's methods of a pipeline keep what they return; `view` must be a copy."""
        for name in dir(type(view)):
            if _HEAD.fullmatch(name):
                self._results[name] = []
                vars(view)[name] = self._recorder(name, getattr(view, name))

    def _recorder(self, name: str, method: Callable) -> Callable:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with SHARED:
                self._depth += 1
                try:
                    result = method(*args, **kwargs)
                finally:
                    self._depth -= 1
            if self._depth == 0:  # a method that another one calls is not played back
                self._results[name].append(result)
            return result

        return recorded

    def players(self, view: Any, latents: Tensor | None = None) -> dict[str, Callable]:
        """Methods that return what was recorded, with `latents` in place of the prepared ones.

        What the head did not ask for is asked of `view` itself.
        """
        return {name: self._player(name, getattr(view, name), latents) for name in self._results}

    @property
    def prepared(self) -> bool:
        """Whether latents can be handed to the tail: the head prepared them by a method."""
        return bool(self._results.get("prepare_latents"))

    def _player(self, name: str, method: Callable, latents: Tensor | None) -> Callable:
        results = enumerate(list(self._results[name]), 1)

        def play(*args: Any, **kwargs: Any) -> Any:
            try:
                number, result = next(results)
            except StopIteration:
                return method(*args, **kwargs)
            # before those of the picture, unCLIP prepares those of its prior
            is_last = number == len(self._results[name])
            if name != "prepare_latents" or latents is None or not is_last:
                return result
            return (latents, *result[1:]) if isinstance(result, tuple) else latents

        return play
