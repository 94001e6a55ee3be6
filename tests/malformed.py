"""Malformed calls, made from the options and signatures themselves, so that new ones are covered.

Of every option, setting or argument: values that its own type, range or help excludes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import math
import re
import signal
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LONG = "x" * 5000
# What cannot be a name of anything that is to be found or made.
NAMES = ["", " ", "~no-such-user/x", "no/such/thing/here", LONG, "\udcff", "/dev/null/x", "a\tb"]
PLACES = [" ", "/dev/null/x", LONG, "\udcff"]  # no folder of such a name can be made


class Hang(BaseException):
    """A call that did not come back in time."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(main: Callable[[list[str]], int], words: Sequence[str]) -> tuple[int, list[str]]:
    """Exit status of a script's main() and its lines on stderr, without those on progress."""
    err = io.StringIO()
    with within(100), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    progress = re.compile(r"^tilt [a-z ]+: (loading|starting|drawing) |%\||\[00:")
    return status, [line for line in lines if not progress.search(line)]


def of_settings(kind: type, free: set[str], prefix: str = "") -> list[tuple[str, str]]:
    """(key, bad value) of every setting of a dataclass of key=value words."""
    calls, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, inner = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(inner):
            calls += of_settings(typing.cast(type, inner), free, f"{name}.")
            calls += [(name, value) for value in ("5", "x", "[1]", "{no_such_setting: 1}")]
        elif name not in free:
            bad = PLACES if field.name in ("out", "calibrate") else _of_hint(inner)
            calls += [(name, value) for value in ["", *bad]]
    return calls


def _of_hint(hint: Any) -> list[str]:
    kinds = set(typing.get_args(hint)) or {typing.get_origin(hint) or hint}
    if kinds <= {int, types.NoneType}:
        odd = ["1,5", "0x1f", "010", "1:30", "1_0", "١.٥.١"]  # YAML reads some of these as numbers
        large = ["9" * 30, "9" * 5000, "-" + "9" * 5000]  # int() refuses more than 4300 digits
        return ["x", "1.5", "nan", "[1]", "{a: 1}", "-1", "true", *odd, *large]
    if kinds <= {float, types.NoneType}:
        return ["x", "nan", ".inf", "-.inf", "[1]", "{a: 1}", "1e400"]
    if hint is bool:
        return ["maybe", "3", "[]", "{a: 1}", "null"]
    if kinds <= {str, types.NoneType}:
        return ["[1]", "{a: 1}", *NAMES[1:], "no:such"]
    if typing.get_origin(hint) is dict:
        return ["5", "x", "[1]", "{no_such_key: 1}"]
    if typing.get_origin(hint) in (list, tuple):
        return ["5", "{a: 1}", "[[1]]"]
    return ["{a: 1}"]


ANY = [None, True, 3, -3, 10**30, 1.5, math.nan, "x", b"x", [], [1], (), {}, {"a": 1}, object()]
ANY += [len, int, torch.zeros(3), 1j, Path("x"), {1}]


def of_signature(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """(argument, value of another type) of every argument that says its type, but for self."""
    hints = typing.get_type_hints(function)
    calls: list[tuple[str, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in hints:
            hint, default = hints[parameter.name], parameter.default
            bad = [v for v in ANY if not (suits(v, hint) or v is default)]
            calls += [(parameter.name, value) for value in bad]
    return calls


def suits(value: Any, hint: Any) -> bool:
    """Whether a value may be meant by an annotation; numbers below 0 and NaN never are."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(suits(value, one) for one in args)
    if origin in (int, float):
        number = isinstance(value, int if origin is int else int | float)
        return number and not isinstance(value, bool) and value >= 0
    if origin in (None, types.NoneType):
        return value is None
    if isinstance(origin, type) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, Sequence | Mapping) and args:
        return isinstance(value, origin) and not isinstance(value, str) and len(value) == 0
    if isinstance(origin, type) and getattr(origin, "_is_protocol", False):
        return callable(value)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)
