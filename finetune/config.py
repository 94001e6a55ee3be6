"""Settings from a YAML file and `key=value` words into a dataclass, and back.

Unknown keys, wrong types and values out of range are refused, each in one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["explain", "read", "write"]

T = TypeVar("T")


def read(kind: type[T], file: Path | None = None, words: Sequence[str] = ()) -> T:
    """A `kind`, a dataclass, from its defaults, then the file, then the words (later ones win).

    Words are `key=value`, or `key.inner=value` for a dataclass inside; values are read as YAML.
    """
    merged = OmegaConf.structured(kind)
    try:
        if file is not None:
            merged = _merge(merged, OmegaConf.load(file), kind, str(file))
        for word in words:
            if "=" not in word:
                raise ValueError(f"{word!r} is no setting; write key=value, as in steps=200")
        merged = _merge(merged, OmegaConf.from_dotlist(list(words)), kind, "the command line")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"the settings {file} cannot be read: {error.strerror}") from None
    except OmegaConfBaseException as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the settings are wrong: {said}") from None


def _merge(known: Any, given: Any, kind: type, where: str) -> Any:
    if given is None or not OmegaConf.is_dict(given):
        raise ValueError(f"{where} holds no settings; write lines such as 'steps: 200'")
    names, free = _names(kind), _free(kind)
    for key in _keys(given):
        if key not in names and not key.startswith(free):
            close = get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {names}"
            raise ValueError(f"{where} sets {key!r}, which is unknown; {hint}")
    return OmegaConf.merge(known, given)


def _free(kind: type, prefix: str = "") -> tuple[str, ...]:
    """The fields that are dicts, whose keys are somebody else's, with a dot behind each."""
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
    """The resolved settings as YAML, which `read` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), path)


def explain(kind: type, notes: dict[str, str]) -> str:
    """`key: default` lines with a note each, for a script's --help."""
    values = OmegaConf.structured(kind)
    width = max(map(len, _names(kind)))
    lines = []
    for name in _names(kind):
        default = OmegaConf.select(values, name)
        lines.append(f"  {name:{width}}  {notes.get(name, '')} (default: {default})")
    return "\n".join(lines)
