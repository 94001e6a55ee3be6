"""Rewards made of rewards, with the value of every component beside the total.

Legend: n images.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .evaluation_cache import sharing
from .images import check_inputs, check_prompts
from .spec import Call, Term, format_terms, parse

__all__ = ["Aggregate", "Function", "Part", "WeightedSum", "call_of", "default_name"]

Range = tuple[float | None, float | None]


class Function:
    """Any `f(images, prompts)` as a reward: n numbers, as a tensor or a sequence.

    `references` is handed on where the function has such a parameter. The range is unknown;
    `differentiable` is the function's attribute of that name, else False: no gradients then.
    """

    range = (None, None)

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise ValueError(f"a reward is a callable f(images, prompts) but got {function!r}")
        self.function = function
        name = str(getattr(function, "name", getattr(function, "__name__", "reward")))
        self.name = name.strip("<>")  # of <lambda>
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.wants_references = _wants_references(function, self.name)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        extra = {"references": references} if self.wants_references else {}
        with _gradients(self.differentiable):
            scores = self.function(images, prompts, **extra)
        return _numbers(self.name, scores, images)


def _wants_references(function: Callable[..., Any], name: str) -> bool:
    """Whether there is such a parameter; ValueError where f(images, prompts) cannot be called."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return False
    wants = "references" in signature.parameters
    try:
        signature.bind(None, None, **({"references": None} if wants else {}))
    except TypeError as error:
        raise ValueError(
            f"the reward {name} is called as f(images, prompts) but takes {signature} ({error})"
        ) from error
    return wants


@dataclass(frozen=True)
class Part:
    """One component: the name it is reported under, its weight, the reward and how it was made."""

    name: str
    weight: float
    reward: Any
    call: Call

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of {self.name} is {self.weight} but must be finite")


