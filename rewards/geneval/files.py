"""Files with one JSON object a line, each for a prompt, as GenEval and GenEval 2 publish them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read_by_prompt"]

T = TypeVar("T")


def read_by_prompt(
    path: str | Path, what: str, example: str, read: Callable[[Any], T]
) -> dict[str, T]:
    """Return read(object) of each line of a .jsonl file, by the object's "prompt".

    Raises ValueError if the file is missing, empty or not UTF-8, and for a line that `read` refuses
    or that contradicts an earlier one of its prompt.

    Args:
        path: The file; ~ is the home folder.
        what: What the file is, in messages.
        example: A published file of this format, in messages.
        read: Makes the entry of a line; it may raise ValueError, TypeError, LookupError and
            AttributeError.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ValueError(f"there is no {what} {str(path)!r}; give {example}, or one like it")
    try:
        # not splitlines(), which also splits at other characters that a prompt may contain
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    found: dict[str, T] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, entry = _prompt(record["prompt"]), read(record)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path} is not like those of {example}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if found.setdefault(prompt, entry) != entry:
            raise ValueError(
                f"line {number} of {path} contradicts an earlier line of the same prompt "
                f"{prompt!r}; keep one of them"
            )
    if not found:
        raise ValueError(f"the {what} {str(path)!r} is empty; give one with prompts")
    return found


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the prompt is {value!r:.80} but must be text")
    return value.strip()
