"""Reference images, which a critic learns to distinguish from samples.

They are resized to the samples' size, so that sharpness or shape does not reveal them. Images from
JPEG files still have compression artefacts, which samples do not have.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["References", "digest", "load_references"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Source = Path | bytes  # a file, or its content


class References:
    """Reference images by prompt, or of one style for all prompts (unpaired, stored under "").

    size: (h, w) of drawn images: the centre of a reference, resized (bicubic). Every image is
    decoded once here. Raises ValueError for fewer than two images, and for unreadable ones, by
    name.
    """

    def __init__(
        self, pictures: Mapping[str, Sequence[Source]], size: tuple[int, int], *, paired: bool
    ) -> None:
        self.size, self.paired = size, paired
        every = [(prompt, source) for prompt, found in pictures.items() for source in found]
        if len(every) < 2:
            raise ValueError(
                f"a critic needs at least two reference images but got {len(every)}; "
                "200 are enough for a style"
            )
        bad = [name for i, (p, x) in enumerate(every) if (name := _fault(x, f"{p!r} {i}"))]
        if bad:
            more = f" and {len(bad) - 5} more" if bad[5:] else ""
            raise ValueError(
                f"{len(bad)} of {len(every)} reference images cannot be read: "
                f"{'; '.join(bad[:5])}{more}; repair or remove them"
            )
        self.pictures: dict[str, list[Source]] = {}
        for prompt, source in every:
            self.pictures.setdefault(prompt if paired else "", []).append(source)

    def __len__(self) -> int:
        return sum(map(len, self.pictures.values()))

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts without a reference; does nothing if unpaired."""
        missing = [p for p in dict.fromkeys(prompts) if self.paired and p not in self.pictures]
        if missing:
            count = "1 prompt has" if len(missing) == 1 else f"{len(missing)} prompts have"
            raise ValueError(
                f"{count} no reference image, {missing[:3]}"
                + (" and more" if missing[3:] else "")
                + "; add some, leave the prompts out, or use the references unpaired"
            )

    def draw(self, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Draw an image per prompt, (n, 3, h, w) in [0, 1]; none twice until all were drawn."""
        self.check(prompts)
        left: dict[str, list[int]] = {}
        drawn = []
        for prompt in prompts:
            key = prompt if self.paired else ""
            if not left.get(key):
                left[key] = torch.randperm(len(self.pictures[key]), generator=generator).tolist()
            drawn.append(_tensor(self.pictures[key][left[key].pop()], self.size))
        return torch.stack(drawn)


def load_references(source: str | Path, size: tuple[int, int], *, paired: bool) -> References:
    """Load references from a folder of images, a table, or a .json of `{prompt: [files]}`.

    A table is a .parquet file, a folder of such files, or a folder that `datasets` wrote with
    save_to_disk; its columns are `image` and, if paired, `prompt`. Paths in a file are relative to
    its folder. Raises ValueError for anything else.
    """
    pictures = _pictures(Path(os.path.expanduser(source)), paired)
    try:
        return References(pictures, size, paired=paired)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def digest(source: str | Path, *, paired: bool) -> str:
    """Return a sha256 of the images' contents, their order and their prompts.

    File names do not matter, and unreadable files count as empty. Raises as `load_references`.
    """
    found = hashlib.sha256()
    for prompt, pictures in _pictures(Path(os.path.expanduser(source)), paired).items():
        for picture in pictures:
            content = picture if isinstance(picture, bytes) else _content(picture)
            found.update(f"{prompt}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError):
        return b""


def _pictures(source: Path, paired: bool) -> dict[str, list[Source]]:
    """Return images by prompt, or all under ""; raises ValueError for an unknown source."""
    unknown = (
        f"the references {str(source)!r:.80} are neither a folder, a .json nor a .parquet file "
        "that exists; give one"
    )
    if not os.path.exists(source):  # not Path.exists, which raises for names that are not valid
        raise ValueError(unknown)
    if source.suffix == ".json" and source.is_file():
        return _of_json(source)
    if tables := _tables(source):
        return _of_tables(source, tables, paired)
    if not source.is_dir():
        raise ValueError(unknown)
    if paired:
        raise ValueError(
            f"{source} holds images but not their prompts; give a .json of "
            '{"prompt": ["file", ...]}, or use the references unpaired'
        )
    return {"": sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES)}


def _of_json(file: Path) -> dict[str, list[Source]]:
    found = _json(file)
    rows = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(row, list) and all(isinstance(x, str) for x in row) for row in rows):
        raise ValueError(f'{file} must hold {{"prompt": ["file", ...], ...}} and nothing else')
    return {prompt: [file.parent / name for name in names] for prompt, names in found.items()}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); repair it") from None


def _tables(source: Path) -> list[Path]:
    if source.suffix == ".parquet" and source.is_file():
        return [source]
    if (source / "state.json").is_file():  # datasets.Dataset.save_to_disk
        state = _json(source / "state.json")
        try:
            return [source / row["filename"] for row in state["_data_files"]]
        except (LookupError, TypeError):
            raise ValueError(
                f"{source / 'state.json'} does not list tables, as that of datasets' save_to_disk "
                "does; give the folder that it wrote"
            ) from None
    return sorted(source.glob("*.parquet"))


def _of_tables(source: Path, files: Sequence[Path], paired: bool) -> dict[str, list[Source]]:
    wanted = ["image", "prompt"] if paired else ["image"]
    pictures: dict[str, list[Source]] = {}
    for file in files:
        table = _table(file)
        missing = [name for name in wanted if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{source} has columns {table.column_names} but {missing} are needed; rename them"
            )
        for row in table.select(wanted).to_pylist():
            pictures.setdefault(row.get("prompt", ""), []).append(_source(row["image"], file))
    return pictures


def _table(file: Path) -> Any:
    try:
        if file.suffix != ".arrow":
            return pq.read_table(file)
        with pa.memory_map(str(file)) as stored:
            return pa.ipc.open_stream(stored).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{file} is no readable table ({said:.120}); repair it") from None


def _source(image: Any, file: Path) -> Source:
    """Return a cell's image: bytes, or the struct {bytes, path} of Hugging Face's images."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return image if isinstance(image, bytes) else file.parent / str(image)


def _fault(source: Source, label: str) -> str:
    """Return the name of an unreadable image and the reason, or ""."""
    try:
        _open(source)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0][:80]
        return f"{source if isinstance(source, Path) else f'row {label}'} ({reason})"
    return ""


def _open(source: Source) -> Image.Image:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        if picture.mode.partition(";")[0] in ("I", "F"):
            raise ValueError("more than 8 bits per channel; save it with 8")
        return ImageOps.exif_transpose(picture).convert("RGB")


def _tensor(source: Source, size: tuple[int, int]) -> Tensor:
    height, width = size
    picture = ImageOps.fit(_open(source), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
