"""Prompts from files: text, one a line, or JSON lines with seeds and reference pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["Prompt", "read"]

_KEYS = {"prompt", "seed", "references"}


@dataclass(frozen=True)
class Prompt:
    """What to draw. seed: None for that of the run; references: paths of pictures to compare with.

    Raises ValueError for text that cannot be written as UTF-8.
    """

    text: str
    seed: int | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in self.text):
            raise ValueError(f"the prompt {self.text!r} is not UTF-8: write it as UTF-8")


def read(path: Path) -> list[Prompt]:
    """The prompts of a file, blank lines left out; references are relative to its folder.

    A name that ends in .jsonl holds {"prompt": ..., "seed": ..., "references": [...]} on each line,
    any other one prompt a line. Raises ValueError, with the number of the line, for what is not so.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the prompts of {path}: {error.strerror}") from None
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty: write one prompt a line")
    if path.suffix != ".jsonl":
        return [Prompt(line) for _, line in numbered]
    return [_from_json(line, f"{path} line {i}", path.parent) for i, line in numbered]


def _from_json(line: str, where: str, folder: Path) -> Prompt:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object a line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}')
    for key in sorted(entry.keys() - _KEYS):
        raise ValueError(f"{where} has the key {key!r}: only {', '.join(sorted(_KEYS))} are known")
    seed, references = entry.get("seed"), entry.get("references", [])
    if seed is not None and type(seed) is not int:
        raise ValueError(f"{where} has the seed {seed!r}: write a whole number")
    return Prompt(entry["prompt"], seed, _pictures(references, where, folder))


def _pictures(names: Any, where: str, folder: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} has references {names!r}: write a list of picture files")
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ValueError(f"{where} names the picture {path}, which is not there")
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(
                f"{where} names {path}, which is no picture that can be read: give a PNG or JPEG"
            ) from None
    return tuple(str(folder / name) for name in names)
