"""Rewards of images: the convention `reward(images, prompts) -> scores`, and sums of rewards.

reward = rewards.load("clip(tiny) + 0.5*ocr(mode=strict)")
total, components = reward.evaluate(images, prompts)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .catalogue import REWARDS, factory_of, identity, read
from .combine import Function, Part, WeightedSum, call_of, default_name
from .spec import AGGREGATORS, Call, Term, aggregator, format_terms

__all__ = ["Reward", "WeightedSum", "aggregators", "available", "identity", "load", "spelled"]


@runtime_checkable
class Reward(Protocol):
    """The interface of a reward that steering and fine-tuning require.

    It is called with images, float (n, 3, h, w) in [0, 1] on any device; n prompts; and
    references, images to compare with, which only a few rewards need. It returns scores (n,) on
    the images' device, float32 or float64, of which higher is better. Values outside [0, 1]
    (tolerance 1e-3) are an error and are never rescaled.

    A reward may also have `check(prompts)`, which raises ValueError for prompts it cannot score;
    `evaluate(images, prompts, *, references=None) -> (total, {name: scores})`; and `spec`, the
    text form from which `load` makes the same reward.
    """

    name: str
    differentiable: bool
    range: tuple[float | None, float | None]

    def __call__(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> Tensor: ...


def available() -> dict[str, str]:
    """Return the built-in rewards, as {name: description}."""
    return {name: description for name, (_, description) in sorted(REWARDS.items())}


def aggregators() -> dict[str, str]:
    """Return the functions that combine rewards in a spec, such as min: {name: description}."""
    return {name: description for name, (_, description) in sorted(AGGREGATORS.items())}


@torch.inference_mode(False)  # tensors made here may take part in autograd later
def load(
    reward: str | Mapping[str, float] | Callable[..., Any],
    device: torch.device | str | None = None,
    imports: bool = False,
) -> WeightedSum:
    """Make a reward from its text form, a mapping {text form: weight}, or any callable.

    Args:
        reward: The text form is described in `rewards.spec`.
        device: Device of the models; None lets them follow the images.
        imports: Whether the text is the caller's own. It may then name code as `module:attribute`
            (imported, and called with the arguments if it has any or is a class), files, folders,
            hub repositories and addresses. By default, which is meant for untrusted text, these
            are an error; see `rewards.catalogue`.

    The `spec` of a callable that cannot be imported, such as a lambda, is its name in <>.
    Raises ValueError for text that is unknown or refused, and if loading fails.
    """
    _check(device, imports)
    if isinstance(reward, WeightedSum):
        return reward
    if isinstance(reward, str):
        return WeightedSum([_part(term, 1.0, device) for term in read(reward, imports)])
    if isinstance(reward, Mapping):
        terms = {text: read(text, imports) for text in reward}  # reads all before loading any
        return WeightedSum([_entry(text, terms[text], reward[text], device) for text in reward])
    return WeightedSum([_callable_part(reward)])


def spelled(text: str, imports: bool = False) -> str:
    """Return the `spec` of the reward that `load` would make, without loading or importing it.

    Raises ValueError for unknown or refused text.
    """
    return format_terms(_unaliased(read(text, imports)))


def _unaliased(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Return the terms without aliases that equal their default names."""
    found = []
    for term in terms:
        call = replace(term.call, sums=tuple(_unaliased(each) for each in term.call.sums))
        alias = "" if term.alias == default_name(call) else term.alias
        found.append(Term(call, term.weight, alias))
    return tuple(found)


def _check(device: Any, imports: Any) -> None:
    if not isinstance(imports, bool):
        raise ValueError(f"imports is {imports!r:.80}; pass True or False")
    try:
        if device is not None:
            torch.device(device if isinstance(device, str | torch.device) else "")
    except RuntimeError:
        raise ValueError(f"device is {device!r:.80}; pass one such as 'cpu', or None") from None


def _entry(
    text: str, terms: Sequence[Term], weight: float, device: torch.device | str | None
) -> Part:
    if len(terms) != 1:
        raise ValueError(f"{text!r} is a sum; give each reward its own entry in the mapping")
    try:
        weight = float(weight)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the weight of {text!r} is {weight!r:.80}; give a number") from None
    return _part(terms[0], weight, device)


def _callable_part(reward: Any) -> Part:
    if isinstance(reward, Reward):
        return Part(reward.name, 1.0, reward, call_of(reward, Call(f"<{reward.name}>")))
    wrapped = Function(reward)
    module, name = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", "")
    importable = name and "<" not in name
    return Part(
        wrapped.name, 1.0, wrapped, Call(f"{module}:{name}" if importable else f"<{wrapped.name}>")
    )


def _part(term: Term, factor: float, device: torch.device | str | None) -> Part:
    """Load a term that `read` returned."""
    call = term.call
    if ":" in call.name:
        made = _imported(call)
    elif call.name in AGGREGATORS:
        members = [WeightedSum([_part(t, 1.0, device) for t in terms]) for terms in call.sums]
        made = _made(call, aggregator(call.name)[0], members, dict(call.kwargs))
        call = replace(call, sums=tuple(member.terms for member in members))
    else:
        factory = factory_of(call.name)
        extra = {"device": device} if "device" in inspect.signature(factory).parameters else {}
        made = _made(call, factory, (), dict(call.kwargs) | extra)
    return Part(term.alias or default_name(call), term.weight * factor, made, call)


def _made(call: Call, factory: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Any:
    try:
        return factory(*args, **kwargs)
    except (TypeError, OSError, LookupError, RuntimeError) as error:
        raise ValueError(f"the reward {call} cannot be made: {error}") from error


def _imported(call: Call) -> Any:
    module, _, attribute = call.name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing user code can raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"reward {call.name!r} cannot be imported: {said}") from error
    if call.args or call.kwargs or inspect.isclass(found):
        try:
            found = found(*call.args, **dict(call.kwargs))
        except Exception as error:
            raise ValueError(f"the reward {call} cannot be made: {error}") from error
    return found if isinstance(found, Reward) else Function(found)