class WeightedSum:
    """total = Σ weight · component, each component also returned by itself, unweighted.

    A component of weight 0 is evaluated and reported but never added (so it may be infinite),
    and passes no gradient. `evaluate` gives total and components from one evaluation; the
    components of an aggregator come after its own value. A NaN, a component's word for "no
    answer", stays one in the total.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("a sum of rewards needs at least one; write for example 'clip + ocr'")
        _refuse_twins(component_names(parts))
        self.parts = tuple(parts)

    @property
    def name(self) -> str:
        """The component's name if there is only one, of weight 1, else the spec."""
        alone = len(self.parts) == 1 and self.parts[0].weight == 1
        return self.parts[0].name if alone else str(self)

    @property
    def differentiable(self) -> bool:
        """Whether every component that counts is."""
        return all(part.reward.differentiable for part in self.parts if part.weight)

    @property
    def wants_references(self) -> bool:
        """Whether any component looks at references; one that does not say so may."""
        return any(getattr(part.reward, "wants_references", True) for part in self.parts)

    @property
    def range(self) -> Range:
        """Bounds of the total; None where a component has none."""
        counted = [part for part in self.parts if part.weight]
        ends = [part.reward.range[:: 1 if part.weight > 0 else -1] for part in counted]
        low, high = (
            None
            if any(pair[i] is None for pair in ends)
            else sum(part.weight * pair[i] for part, pair in zip(counted, ends, strict=True))
            for i in (0, 1)
        )
        return low, high

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        return self.evaluate(images, prompts, references=references)[0]

    def evaluate(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (n,) and {name: component (n,)} on the images' device: float32, or float64 where a
        component is.

        They pass gradients only where the sum is `differentiable`: half a gradient misleads.
        """
        components = self.components(images, prompts, references=references)
        total = torch.zeros(len(images), device=images.device)
        for part in self.parts:
            if part.weight:
                total = total + part.weight * components[part.name]
        return total, components

    def components(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> dict[str, Tensor]:
        """{name: scores (n,)}, unweighted, in the order of the spec."""
        found = {}
        with sharing():
            # those that pass gradients first: what they saw serves the others too
            for part in sorted(self.parts, key=lambda part: part.weight == 0):
                with _gradients(self.differentiable and part.weight != 0):
                    found |= _scored(part, images, prompts, references)
        return {name: found[name] for name in component_names(self.parts)}

    @property
    def counts(self) -> bool:
        """Whether any component has a weight other than 0."""
        return any(part.weight for part in self.parts)

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a component cannot score, before any work is done."""
        check_prompts(prompts)
        for part in self.parts:
            if hasattr(part.reward, "check"):
                part.reward.check(prompts)

    @property
    def spec(self) -> str:
        """The text form with every argument; what is on record of a run, and `load` reads."""
        return str(self)

    @property
    def terms(self) -> tuple[Term, ...]:
        """What `str` writes, as data."""
        return tuple(
            Term(part.call, part.weight, "" if part.name == default_name(part.call) else part.name)
            for part in self.parts
        )

    def __str__(self) -> str:
        return format_terms(self.terms)

    def __repr__(self) -> str:
        return f"<reward {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightedSum) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)


class Scores(Protocol):
    """(images, prompts, references) -> the score (n,) and those of the components by name."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], references: Any, /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One reward made of others; the modules of `rewards.algebra` make them.

    members: the sums that it is made of; score: what it makes of them; references: whether it
    looks at reference pictures itself. A member whose weights are all 0 is only logged.
    """

    name: str
    spec: str
    members: tuple[WeightedSum, ...]
    score: Scores
    range: Range
    references: bool = False

    def __post_init__(self) -> None:
        _refuse_twins([name for member in self.members for name in component_names(member.parts)])

    @property
    def differentiable(self) -> bool:
        """Whether every component that counts is."""
        return all(member.differentiable for member in self.members)

    @property
    def wants_references(self) -> bool:
        """Whether it, or any component, looks at references."""
        return self.references or any(member.wants_references for member in self.members)

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a component cannot score, before any work is done."""
        for member in self.members:
            member.check(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        return self.evaluate(images, prompts, references=references)[0]

    def evaluate(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score (n,) and {name: component (n,)} on the images' device, float32 or float64."""
        check_inputs(images, prompts)
        with sharing(), _gradients(self.differentiable):
            return self.score(images, prompts, references)


def _scored(part: Part, images: Tensor, prompts: Sequence[str], references: Any) -> dict[str, Any]:
    """The scores of one component, and after them those of the components that it is made of."""
    inner = {}
    if isinstance(part.reward, Aggregate):
        scores, inner = part.reward.evaluate(images, prompts, references=references)
    else:
        scores = _numbers(part.name, part.reward(images, prompts, references=references), images)
    if scores.shape != (len(images),):
        raise ValueError(
            f"reward {part.name} returned shape {tuple(scores.shape)} for "
            f"{len(images)} images; it must return one number an image"
        )
    return {part.name: scores, **inner}


def _gradients(wanted: bool) -> Any:
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def _numbers(name: str, scores: Any, images: Tensor) -> Tensor:
    """Scores of any form on the images' device, float32 but for float64, which stays where the
    device has it; ValueError where they are no numbers."""
    try:
        found = torch.as_tensor(scores)
        double = found.dtype == torch.float64 and images.device.type != "mps"
        if found.is_complex():
            raise TypeError("they are complex")
        return found.to(images.device, torch.float64 if double else torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward {name} returned {scores!r:.80} but must return one number an image ({error})"
        ) from error


def component_names(parts: Sequence[Part]) -> list[str]:
    """What `evaluate` reports, in that order."""
    names = []
    for part in parts:
        names.append(part.name)
        if isinstance(part.reward, Aggregate):
            for member in part.reward.members:
                names += component_names(member.parts)
    return names


def names_in(spec: str) -> list[str]:
    """The same of a reward that is not loaded, by its `spec`."""
    return _names_in(parse(spec))


def _names_in(terms: Sequence[Term]) -> list[str]:
    names = []
    for term in terms:
        names.append(term.alias or default_name(term.call))
        for inner in term.call.sums:
            names += _names_in(inner)
    return names


def _refuse_twins(names: Sequence[str]) -> None:
    # from the end, for twins inside aggregators make twins of the aggregators' names
    for name in reversed(names):
        if names.count(name) > 1:
            raise ValueError(
                f"two components are called {name!r}; name them, a={name}(...) + b={name}(...)"
            )


def call_of(reward: Any, otherwise: Call) -> Call:
    """How a reward was made, where its `spec` says so, as that of the built-in ones does."""
    spec = getattr(reward, "spec", None)
    if spec and len(terms := parse(spec)) == 1 and terms[0].weight == 1:
        return terms[0].call
    return otherwise


def default_name(call: Call) -> str:
    """The name a component is reported under unless an alias says otherwise.

    An aggregator of a single reward adds that one's name to its own: `clip_above_ocr`.
    """
    if [len(terms) for terms in call.sums] == [1]:
        (term,) = call.sums[0]
        return f"{call.name}_{term.alias or default_name(term.call)}"
    return call.name.rpartition(":")[2].rpartition(".")[2].strip("<>")
