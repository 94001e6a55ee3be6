"""Check the keywords of a pipeline's call against the call's annotations.

A value is refused only if its annotation clearly excludes it; a missing annotation, or one that
cannot be checked, accepts any value. The annotations of diffusers are stricter than its calls in
three ways, which are allowed here: None for a list, several texts for one, floats in lists of int.
"""

from __future__ import annotations

import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["SUNG", "check_keywords", "is_per_prompt"]

SUNG = ("lyrics", "transcription", "vocal_language")  # texts beside a prompt, one for each row


def check_keywords(call: Callable[..., Any], keywords: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for the first keyword of a wrong type; kind: the pipeline's class name."""
    try:
        hints = typing.get_type_hints(call)
    except (NameError, TypeError, AttributeError):  # names imported only for type checkers
        return
    parameters = inspect.signature(call).parameters
    for name, value in keywords.items():
        wanted = hints.get(name, Any)
        if value is not parameters[name].default and not _fits(value, wanted):
            raise ValueError(f"{name}={value!r:.80}: {kind} takes {_said(wanted)}.")


def _fits(value: Any, wanted: Any) -> bool:
    origin, args = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin in _NONE:
        return value is None
    if origin is str:
        texts = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(text, str) for text in texts)
    if origin is bool:
        return isinstance(value, bool | np.bool_)
    if origin in (int, float):
        return _is_number(value, whole=origin is int)
    if origin is Callable:
        return callable(value)
    if origin in _LISTS:
        return value is None or _is_list_of(value, [float if one is int else one for one in args])
    if origin is Any or getattr(origin, "_is_protocol", False):
        return True
    if isinstance(origin, type):
        # tensors and images have more types than annotations name; plain values are mistakes
        return not _is_plain(value) or isinstance(value, origin)
    return True  # a type variable, a legacy tensor type, a Literal


def _is_list_of(values: Any, kinds: Sequence[Any]) -> bool:
    if not _is_plain(values):  # arrays are accepted for lists of numbers
        return True
    if not isinstance(values, list | tuple):
        return False
    if len(kinds) > 1 and Ellipsis not in kinds and len(values) != len(kinds):
        return False
    return not kinds or all(any(_fits(value, kind) for kind in kinds) for value in values)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    real = isinstance(value, numbers.Real) and math.isfinite(value)
    return isinstance(value, numbers.Integral) or (real and not whole)


def _is_plain(value: Any) -> bool:
    """Return whether `value` consists of YAML values only, and not of tensors or images."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | dict)


_NONE, _LISTS = (None, types.NoneType), (list, tuple, Sequence, Iterable)
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
    dict: "a mapping", list: "a list", tuple: "a list",
}  # fmt: skip


def _said(wanted: Any) -> str:
    """Return an annotation in words, such as "text or a list of (text)"."""
    origin, args = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_said, args)))
    if origin in _NONE:
        return "None"
    if origin is Callable:
        return "a function"
    if origin in _LISTS and args:
        return f"a list of ({' or '.join(dict.fromkeys(_said(a) for a in args if a is not ...))})"
    return _WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def is_per_prompt(name: str) -> bool:
    """Return whether a list for this keyword holds an entry for each prompt."""
    return "prompt" in name or name in SUNG
