"""The allowed values of settings, which are checked when a dataclass of settings is made.

Fields made by `setting` hold their Range in their metadata; other dataclasses have a dict RANGES.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

__all__ = [
    "FLAG",
    "GIVEN",
    "KEYWORDS",
    "NAME",
    "PROMPTS",
    "REFERENCES",
    "SCORE_FRAMES",
    "SEED",
    "TEXT",
    "TEXTS",
    "VIDEO_SCORE",
    "Range",
    "check",
    "group",
    "number",
    "one_of",
    "optional",
    "part",
    "refuse_idle",
    "setting",
    "whole",
]

MOST = 10**9  # largest count; larger ones are mistakes
MOST_FLOAT = 3e38  # just below the largest float32


@dataclass(frozen=True)
class Range:
    """The values that a setting may have; said: what they are, such as "a number above 0".

    choices: all allowed values, if they are a few names.
    """

    said: str
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, with the setting's name, for a value that is not allowed."""
        if not self.allows(value):
            raise ValueError(f"{name} is {value!r:.80} but must be {self.said}")


def check(settings: Any, ranges: Mapping[str, Range] | None = None) -> None:
    """Raise ValueError for the first field whose value is not in its range."""
    for field in dataclasses.fields(settings):
        allowed = ranges[field.name] if ranges else field.metadata["range"]
        allowed.check(field.name, getattr(settings, field.name))


def setting(default: Any, allowed: Range, help: str, heading: str = "") -> Any:
    """Return a dataclass field with its default, its range and its help.

    default: for mutable values, a function that makes it. heading: the option's heading in the
    help.
    """
    about = {"range": allowed, "help": help} | ({"heading": heading} if heading else {})
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def part(kind: type, title: str, flat: bool = False) -> Any:
    """Return a field that holds nested settings; flat: their options have no prefix."""
    about = {"range": group(kind), "help": title, "flat": flat}
    return dataclasses.field(default_factory=kind, metadata=about)


def refuse_idle(settings: Any, names: Sequence[str], why: str) -> None:
    """Raise ValueError for the first of these settings that is not at its default.

    names: settings that have no effect with the others, "group" for all settings of a group and
    "group.name" for one of them; why: a clause that names the responsible setting.
    """
    plain = type(settings)()
    for name in names:
        values = (reduce(getattr, name.split("."), one) for one in (settings, plain))
        for full, value in _set(name, *values):
            raise ValueError(
                f"{full} is {value!r:.80} but has no effect, because {why}; change that, or leave "
                "this setting out"
            )


def _set(name: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", inner) for key, inner in value.items())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name), getattr(default, field.name)
            yield from _set(f"{name}.{field.name}", *inner)
    elif value != default:
        yield name, value


def number(low: float = -math.inf, high: float = math.inf, ends: str = "[]") -> Range:
    """Return the range of finite numbers from low to high; ends: as in "[)", closed or open."""

    def allows(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value > low if ends[0] == "(" else value >= low
        below = value < high if ends[1] == ")" else value <= high
        return abs(value) < MOST_FLOAT and above and below

    if math.isfinite(high):
        return Range(f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}", allows)
    if math.isfinite(low):
        return Range(f"a number {'above' if ends[0] == '(' else 'not below'} {low:g}", allows)
    return Range("a finite number", allows)


def whole(low: int, high: int = MOST) -> Range:
    """Return the range of whole numbers from low to high."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Range(f"a whole number, {low} {'or more' if high == MOST else f'to {high}'}", allows)


def one_of(*names: str) -> Range:
    """Return the range that consists of these texts."""
    *others, last = map(repr, names)
    said = f"{', '.join(others)} or {last}" if others else last
    return Range(said, lambda value: isinstance(value, str) and value in names, names)


def optional(inner: Range) -> Range:
    """Return a range that also allows None."""
    return Range(f"{inner.said}, or null", lambda value: value is None or inner.allows(value))


def group(kind: type) -> Range:
    """Return the range of instances of `kind`, a dataclass of settings."""
    return Range(f"a group of settings ({kind.__name__})", lambda value: isinstance(value, kind))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_name(value: Any) -> bool:
    return _is_text(value) and bool(value.strip())


FLAG = Range("true or false", lambda value: isinstance(value, bool))
TEXT = Range("text", _is_text)
NAME = Range("text, and not empty", _is_name)
GIVEN = Range("given", _is_name)  # required: the default "" is refused
TEXTS = Range(
    "a list of names", lambda value: isinstance(value, list) and all(map(_is_name, value))
)
PROMPTS = Range(
    "a tuple of prompts, and none empty",
    lambda value: isinstance(value, tuple) and all(map(_is_name, value)),
)
REFERENCES = Range(
    "a tuple of file names for each prompt",
    lambda value: (
        isinstance(value, tuple)
        and all(isinstance(names, tuple) and all(map(_is_name, names)) for names in value)
    ),
)
KEYWORDS = Range(
    "keywords with their values",
    lambda value: isinstance(value, dict) and all(map(_is_name, value)),
)
SCORE_FRAMES = Range(
    "all, first, or a whole number, 1 or more",
    lambda value: value in ("all", "first") or whole(1).allows(value),
)
VIDEO_SCORE = one_of("mean", "min")
SEED = Range("a whole number from 0 to 2**63 - 1", whole(0, 2**63 - 1).allows)
