"""Prompts from files: text, one a line, or JSON lines with seeds and reference pictures."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["Prompt", "read", "read_texts"]

_KEYS = {"prompt", "seed", "references"}
MOST_BYTES = 100_000_000  # of a file: what does not end is none of prompts
MOST_CHARACTERS = 100_000  # of a prompt


@dataclass(frozen=True)
class Prompt:
    """What to draw. seed: None for that of the run; references: paths of pictures to compare with.

    Raises ValueError for text that is empty or cannot be written as UTF-8.
    """

    text: str
    seed: int | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("a prompt is empty: write what to draw")
        if "\0" in self.text:  # as of UTF-16, and of what is no text at all
            raise ValueError(f"the prompt {self.text!r:.80} holds a NUL: write it as UTF-8 text")
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(
                f"the prompt {self.text!r:.40}... has {len(self.text)} characters: write at most "
                f"{MOST_CHARACTERS}, of which a text encoder reads the first hundreds"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in self.text):
            raise ValueError(f"the prompt {self.text!r:.80} is not UTF-8: write it as UTF-8")


def read(path: Path) -> list[Prompt]:
    """The prompts of a file, blank lines left out; references are relative to its folder.

    A name that ends in .jsonl holds {"prompt": ..., "seed": ..., "references": [...]} on each line,
    any other one prompt a line. Raises ValueError, with the number of the line, for what is not so.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the prompts of {path!s:.200}: {error.strerror}") from None
    if b"\0" in content:  # as in UTF-16, and in what is no text
        raise ValueError(f"{path} holds NUL bytes and so is no UTF-8 text: save it as UTF-8")
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes: give a file of prompts")
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty: write one prompt a line")
    if path.suffix.lower() != ".jsonl":
        return [_prompt(f"{path} line {i}", line) for i, line in numbered]
    return [_from_json(line, f"{path} line {i}", path.parent) for i, line in numbered]


def read_texts(file: str) -> list[str]:
    """The prompts of a file, each once."""
    return list(dict.fromkeys(prompt.text for prompt in read(Path(file))))


def _prompt(where: str, *fields: Any) -> Prompt:
    try:
        return Prompt(*fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _from_json(line: str, where: str, folder: Path) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        raise ValueError(f"{where} is not JSON ({error}): write one object a line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}')
    for key in sorted(entry.keys() - _KEYS):
        raise ValueError(f"{where} has the key {key!r}: only {', '.join(sorted(_KEYS))} are known")
    seed, references = entry.get("seed"), entry.get("references", [])
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(
            f"{where} has the seed {seed!r:.80}: write a whole number from 0 to 2**63 - 1"
        )
    return _prompt(where, entry["prompt"], seed, _pictures(references, where, folder))


def _pictures(names: Any, where: str, folder: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} has references {names!r:.80}: write a list of picture files")
    for path in (folder / name for name in names):
        if not os.path.isfile(path):  # whatever the name is, a very long one too
            raise ValueError(f"{where} names the picture {path!s:.200}, which is not there")
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(
                f"{where} names {path}, which is no picture that can be read: give a PNG or JPEG"
            ) from None
    return tuple(str(folder / name) for name in names)
