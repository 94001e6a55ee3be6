"""Whether a keyword of a pipeline's call is of the kind that the call's own annotation names.

Only what can be told is refused: where an annotation is missing, or says nothing that a value can
be held against, any value fits. Annotations in diffusers are narrower than what its calls take in
three ways, which are let pass: no list at all, several texts for one, and whole numbers in lists.
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

__all__ = ["check_keywords"]


def check_keywords(call: Callable[..., Any], keywords: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for the first keyword that does not fit; kind: the pipeline's name."""
    try:
        hints = typing.get_type_hints(call)
    except (NameError, TypeError, AttributeError):  # names that are imported for type checkers only
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
        # tensors and pictures come in more kinds than annotations name; plain values are a slip
        return not _is_plain(value) or isinstance(value, origin)
    return True  # a type variable, a tensor type of old, a Literal


def _is_list_of(values: Any, kinds: Sequence[Any]) -> bool:
    if not _is_plain(values):  # arrays are as good as lists of numbers
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
    """Whether it is made of what one writes in YAML, which a slip is, and no tensor or picture."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | dict)


_NONE, _LISTS = (None, types.NoneType), (list, tuple, Sequence, Iterable)
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
    dict: "a mapping", list: "a list", tuple: "a list",
}  # fmt: skip


def _said(wanted: Any) -> str:
    """An annotation in words, such as "text or a list of (text)"."""
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
