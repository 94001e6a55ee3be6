"""Reading rollouts: the shards of a finished run, and the rewards that are added to them."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .files import atomic

__all__ = ["Rollouts", "Shard", "add_rewards", "is_whole", "read_manifest", "sha256"]

AGAIN = "delete it and score the rollouts again"


def _numbers(values: Sequence[float | None]) -> list[float]:
    """A null of a table that others wrote is no score."""
    return [math.nan if value is None else value for value in values]


@dataclass(frozen=True)
class Shard:
    """One finished shard; tensors are read when they are asked for."""

    folder: Path

    def table(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows, of these columns or all."""
        return pq.read_table(self.folder / "table.parquet", columns=columns).to_pylist()

    def images(self) -> list[Image.Image]:
        """The pictures, RGB, in the rows' order."""
        rows = self.table(["image"])
        return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]

    def tensors(self) -> dict[str, Tensor]:
        """ "latents" (rows, ...) and "given.NAME" (prompts, ...), mapped: read where touched."""
        with safe_open(self.folder / "tensors.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def rewards(self) -> dict[str, list[float]]:
        """The columns that were added, by name; none yet is {}. ValueError for a damaged file."""
        file = self.folder / "rewards.parquet"
        if not file.exists():
            return {}
        count = pq.read_metadata(self.folder / "table.parquet").num_rows
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} is damaged ({error}); {AGAIN}") from None
        kinds = {str(column.type) for column in table.columns}
        if table.num_rows != count or kinds - {"double", "float"}:
            raise ValueError(f"{file} is not a number for each of {count} images; {AGAIN}")
        return {name: _numbers(values) for name, values in table.to_pydict().items()}

    def scored_by(self, column: str = "reward") -> str:
        """The spec that a column was scored by, or ""."""
        return self.specs().get(column, "")

    def specs(self) -> dict[str, str]:
        """The specs that the columns were scored by, where it is known: {column: spec}."""
        return self._about("specs")

    def versions(self) -> dict[str, str]:
        """`rewards.identity` of the specs when the columns were scored, where it is known."""
        return self._about("versions")

    def bounds(self) -> dict[str, list[float | None]]:
        """The least and the most that a column's reward can be, where it is known."""
        return self._about("bounds")

    def _about(self, what: str) -> dict[str, Any]:
        """What is known of the columns beside their values, by column."""
        file = self.folder / "rewards.parquet"
        try:
            about = pq.read_schema(file).metadata if file.exists() else None
            return dict(json.loads((about or {}).get(what.encode(), b"{}")))
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"{file} is damaged ({error}); {AGAIN}") from None


class Rollouts:
    """A finished run. ValueError names shards that are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder / "manifest.json")
        plan = self.manifest["plan"]
        self.folder = folder
        count = -(-len(plan["prompts"]) // plan["prompts_per_shard"])
        self.shards = [Shard(folder / f"{i:05d}") for i in range(count)]
        broken = [shard.folder.name for shard in self.shards if not is_whole(shard.folder)]
        if broken:
            raise ValueError(
                f"{folder} lacks, or has damaged, the shards {', '.join(broken[:5])}"
                f"{' and more' if broken[5:] else ''}; make the rollouts again with resume=true"
            )

    def digest(self, column: str) -> str:
        """What tells this run with these rewards from another, or from itself scored anew."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update((shard.folder / "shard.json").read_bytes())
            found.update(json.dumps(shard.rewards().get(column)).encode())
        return found.hexdigest()


def read_manifest(file: Path) -> dict[str, Any]:
    """What a run's manifest.json says; ValueError for one of something else, or a damaged one."""
    needed = {"pipeline", "model", "weights", "plan"}
    planned = {
        "prompts": list,
        "call": dict,
        "prompts_per_shard": int,
        "images": int,
        "steered": int,
    }
    found: Any = None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        plan = found["plan"]
        fits = needed <= found.keys() and plan["prompts_per_shard"] > 0 and plan["prompts"]
        fits = fits and all(isinstance(plan[name], kind) for name, kind in planned.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{file.parent} holds no rollouts; make some first")
    return found


def add_rewards(
    shard: Shard,
    columns: Mapping[str, Sequence[float]],
    spec: str = "",
    bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
    version: str = "",
) -> None:
    """Add or replace columns of rewards, whole or not at all; spec: what these were scored by.

    bounds: the range of the rewards of a column; version: `rewards.identity(spec)`. Columns of
    other names stay as they are, with what they were scored by.
    """
    merged = shard.rewards() | {name: list(values) for name, values in columns.items()}
    kept = {name: ends for name, ends in shard.bounds().items() if name not in columns}
    about = {
        "specs": json.dumps(shard.specs() | dict.fromkeys(columns, spec)),
        "versions": json.dumps(shard.versions() | dict.fromkeys(columns, version)),
        "bounds": json.dumps(kept | dict(bounds or {})),
    }
    table = pa.table({k: pa.array(v, pa.float64()) for k, v in merged.items()})
    with atomic(shard.folder / "rewards.parquet") as scratch:
        pq.write_table(table.replace_schema_metadata(about), scratch)


def is_whole(folder: Path) -> bool:
    """Whether the folder of a shard is there and holds what was written."""
    try:
        hashes = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        return all(sha256(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:  # a piece at a time: shards may be large
        return hashlib.file_digest(file, "sha256").hexdigest()
