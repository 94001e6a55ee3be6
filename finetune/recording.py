"""Record what the head of a pipeline's call makes of prompts, without calling the network.

Every prompt is encoded by a call of its own, as steering draws it, so that no padding to another
prompt's length gets into it. The call is stopped where it calls the network. A few calls of one
prompt show the rest: which axis holds the rows, whether guidance is an input of the network, and
whether a call takes a timestep for each of its rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Generator, Tensor, nn

from steering.axes import Unclear, compared, rows_in, take
from steering.call import COUNTS
from steering.keywords import check_keywords
from steering.networks import StandIn
from steering.schedulers import StochasticFlow, stochastic
from steering.tape import Tape, view_of

from .conditioning import Conditioning, Form, Results, form_of, tensors_of
from .network import Reached, at, calm, guide, hollow, part_of, reached
from .noising import noising_of

__all__ = ["Recorder", "record"]

_SCALES = ("guidance_scale", "true_cfg_scale")  # classifier-free guidance is off at 1
# what the recording or the training sets, or what would have no effect
_OURS = ("prompt", "generator", "output_type", "return_dict", "eta", *COUNTS)
_NEAR, _FAR = 0.25, 0.75  # two times


def record(pipe: Any, prompts: Sequence[str], **call: Any) -> Conditioning:
    """Return the conditioning of prompts, one row each, for `network.predict`.

    call: keywords of the pipeline's call, numbers and texts; they are recorded as well.
    Classifier-free guidance is off, while a guidance scale that is an input of the network is kept.
    Raises ValueError for a pipeline that cannot be trained, and for other keywords, such as images.
    """
    return Recorder(pipe, call).record(prompts)


class Recorder:
    """Records prompts with the same keywords of a pipeline's call.

    guided: whether predictions have the call's classifier-free guidance, which is off otherwise.
    The head's modules compute where they are; the network and the decoder are not called.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], guided: bool = False) -> None:
        self.pipe, self.part, self.kind = pipe, part_of(pipe), type(pipe)
        self._scheduler, self._noising = stochastic(pipe.scheduler, 0.0), noising_of(pipe)
        self._dtype: torch.dtype = getattr(pipe, self.part).dtype
        unused = {
            name: hollow(module, _stop)
            for name, module in pipe.components.items()
            if isinstance(module, nn.Module) and hasattr(module, "decode")
        }
        asked = {self.part: StandIn(getattr(pipe, self.part), _stop)}
        self._view = view_of(pipe, **calm(), **unused, **asked)
        guide(self._view, guided)
        _check(self.kind, call)
        self.guided, self.embedded = guided, False
        self.call = self._settled(dict(call))
        self.form: Form | None = None

    @torch.no_grad()
    def record(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of prompts, one row each, on the encoders' device."""
        rows = []
        for prompt in prompts:
            if self.form is None:
                self.form = self._form(prompt)
            rows.append(tensors_of(self.form, self._head([prompt], self.call)[0]))
        return Conditioning(self._form("") if self.form is None else self.form, rows)

    def _head(
        self, prompts: list[str], call: Mapping[str, Any], scheduler: Any = None
    ) -> tuple[Results, Tensor, Any]:
        """Return the results of the head, the latents, and the arguments of the network.

        scheduler: by default one with a single step.
        """
        view, tape = self._at(torch.tensor(_FAR)), Tape()
        if scheduler is not None:
            vars(view)["scheduler"] = scheduler
        tape.record(view)
        noise = [Generator().manual_seed(0) for _ in prompts]
        given: dict[str, Any] = {"prompt": prompts if len(prompts) > 1 else prompts[0]}
        for name, value in call.items():  # most pipelines want as many other texts as prompts
            text = name.startswith(("prompt_", "negative_prompt")) and isinstance(value, str)
            if text and len(prompts) > 1:
                given[name] = [value] * len(prompts)
        given |= {"generator": noise, "output_type": "latent"}
        self._called = view
        try:
            view(**{**call, **given})
        except Reached as end:
            results = {name: list(found) for name, found in tape.results.items() if found}
            return results, self._without_latents(results), end.found
        raise ValueError(
            f"{self.kind.__name__} cannot be trained: it does not call its {self.part}"
        )

    def _at(self, t: Tensor) -> Any:
        """Return a copy of the pipeline with one step, at t, that stops at its network."""
        view = copy.copy(self._view)
        vars(view)["scheduler"] = at(self._scheduler, self._noising.timesteps(t))
        return view

    def _without_latents(self, results: Results) -> Tensor:
        """Remove the prepared latents from the results, and return them."""
        prepared = results.get("prepare_latents", [None])
        last = prepared[-1]
        latents = last[0] if isinstance(last, tuple) else last
        if not isinstance(latents, Tensor):
            raise ValueError(
                f"{self.kind.__name__} cannot be trained: prepare_latents() returns no latents"
            )
        prepared[-1] = (None, *last[1:]) if isinstance(last, tuple) else None
        return latents

    def _form(self, prompt: str) -> Form:
        name = self.kind.__name__
        one, latents, asked = self._head([prompt], self.call)
        two, _, beside = self._head([prompt] * 2, self.call)
        form = form_of(name, one, two, self.call, tuple(latents.shape[1:]))
        form = replace(form, dtype=str(self._dtype).removeprefix("torch."))
        row = tensors_of(form, one)
        copies = self._copies(asked, beside)
        if copies > 1 and not self.guided:
            raise ValueError(
                f"{name} cannot be trained: its network gets {copies} rows for a picture, and no "
                "guidance scale turns that off"
            )
        form = replace(form, guided=self.guided, embedded=self.embedded, copies=copies)
        if self._needs_levels(prompt, Conditioning(form, [row]), latents):
            return form
        for times in ("rows", "copies"):
            given = Conditioning(replace(form, times=times), [row, row])
            if self._takes(given, latents):
                return given.form
        return replace(form, times="each")

    def _needs_levels(self, prompt: str, given: Conditioning, latents: Tensor) -> bool:
        """Return whether the network gets the scheduler's noise level beside the timestep.

        Raises ValueError if it gets more of the schedule than these: in the first step of the
        pipeline's own call, its arguments have to be those of a call with this step alone.
        """
        own = stochastic(self._scheduler, 0.0)
        asked = self._head([prompt], self.call, own)[2]
        highest = own.sigmas.max().item() if isinstance(own, StochasticFlow) else 0.0
        if highest > 1:
            raise ValueError(
                f"{self.kind.__name__} cannot be trained: its noise levels rise to {highest:.3g}, "
                "but those of a flow from latents to noise end at 1"
            )
        one = at(self._scheduler, own.timesteps[0])
        if not _equal(asked, self._reached(one, given, latents)):
            raise ValueError(
                f"{self.kind.__name__} cannot be trained: what its network gets depends on more of "
                "its schedule than the present timestep"
            )
        if not hasattr(one, "sigmas"):
            return False
        one.sigmas = one.sigmas / 2
        return not _equal(asked, self._reached(one, given, latents))

    def _reached(self, scheduler: Any, given: Conditioning, x: Tensor) -> Any:
        view = copy.copy(self._view)
        vars(view)["scheduler"] = scheduler
        return reached(view, given, x, self._dtype)

    def _takes(self, given: Conditioning, latents: Tensor) -> bool:
        """Return whether a call with a time for each row gives the network what two calls do."""
        name, copies = self.kind.__name__, given.form.copies
        t = torch.tensor([_NEAR, _FAR], device=latents.device)
        each = t if given.form.times == "rows" else t.repeat(copies)

        def asked(given: Conditioning, t: Tensor) -> Any:
            x = latents.expand(len(given), *latents.shape[1:])
            return reached(self._at(t), given, x, self._dtype)

        try:
            mixed = asked(given, each)
            alone = [asked(given[:1], one.repeat(len(each) // 2)) for one in t.split(1)]
            axes = compared(name, mixed, alone[0], 2, 1)
            rows_in(name, mixed, axes)
        except Exception:  # whatever the pipeline says of times that it does not expect
            return False
        rows = [take(mixed, axes, (name,), slice(i, None, 2)) for i in range(2)]
        return all(map(_equal, rows, alone))

    def _settled(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords with guidance as it is wanted; an embedded scale is kept.

        A scale is an input of the network if what the network gets differs between 2 and 3.
        """
        known = inspect.signature(self.kind.__call__).parameters
        for name in (name for name in _SCALES if name in known):
            asked = [self._head(["a"], call | {name: scale})[2] for scale in (2.0, 3.0)]
            if not _equal(*asked):
                self.embedded = True
            elif not self.guided:
                call.pop(name, None)
                if known[name].default is not None:
                    call[name] = self._off(name, call)
        if self.guided:
            return call
        return {name: v for name, v in call.items() if not name.startswith("negative_")}

    def _off(self, name: str, call: dict[str, Any]) -> float:
        """Return the scale at which a picture needs the network once: 1, or for some 0."""
        one, two = (self._head(["a"] * n, call | {name: 1.0})[2] for n in (1, 2))
        # one that calls the network twice tells by this property
        still = getattr(self._called, "do_classifier_free_guidance", False)
        return 1.0 if self._copies(one, two) == 1 and not still else 0.0

    def _copies(self, one: Any, two: Any) -> int:
        """Return the rows of the network's batch per row, from calls with one row and two."""
        try:
            axes = compared(self.kind.__name__, two, one, 2, 1)
            return (rows_in(self.kind.__name__, two, axes) or 0) // 2
        except Unclear as error:
            raise ValueError(f"{self.kind.__name__} cannot be trained: {error.why}") from None


def _check(kind: type, call: Mapping[str, Any]) -> None:
    """Raise ValueError for the first keyword that a recording cannot have."""
    known = inspect.signature(kind.__call__).parameters
    for name, value in call.items():
        if name in _OURS:
            raise ValueError(f"{name}= has no meaning in training; leave it out")
        if name not in known:  # also where the call takes any name, and does nothing with it
            raise ValueError(f"{kind.__name__} takes no keyword {name}=")
        if not _is_plain(value):
            raise ValueError(
                f"{kind.__name__} cannot be trained with {name}=: keywords are numbers, texts, or "
                "lists of them"
            )
    check_keywords(kind.__call__, call, kind.__name__)


def _is_plain(value: Any) -> bool:
    """Return whether a value can be stored as JSON."""
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two nested arguments are equal, tensors by value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and (one is other or one == other)


def _stop(*args: Any, **kwargs: Any) -> Any:
    called = dict(enumerate(args)) | kwargs
    raise Reached({name: value for name, value in called.items() if not _is_empty(value)})


def _is_empty(value: Any) -> bool:
    """Return whether a value is an object without tensors yet, such as an empty key-value cache."""
    known = isinstance(value, Tensor | nn.Module | Mapping | list | tuple | Enum)
    known = known or is_dataclass(value)
    return not known and bool(getattr(value, "__dict__", None)) and not _holds_tensors(value, set())


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return True
    if id(value) in seen:  # objects may hold one another
        return False
    seen.add(id(value))
    inside = [*vars(value).values()] if hasattr(value, "__dict__") else []
    if isinstance(value, Mapping):
        inside += value.values()
    elif isinstance(value, list | tuple):
        inside += value
    return any(_holds_tensors(item, seen) for item in inside)
