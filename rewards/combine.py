"""Sums and other combinations of rewards, which also report the value of every component.

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

from .catalogue import served
from .evaluation_cache import sharing
from .images import check_inputs, check_prompts
from .spec import Call, Term, format_terms, parse

__all__ = ["Aggregate", "Function", "Part", "WeightedSum", "call_of", "default_name"]

Range = tuple[float | None, float | None]


class Function:
    """Any `f(images, prompts)` as a reward: n numbers, as a tensor or a sequence.

    `references` is passed on if the function has this parameter. The range is unknown.
    `differentiable` is the function's attribute of that name; without it, it is False and the
    function is called without gradients.
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
    """Return whether it has that parameter; ValueError if f(images, prompts) cannot be called."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return False
    wants = "references" in signature.parameters
    try:
        signature.bind(None, None, **({"references": None} if wants else {}))
    except TypeError as error:
        raise ValueError(
            f"the reward {name} must accept f(images, prompts) but takes {signature} ({error})"
        ) from error
    return wants


@dataclass(frozen=True)
class Part:
    """One component: its name in the report, its weight, the reward, and the call that made it."""

    name: str
    weight: float
    reward: Any
    call: Call

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of {self.name} is {self.weight} but must be finite")


class WeightedSum:
    """total = Σ weight · component, where each component is also returned, unweighted.

    A component of weight 0 is evaluated and reported but never added, so it may be infinite, and
    it passes no gradient. `evaluate` returns the total and the components; those of an aggregator
    follow its own value. NaN, by which a component reports that it has no score, makes the total
    NaN as well.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("a sum of rewards needs at least one; write for example 'clip + ocr'")
        _refuse_twins(component_names(parts))
        self.parts = tuple(parts)

    @property
    def name(self) -> str:
        """The component's name if there is only one, of weight 1, or else the spec."""
        alone = len(self.parts) == 1 and self.parts[0].weight == 1
        return self.parts[0].name if alone else str(self)

    @property
    def differentiable(self) -> bool:
        """Whether every component with a weight other than 0 is differentiable."""
        return all(part.reward.differentiable for part in self.parts if part.weight)

    @property
    def wants_references(self) -> bool:
        """Whether any component uses references; one without this attribute is assumed to."""
        return any(getattr(part.reward, "wants_references", True) for part in self.parts)

    @property
    def needs_references(self) -> bool:
        """Whether any component cannot score without them; for functions they are optional."""
        return any(_needs_references(part.reward) for part in self.parts)

    @property
    def range(self) -> Range:
        """Bounds of the total, None if a component has no bound."""
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
        """Return the total (n,) and {name: component (n,)} on the images' device.

        They are float32, or float64 if a component is. They pass gradients only if the whole sum
        is `differentiable`, since a partial gradient would be misleading.
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
        """Return the unweighted scores {name: (n,)}, in the order of the spec."""
        found = {}
        with sharing():
            # those with gradients first, because the others can use their features from the cache
            for part in sorted(self.parts, key=lambda part: part.weight == 0):
                with _gradients(self.differentiable and part.weight != 0):
                    found |= _scored(part, images, prompts, references)
        return {name: found[name] for name in component_names(self.parts)}

    @property
    def counts(self) -> bool:
        """Whether any component has a weight other than 0."""
        return any(part.weight for part in self.parts)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that a component cannot score."""
        check_prompts(prompts)
        for part in self.parts:
            if hasattr(part.reward, "check"):
                part.reward.check(prompts)

    @property
    def spec(self) -> str:
        """The text form with every argument, from which `load` makes the same reward."""
        return str(self)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parsed form of `spec`."""
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
    """Maps (images, prompts, references) to the score (n,) and the components' scores by name."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], references: Any, /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One reward made of others; the modules of `rewards.algebra` make them.

    Attributes:
        members: The sums that it combines. One whose weights are all 0 is only reported.
        score: The function that combines them.
        references: Whether the function itself uses reference images.
    """

    name: str
    spec: str
    members: tuple[WeightedSum, ...]
    score: Scores
    range: Range
    references: bool = False

    def __post_init__(self) -> None:
        _refuse_twins(self.reports)

    @property
    def reports(self) -> list[str]:
        """The names of all components of the members, in order."""
        return [name for member in self.members for name in component_names(member.parts)]

    @property
    def differentiable(self) -> bool:
        """Whether every component with a weight other than 0 is differentiable."""
        return all(member.differentiable for member in self.members)

    @property
    def wants_references(self) -> bool:
        """Whether it, or any component, uses references."""
        return self.references or any(member.wants_references for member in self.members)

    @property
    def needs_references(self) -> bool:
        """Whether it, or any component, cannot score without references."""
        return self.references or any(member.needs_references for member in self.members)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that a component cannot score."""
        for member in self.members:
            member.check(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        return self.evaluate(images, prompts, references=references)[0]

    def evaluate(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the score (n,) and {name: component (n,)} on the images' device.

        They are float32, or float64 if a component is.
        """
        check_inputs(images, prompts)
        with sharing(), _gradients(self.differentiable):
            return self.score(images, prompts, references)


def _needs_references(reward: Any) -> bool:
    wants = not isinstance(reward, Function) and getattr(reward, "wants_references", False)
    return bool(getattr(reward, "needs_references", wants))


def _scored(part: Part, images: Tensor, prompts: Sequence[str], references: Any) -> dict[str, Any]:
    """Return the scores of one component, followed by those of its own components."""
    inner = {}
    if reports := reported_by(part.reward):
        scores, found = part.reward.evaluate(images, prompts, references=references)
        inner = {name: found[name] for name in reports}
    else:
        scores = _numbers(part.name, part.reward(images, prompts, references=references), images)
    if scores.shape != (len(images),):
        raise ValueError(
            f"reward {part.name} returned shape {tuple(scores.shape)} for "
            f"{len(images)} images; it must return one number per image"
        )
    return {part.name: scores, **inner}


def _gradients(wanted: bool) -> Any:
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def _numbers(name: str, scores: Any, images: Tensor) -> Tensor:
    """Scores of any type as a tensor on the images' device, float32 unless they are float64.

    Raises ValueError if they are not real numbers.
    """
    try:
        found = torch.as_tensor(scores)
        double = found.dtype == torch.float64 and images.device.type != "mps"
        if found.is_complex():
            raise TypeError("they are complex")
        return found.to(images.device, torch.float64 if double else torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"reward {name} returned {scores!r:.80} but must return one number per image ({error})"
        ) from error


def component_names(parts: Sequence[Part]) -> list[str]:
    """Return the names that `evaluate` reports, in order."""
    names = []
    for part in parts:
        names += [part.name, *reported_by(part.reward)]
    return names


def reported_by(reward: Any) -> Sequence[str]:
    """Return the names of the scores that a reward reports beside its own, such as its parts'."""
    return getattr(reward, "reports", ())


def names_in(spec: str) -> list[str]:
    """Return the names that the reward of a spec would report, without loading it.

    Only the servers of `remote` are asked for their components.
    """
    return _names_in(parse(spec))


def _names_in(terms: Sequence[Term]) -> list[str]:
    names = []
    for term in terms:
        names.append(term.alias or default_name(term.call))
        for inner in term.call.sums:
            names += _names_in(inner)
        names += served(term.call).reported if term.call.name == "remote" else ()
    return names


def _refuse_twins(names: Sequence[str]) -> None:
    # from the end: equal names inside aggregators cause equal names of the aggregators
    for name in reversed(names):
        if names.count(name) > 1:
            raise ValueError(
                f"two components are called {name!r}; name them, a={name}(...) + b={name}(...)"
            )


def call_of(reward: Any, otherwise: Call) -> Call:
    """Return the call that made a reward, if its `spec` is one call, or else `otherwise`."""
    spec = getattr(reward, "spec", None)
    if spec and len(terms := parse(spec)) == 1 and terms[0].weight == 1:
        return terms[0].call
    return otherwise


def default_name(call: Call) -> str:
    """Return the name under which a component is reported if it has no alias.

    An aggregator of a single reward appends its name, as in `clip_above_ocr`.
    """
    if [len(terms) for terms in call.sums] == [1]:
        (term,) = call.sums[0]
        return f"{call.name}_{term.alias or default_name(term.call)}"
    return call.name.rpartition(":")[2].rpartition(".")[2].strip("<>")
