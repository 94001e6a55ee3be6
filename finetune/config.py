"""Read a dataclass of settings from a YAML file and `key=value` words, and write it.

Unknown keys, wrong types and values out of range raise a ValueError of one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .ranges import Range

__all__ = ["read", "write"]

T = TypeVar("T")


def read(kind: type[T], file: Path | None = None, words: Sequence[str] = ()) -> T:
    """Return a `kind`, a dataclass, from its defaults, the file and the words; later ones win.

    Words are `key=value`, or `key.inner=value` for a nested dataclass; values are parsed as YAML.
    """
    merged: Any = OmegaConf.structured(kind)
    try:
        if file is not None:
            merged = _merge(merged, _loaded(file), kind, str(file))
        for word in words:
            if "=" not in word:
                raise ValueError(f"{word!r:.80} is no setting; write key=value, as in steps=200")
            key, _, value = word.partition("=")
            if not value.strip():  # null in YAML, but in a shell perhaps an unset variable
                raise ValueError(f"{key:.80}= has no value; write {key:.80}=null for none")
            with _read_as(f"{word!r:.80}"):
                given = OmegaConf.from_dotlist([word])
            merged = _merge(merged, given, kind, "the command line")
        _check(kind, OmegaConf.to_container(merged, resolve=True))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        said, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
        allowed = _ranges(kind).get(key or "")
        if allowed and said.startswith("Value "):
            value = said.removeprefix("Value ").partition(" of type ")[0]
            raise ValueError(f"{key} is {value:.80} but must be {allowed.said}") from None
        where = f"the setting {key} is" if key else "the settings are"
        raise ValueError(f"{where} wrong: {said:.200}") from None


def _loaded(file: Path) -> Any:
    with _read_as(f"the settings {file}"):
        try:
            return OmegaConf.load(file)
        except OmegaConfBaseException as error:
            raise ValueError(str(error).partition("\n")[0]) from None


@contextmanager
def _read_as(what: str) -> Iterator[None]:
    """Turn any error of reading YAML into one sentence."""
    try:
        yield
    except OmegaConfBaseException:
        raise
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None
    except (YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        said = " ".join(str(reason or error).split())
        if "integer string" in said:  # Python's message advises to raise its limit
            said = "a number has thousands of digits"
        raise ValueError(f"{what} cannot be read as YAML ({said:.120}{place})") from None


def _check(kind: type, values: Any, prefix: str = "") -> None:
    """Check all settings against their ranges, recursively."""
    known: dict[str, Range] = getattr(kind, "RANGES", {})
    for field in dataclasses.fields(kind):
        inner, value = field.default_factory, values[field.name]
        allowed = field.metadata.get("range", known.get(field.name))
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            _check(inner, value, f"{prefix}{field.name}.")
        elif allowed:
            allowed.check(prefix + field.name, value)


def _merge(known: Any, given: Any, kind: type, where: str) -> Any:
    if given is None or not OmegaConf.is_dict(given):
        raise ValueError(f"{where} holds no settings; write lines such as 'steps: 200'")
    names, free = _names(kind), _free(kind)
    for key in _keys(given):
        if key not in names and not key.startswith(free):
            owner = next((name for name in names if key.startswith(f"{name}.")), "")
            inside = OmegaConf.select(given, owner) if owner else None
            if OmegaConf.is_config(inside) and (allowed := _ranges(kind).get(owner)):
                allowed.check(owner, OmegaConf.to_container(inside))  # a group, not one value
            inner = [name for name in names if name.startswith(f"{key}.")]
            if inner:
                group = f"{key!r}, which is a group; set one of its settings, such as {inner[0]}"
                raise ValueError(f"{where} sets {group}")
            close = get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {names}"
            raise ValueError(f"{where} sets {key!r:.80}, which is unknown; {hint}")
    for key in _keys(given):  # one name is a list of one
        value = OmegaConf.select(given, key)
        if isinstance(value, str) and OmegaConf.is_list(OmegaConf.select(known, key)):
            OmegaConf.update(given, key, [value])
    _check_flags(known, given)
    return OmegaConf.merge(known, given)


def _check_flags(known: Any, given: Any, prefix: str = "") -> None:
    """Refuse values other than bool for flags, since OmegaConf accepts numbers and some words."""
    for key, value in given.items():
        inner = OmegaConf.is_dict(value) and len(value)
        default = OmegaConf.select(known, key) if isinstance(key, str) else None
        if inner and OmegaConf.is_dict(default):
            _check_flags(default, value, f"{prefix}{key}.")
        elif OmegaConf.is_dict(default) and not OmegaConf.is_dict(value):
            raise ValueError(
                f"the setting {prefix}{key} is {value!s:.60} but is a group of settings; write "
                f"{prefix}{key}.NAME=VALUE"
            )
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{prefix}{key} is {value!r:.80} but must be true or false")


def _free(kind: type, prefix: str = "") -> tuple[str, ...]:
    """Return the names of dict fields, which accept any key, each followed by a dot."""
    found: tuple[str, ...] = ()
    for field in dataclasses.fields(kind):
        inner, name = field.default_factory, f"{prefix}{field.name}."
        if inner is dict:
            found += (name,)
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found += _free(inner, name)
    return found


def _keys(given: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in given.items():
        name = f"{prefix}{key}"
        inner = OmegaConf.is_dict(value) and len(value)
        found += _keys(value, f"{name}.") if inner else [name]
    return found


def _names(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            names += _names(inner, f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def write(config: Any, path: Path) -> None:
    """Write the resolved settings as YAML, which `read` can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), path)


def _ranges(kind: type, prefix: str = "") -> dict[str, Range]:
    found = {f"{prefix}{name}": one for name, one in getattr(kind, "RANGES", {}).items()}
    for field in dataclasses.fields(kind):
        if "range" in field.metadata:
            found[f"{prefix}{field.name}"] = field.metadata["range"]
        inner = field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found |= _ranges(inner, f"{prefix}{field.name}.")
    return found
