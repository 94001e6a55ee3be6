"""Reading of prompt files: one prompt per line, or JSON lines with seeds and images."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["Prompt", "read", "read_texts"]

_KEYS = {"prompt", "seed", "references", "image"}
MOST_BYTES = 100_000_000  # per file; larger files are not files of prompts
MOST_CHARACTERS = 100_000  # per prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt; seed: None for the run's seed; references: paths of images to compare with.

    image: path of the image that the prompt edits, or None. Raises ValueError for text that is
    empty or cannot be encoded as UTF-8.
    """

    text: str
    seed: int | None = None
    references: tuple[str, ...] = ()
    image: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("a prompt is empty: write what to draw")
        if "\0" in self.text:  # from UTF-16 or binary data
            raise ValueError(f"the prompt {self.text!r:.80} holds a NUL: write it as UTF-8 text")
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(
                f"the prompt {self.text!r:.40}... has {len(self.text)} characters: write at most "
                f"{MOST_CHARACTERS}, of which a text encoder reads the first hundreds"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in self.text):
            raise ValueError(f"the prompt {self.text!r:.80} is not UTF-8: write it as UTF-8")


def read(path: Path, images: bool = False) -> list[Prompt]:
    """Read the prompts of a file, without blank lines; image files are relative to its folder.

    A .jsonl file has {"prompt": ..., "seed": ..., "references": [...], "image": ...} on each line,
    any other file one prompt per line. images: whether prompts may edit an image. Raises
    ValueError, with the number of the line, for invalid lines.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the prompts of {path!s:.200}: {error.strerror}") from None
    if b"\0" in content:  # UTF-16 or binary data
        raise ValueError(f"{path} holds NUL bytes, so it is not UTF-8 text: save it as UTF-8")
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes: give a file of prompts")
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty: write one prompt per line")
    if path.suffix.lower() != ".jsonl":
        return [_prompt(f"{path} line {i}", line) for i, line in numbered]
    prompts = [_from_json(line, f"{path} line {i}", path.parent) for i, line in numbered]
    if not images:
        for (i, _), prompt in zip(numbered, prompts, strict=True):
            if prompt.image is not None:
                raise ValueError(
                    f"{path} line {i} has an image to edit, which only tilt steer passes to the "
                    "pipeline: leave it out"
                )
    return prompts


def read_texts(file: str) -> list[str]:
    """Read the texts of a file's prompts, without repetitions."""
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
        raise ValueError(f"{where} is not JSON ({error}): write one object per line") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} has no prompt: write {{"prompt": "..."}}')
    for key in sorted(entry.keys() - _KEYS):
        raise ValueError(f"{where} has the key {key!r}: only {', '.join(sorted(_KEYS))} are known")
    seed, references = entry.get("seed"), entry.get("references", [])
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(
            f"{where} has the seed {seed!r:.80}: write a whole number from 0 to 2**63 - 1"
        )
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"{where} has the image {image!r:.80}: write the name of an image file")
    edited = _pictures([] if image is None else [image], where, folder)
    others = _pictures(references, where, folder)
    return _prompt(where, entry["prompt"], seed, others, *edited)


def _pictures(names: Any, where: str, folder: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} has references {names!r:.80}: write a list of image files")
    for path in (folder / name for name in names):
        if not os.path.isfile(path):  # works for any name, even a very long one
            raise ValueError(f"{where} names the image {path!s:.200}, which does not exist")
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise ValueError(
                f"{where} names {path}, which is not a readable image: give a PNG or JPEG"
            ) from None
    return tuple(str(folder / name) for name in names)
