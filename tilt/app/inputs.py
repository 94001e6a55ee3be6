"""Parsing of the app's form: raw values of its fields to a `Wish`, or an error of one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.catalogue import OutsideError, read
from rewards.spec import Call, Term, format_terms
from steering import FeynmanKac, tiny
from steering.particles import needs_scores
from steering.settings import scored_steps
from tilt import loading
from tilt.prompts import Prompt

__all__ = ["Wish", "default_reward", "parse", "spec_of"]

MOST_STEPS = 1000  # number of training timesteps of the schedulers
EMBEDDED_REWARDS = ("aesthetic", "clip", "dino")  # rewards with an embedded tiny model


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The request of one run, checked as far as possible without loading anything."""

    prompt: str
    model: str
    lora: str | None
    reward: str
    own: bool  # whether the reward comes from the command line, so that it may import code
    particles: int
    seed: int
    call: dict[str, Any]  # keywords of the pipeline's call
    settings: FeynmanKac


def default_reward(model: str) -> str:
    """Return the initial reward of the page: CLIP, the embedded one for an embedded model."""
    return spec_of({"clip": 1.0}, model)


def spec_of(weights: Mapping[str, float | None], model: str) -> str:
    """Return the spec of built-in rewards and their weights, tiny ones for an embedded model."""
    terms = []
    for name, weight in weights.items():
        small = model in tiny.NAMES and name in EMBEDDED_REWARDS
        terms.append(Term(Call(name, ("tiny",) if small else ()), _number("weight", weight)))
    return format_terms(tuple(terms))


def parse(form: Mapping[str, Any], most: int, trusted: str | None = None) -> Wish:
    """Return the Wish of a form's raw values; raises ValueError, of one sentence, if invalid.

    most: the limit of particles. trusted: the only spec that may access something outside of Tilt,
    which is that of the command line, because anybody may use the page.
    """
    prompt = Prompt(_text(form, "prompt")).text
    model = _text(form, "model")
    if not model:
        raise ValueError(f"the model is empty: try {tiny.NAMES[0]}, or name a folder or a hub id")
    loading.check_name(model)
    reward = _text(form, "reward") or default_reward(model)
    try:
        read(reward, imports=reward == trusted)
    except OutsideError as error:
        raise ValueError(
            f"{error.what}, which the page does not allow: start the app with --reward to use it"
        ) from None
    particles = _whole("particles", form["particles"], 1, most)
    call = tiny.call_defaults(model) if model in tiny.NAMES else {}
    if steps := _text(form, "steps"):
        call["num_inference_steps"] = _whole("steps", _read(steps), 1, MOST_STEPS)
    if guidance := _text(form, "guidance"):
        call["guidance_scale"] = _number("guidance", _read(guidance))
    settings = FeynmanKac(
        reward_scale=_number("λ", form["reward_scale"]),
        potential=_text(form, "potential"),
        min_ess=_number("the least ESS", form["min_ess"]),
        num_scores=_whole("the number of scores", form["num_scores"], 1, MOST_STEPS),
    )
    if "num_inference_steps" in call and needs_scores(settings, particles):
        scored_steps(call["num_inference_steps"], settings)
    return Wish(
        prompt=prompt,
        model=model,
        lora=_text(form, "lora") or None,
        reward=reward,
        own=reward == trusted,
        particles=particles,
        seed=_whole("seed", form["seed"], 0, 2**53),
        call=call,
        settings=settings,
    )


def _text(form: Mapping[str, Any], name: str) -> str:
    value = form.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} is {value!r:.80}: write text")
    return (value or "").strip()


def _read(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # `_number` and `_whole` refuse it


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} is {_shown(value)}: give a finite number")


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, int | float) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{name} is {_shown(value)}: give a whole number from {low} to {high}")


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "empty" if value is None else f"{value!r:.80}"
