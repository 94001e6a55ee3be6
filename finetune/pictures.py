"""The table of a shard: a row for each output, with its image or with the frames of its video.

An image is in the column `image`; videos have the column `frames` in its place, a list of such
cells. Both hold PNGs, which `datasets.load_dataset("parquet", ...)` decodes. A video is a row group
of its own, so that a process holds one at a time, and since a column of Arrow holds 2 GB at most.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from steering.outputs import Output

__all__ = ["cells", "num_frames", "read", "write"]

TYPES = {
    "prompt": "string",
    "group": "int64",
    "index": "int64",
    "seed": "int64",
    "steered": "bool",
    "log_weight": "float64",
    "settings": "string",
}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE = {"_type": "Image"}
HELD = {  # column -> type, and feature in the words of `datasets`
    "image": (PICTURE, IMAGE),
    "frames": (pa.list_(PICTURE), {"feature": IMAGE, "_type": "Sequence"}),
}


def cells(output: Output, stem: str) -> dict[str, Any]:
    """Return the column that holds an image or a video, with its content; stem: its name."""
    if isinstance(output, Image.Image):
        return {"image": _cell(output, f"{stem}.png")}
    if isinstance(output, list):
        return {"frames": [_cell(frame, f"{stem}/{i:04d}.png") for i, frame in enumerate(output)]}
    raise ValueError("rollouts hold images or videos, but this pipeline generates sounds")


def _cell(image: Image.Image, name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": name}


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a shard, which have the columns of TYPES and one of `cells`."""
    held = "frames" if "frames" in rows[0] else "image"
    kind, feature = HELD[held]
    features = {n: {"dtype": t, "_type": "Value"} for n, t in TYPES.items()} | {held: feature}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    types = {name: pa.type_for_alias(alias) for name, alias in TYPES.items()}
    schema = pa.schema(types | {held: kind}, about)
    size = 1 if held == "frames" else len(rows)
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), size):
            writer.write_table(pa.Table.from_pylist(rows[start : start + size], schema))


def read(file: Path) -> Iterator[Image.Image | list[Image.Image]]:
    """Yield the RGB image of each row, or the list of its video's frames."""
    with pq.ParquetFile(file) as table:
        held = _held(table)
        for i in range(table.num_row_groups):
            for cell in table.read_row_group(i, [held])[held].to_pylist():
                yield _opened(cell) if held == "image" else [_opened(one) for one in cell]


def num_frames(file: Path) -> int | None:
    """Return the number of frames of each video; None for images."""
    with pq.ParquetFile(file) as table:
        if _held(table) == "image":
            return None
        names = table.read_row_group(0, ["frames.list.element.path"])["frames"].to_pylist()
        return len(names[0])


def _held(table: pq.ParquetFile) -> str:
    return "frames" if "frames" in table.schema_arrow.names else "image"


def _opened(cell: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
