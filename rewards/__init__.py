"""Rewards of pictures: one convention, `reward(images, prompts) -> scores`, and sums of them.

reward = rewards.load("clip(tiny) + 0.5*ocr(mode=strict)")
total, components = reward.evaluate(images, prompts)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .combine import Function, Part, WeightedSum, call_of, default_name
from .spec import AGGREGATORS, Call, Term, aggregator, parse

__all__ = ["Reward", "WeightedSum", "aggregators", "available", "load"]

# name -> (module, class, description); the modules import their models only when constructed
REWARDS = {
    "aesthetic": ("rewards.aesthetic", "AestheticReward", "how pleasing LAION's raters find it"),
    "clip": ("rewards.clip", "ClipReward", "cosine of picture and prompt in CLIP's space"),
    "critic": ("rewards.critic", "CriticReward", "references told from samples, as it was trained"),
    "dino": ("rewards.dino", "DinoReward", "likeness to reference pictures in DINO's features"),
    "hps": ("rewards.hps", "HpsReward", "human preference score, v2 or v2.1"),
    "imagereward": ("rewards.imagereward", "ImageRewardReward", "preference learned on BLIP"),
    "jpeg": (
        "rewards.jpeg",
        "JpegReward",
        "size as JPEG: small (default) or large files score high",
    ),
    "judge": ("rewards.judge", "JudgeReward", "a vision-language model's answer to a question"),
    "objects": (
        "rewards.objects",
        "ObjectsReward",
        "the things, counts, colours and places a prompt asks for, detected",
    ),
    "ocr": ("rewards.ocr", "OcrReward", "the prompt's quoted text, as an OCR engine reads it"),
    "pickscore": ("rewards.pickscore", "PickScoreReward", "preference of Pick-a-Pic's users"),
    "siglip": ("rewards.siglip", "SiglipReward", "SigLIP's match of picture and prompt"),
}


@runtime_checkable
class Reward(Protocol):
    """What steering and fine-tuning ask of a reward.

    images: float (n, 3, h, w) in [0, 1], any device; prompts: n strings; references: pictures
    to compare with, for the few rewards that need them. Returns float32 (n,) on the images'
    device, higher is better. Values outside [0, 1] are refused (tolerance 1e-3), never rescaled.
    A reward may also have `check(prompts)`, which refuses prompts it cannot score,
    `evaluate(images, prompts, *, references=None) -> (total, {name: scores})`, and `spec`, the
    text form that `load` makes the same reward from.
    """

    name: str
    differentiable: bool
    range: tuple[float | None, float | None]

    def __call__(
        self, images: Tensor, prompts: Sequence[str], *, references: Any = None
    ) -> Tensor: ...


def available() -> dict[str, str]:
    """The built-in rewards: name -> one line."""
    return {name: description for name, (_, _, description) in sorted(REWARDS.items())}


def aggregators() -> dict[str, str]:
    """What makes one reward of others in a spec, `min(clip, ocr)`: name -> one line."""
    return {name: description for name, (_, _, description) in sorted(AGGREGATORS.items())}


@torch.inference_mode(False)  # what is made here may meet gradients later
def load(
    reward: str | Mapping[str, float] | Callable[..., Any],
    device: torch.device | str | None = None,
) -> WeightedSum:
    """A reward from its text form, a mapping {text form: weight}, or any callable.

    The text form is described in `rewards.spec`; a name `module:attribute` is imported, and
    called with the arguments if it has any or is a class. `device` is where models live;
    None lets them follow the images. The `spec` of a callable that cannot be imported, as a
    lambda, says so, `<lambda>`. ValueError for what is unknown or cannot be loaded.
    """
    if isinstance(reward, WeightedSum):
        return reward
    if isinstance(reward, str):
        return WeightedSum([_part(term, 1.0, device) for term in parse(reward)])
    if isinstance(reward, Mapping):
        return WeightedSum([_entry(text, reward[text], device) for text in reward])
    return WeightedSum([_callable_part(reward)])


def _entry(text: str, weight: float, device: torch.device | str | None) -> Part:
    terms = parse(text)
    if len(terms) != 1:
        raise ValueError(f"{text!r} is a sum; give each reward its own entry in the mapping")
    try:
        weight = float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of {text!r} is {weight!r}; give a number") from None
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
    call, weight, name = term.call, term.weight * factor, term.alias or default_name(term.call)
    if "<" in call.name:
        raise ValueError(
            f"{call.name} in a spec stands for a function or an object that cannot be imported; "
            "load it itself, or put it into a module and write MODULE:NAME"
        )
    if ":" in call.name:
        return Part(name, weight, _imported(call), call)
    if call.name in AGGREGATORS:
        return _aggregate(call, term.alias, weight, device)
    if call.name not in REWARDS:
        known = sorted(REWARDS | AGGREGATORS)
        close = get_close_matches(call.name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {known}"
        raise ValueError(f"there is no reward {call.name!r}; {hint}")
    module, attribute, _ = REWARDS[call.name]
    factory = getattr(importlib.import_module(module), attribute)
    parameters = [p for p in inspect.signature(factory).parameters if p != "device"]
    if len(call.args) > len(parameters):
        raise ValueError(f"reward {call.name} takes at most {len(parameters)} arguments: {call}")
    given = dict(zip(parameters, call.args, strict=False))
    for key, value in call.kwargs:
        if key in given:
            raise ValueError(f"reward {call.name} got {key} twice: {call}")
        if key not in parameters:
            close = get_close_matches(key, parameters, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {parameters}"
            raise ValueError(f"reward {call.name} has no argument {key!r}; {hint}")
        given[key] = value
    extra = {"device": device} if "device" in inspect.signature(factory).parameters else {}
    named = Call(call.name, (), tuple((key, given[key]) for key in parameters if key in given))
    return Part(name, weight, _made(named, factory, (), given | extra), named)


def _aggregate(call: Call, alias: str, weight: float, device: torch.device | str | None) -> Part:
    function, options = aggregator(call.name)
    members = [WeightedSum([_part(term, 1.0, device) for term in terms]) for terms in call.sums]
    given = dict(call.kwargs)
    for key, parameter in options.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{call.name} needs the argument {key}=, which {call} leaves out")
    reward = _made(call, function, members, given)
    ordered = tuple((key, given[key]) for key in options if key in given)
    named = Call(call.name, (), ordered, tuple(member.terms for member in members))
    return Part(alias or default_name(named), weight, reward, named)


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
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {call.name!r} cannot be imported: {error}") from error
    if call.args or call.kwargs or inspect.isclass(found):
        found = _made(call, found, call.args, dict(call.kwargs))
    return found if isinstance(found, Reward) else Function(found)
