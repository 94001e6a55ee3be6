"""Reading of images and their prompts from folders and .jsonl files, as inputs of a reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import to_images

__all__ = ["PICTURES", "Sample", "batches", "load_batch", "open_picture", "read_samples"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
NAMES = ("image", "file_name", "path")  # keys of the image in a line of a .jsonl file
PROMPTS = ("prompt", "text", "caption")


@dataclass(frozen=True)
class Sample:
    """An image, its prompt, its reference images, and its size (h, w) in pixels."""

    image: Path
    prompt: str
    references: tuple[Path, ...] = ()
    size: tuple[int, int] = (0, 0)


def read_samples(
    source: Path, prompt: str | None = None, exclude: tuple[str, ...] = ()
) -> list[Sample]:
    """Return the images of a folder and its subfolders, or those that a .jsonl file lists.

    A line of the file is {"image": ..., "prompt": ..., "references": [...]} with paths relative to
    the file; "file_name" and "text", as in Hugging Face's image folders, are accepted as well. In
    a folder the prompt is that of its metadata.jsonl, or else that of the JSON text `parameters`
    in the PNG, or else `prompt`. Files whose names end in one of `exclude` are left out. The
    header of every image is read, so that a broken one is refused before any work.
    """
    source = Path(source)
    if source.is_dir():
        samples = list(_of_folder(source, prompt, exclude))
    elif source.is_file() and source.suffix == ".jsonl":
        samples = _of_lines(source, prompt)
    else:
        raise ValueError(f"{source} is neither a folder of images nor a .jsonl file; give one")
    if not samples:
        raise ValueError(f"{source} holds no image ({', '.join(PICTURES)}); give one that does")
    return samples


def _of_folder(folder: Path, prompt: str | None, exclude: tuple[str, ...]) -> Iterator[Sample]:
    if (folder / "metadata.jsonl").is_file():
        yield from _of_lines(folder / "metadata.jsonl", prompt)
        return
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
    paths = [path for path in paths if not path.name.endswith(exclude)]
    headers = [_header(path) for path in paths]
    if any("prompt" in about for about, _ in headers):  # a run; its grids have none
        pairs = zip(paths, headers, strict=True)
        paths = [path for path, (about, _) in pairs if "prompt" in about]
        headers = [header for header in headers if "prompt" in header[0]]
    for path, (about, size) in zip(paths, headers, strict=True):
        text = about.get("prompt", prompt)
        if not isinstance(text, str):
            raise ValueError(
                f"{path} has no prompt in its metadata; give prompt, which is used for all images, "
                'or a metadata.jsonl of {"file_name": ..., "prompt": ...}'
            )
        yield Sample(path, text, (), size)


def _of_lines(file: Path, prompt: str | None) -> list[Sample]:
    samples = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            samples.append(_of_line(line, f"{file} line {number}", file.parent, prompt))
    return samples


def _of_line(line: str, where: str, folder: Path, prompt: str | None) -> Sample:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number may have too many digits
        raise ValueError(f"{where} is not JSON ({error}): write one object per line") from None
    if not isinstance(entry, dict):
        raise ValueError(f'{where} is not an object: write {{"image": ..., "prompt": ...}}')
    image = next((entry[name] for name in NAMES if name in entry), None)
    text = next((entry[name] for name in PROMPTS if name in entry), prompt)
    references = entry.get("references", [])
    if not isinstance(image, str) or not isinstance(text, str):
        raise ValueError(f'{where} needs both: {{"image": "a.png", "prompt": "a red star"}}')
    if not isinstance(references, list) or not all(isinstance(name, str) for name in references):
        raise ValueError(f"{where} has references {references!r:.80}: write a list of image files")
    path = folder / image
    others = tuple(folder / name for name in references)
    sizes = [_header(file)[1] for file in (path, *others)]
    return Sample(path, text, others, sizes[0])


def _header(path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return the JSON object in the text `parameters` of the image, or {}, and its size (h, w)."""
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {}).get("parameters", "{}")
            size, mode = (picture.height, picture.width), picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{str(path)[-200:]} is no readable image: give a PNG or JPEG") from None
    if mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits, to white
        raise ValueError(f"{path} has more than 8 bits per channel ({mode}): convert it to 8 first")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = {}  # written by another program
    return about if isinstance(about, dict) else {}, size


def open_picture(path: Path) -> Image.Image:
    """Return the image as RGB; raises ValueError if the file is truncated."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read to its end ({error}); write it again") from None


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Batches of at most `size` consecutive samples whose images have one size."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == size or sample.size != batch[0].size):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def load_batch(
    samples: Sequence[Sample], device: torch.device | str | None = None
) -> tuple[Tensor, list[str], list[list[Image.Image]] | None]:
    """Return the images (n, 3, h, w), prompts, and references or None, as a reward takes them."""
    images = to_images([open_picture(sample.image) for sample in samples], device)
    references = [[open_picture(path) for path in sample.references] for sample in samples]
    prompts = [sample.prompt for sample in samples]
    return images, prompts, references if any(references) else None
