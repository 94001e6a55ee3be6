"""Reading of rollouts: the shards of a finished run, and the rewards added to them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from steering.frames import Frames

from . import pictures
from .files import atomic

__all__ = [
    "Rollouts",
    "Shard",
    "add_rewards",
    "check_alike",
    "digest",
    "is_whole",
    "read_manifest",
    "sha256",
]

NOTE = "lora.json"  # what a shard was drawn by, if the rollouts followed a training run
AGAIN = "delete it and score the rollouts again"


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Return the values with nulls, which tables of other programs may have, as NaN."""
    return [math.nan if value is None else value for value in values]


@dataclass(frozen=True)
class Shard:
    """One finished shard; its files are read on demand."""

    folder: Path

    def table(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows, with these columns or all."""
        return pq.read_table(self.folder / "table.parquet", columns=columns).to_pylist()

    def images(self) -> Iterator[Image.Image | list[Image.Image]]:
        """Yield the RGB images, or the lists of the videos' frames, in the rows' order."""
        return pictures.read(self.folder / "table.parquet")

    def num_frames(self) -> int | None:
        """Return the number of frames of each video; None for images."""
        return pictures.num_frames(self.folder / "table.parquet")

    def tensors(self) -> dict[str, Tensor]:
        """Return "latents" (rows, ...) and each prompt's "given.INDEX.NAME", memory-mapped."""
        with safe_open(self.folder / "tensors.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def form(self) -> str:
        """Return the form of the conditioning; ValueError without one."""
        with safe_open(self.folder / "tensors.safetensors", "pt") as file:
            about = file.metadata() or {}
        if "form" not in about:
            raise ValueError(
                f"{self.folder} was made by an earlier version, which recorded less of the "
                "pipeline's call; make the rollouts again"
            )
        return about["form"]

    def rewards(self) -> dict[str, list[float]]:
        """Return the added columns by name, {} if there are none; ValueError for a damaged file."""
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
            raise ValueError(f"{file} does not hold a number for each of {count} images; {AGAIN}")
        return {name: _numbers(values) for name, values in table.to_pydict().items()}

    def lora_step(self) -> int:
        """Return the step of training whose LoRA drew the shard; 0 if no training was followed."""
        file = self.folder / NOTE
        return int(json.loads(file.read_text(encoding="utf-8"))["step"]) if file.exists() else 0

    def scored_by(self, column: str = "reward") -> str:
        """Return the spec by which a column was scored, or ""."""
        return self.specs().get(column, "")

    def specs(self) -> dict[str, str]:
        """Return the specs by which the columns were scored, where known: {column: spec}."""
        return self._about("specs")

    def versions(self) -> dict[str, str]:
        """Return `rewards.identity` of the specs at the time of scoring, where known."""
        return self._about("versions")

    def frames(self) -> dict[str, Frames]:
        """Return which frames the scores of videos are of, and how, by column, where known."""
        return {name: Frames(*about) for name, about in self._about("frames").items()}

    def bounds(self) -> dict[str, list[float | None]]:
        """Return the smallest and largest possible reward of each column, where known."""
        return self._about("bounds")

    def _about(self, what: str) -> dict[str, Any]:
        """Return an entry of the metadata about the columns, by column."""
        file = self.folder / "rewards.parquet"
        try:
            about = pq.read_schema(file).metadata if file.exists() else None
            return dict(json.loads((about or {}).get(what.encode(), b"{}")))
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"{file} is damaged ({error}); {AGAIN}") from None


class Rollouts:
    """A run of rollouts.

    growing: whether other processes still draw it, so that shards may be missing; without it,
    missing or damaged shards raise ValueError. known: names of shards that need no further check.
    """

    def __init__(self, folder: Path, growing: bool = False, known: Collection[str] = ()) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder / "manifest.json")
        plan = self.manifest["plan"]
        self.folder = folder
        count = -(-len(plan["prompts"]) // plan["prompts_per_shard"])
        self.shards = [Shard(folder / f"{i:05d}") for i in range(count)]
        names = [shard.folder.name for shard in self.shards]
        broken = [name for name in names if name not in known and not is_whole(folder / name)]
        self.is_complete = not broken
        if growing:
            self.shards = [shard for shard in self.shards if shard.folder.name not in broken]
        elif broken:
            raise ValueError(
                f"{folder} lacks, or has damaged, the shards {', '.join(broken[:5])}"
                f"{' and more' if broken[5:] else ''}; make the rollouts again with resume=true"
            )

    def weights(self) -> str:
        """Return a sha256 of the run's request, which does not change while it grows."""
        return sha256(self.folder / "manifest.json")

    def digest(self, column: str) -> str:
        """Return a sha256 of the run and one column of rewards, which changes if it is rescored."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update((shard.folder / "shard.json").read_bytes())
            found.update(json.dumps(shard.rewards().get(column)).encode())
        return found.hexdigest()


def check_alike(runs: Sequence[Rollouts], named: bool = False) -> None:
    """Raise ValueError if runs are given twice, or were not drawn by one model.

    named: whether the user names the model, so that the runs may have other names for it. Runs of
    different LoRAs are of one model.
    """
    first, *others = runs
    twice = {run.folder.resolve() for run in runs}
    if len(twice) < len(runs):
        raise ValueError(f"rollouts are {[str(run.folder) for run in runs]}; give each once")
    for run in others:
        a, b = first.manifest, run.manifest
        names = ["pipeline"] + ["model"] * (not named)
        names += ["weights"] * (a.get("lora") == b.get("lora"))
        for name in names:
            if a.get(name) != b.get(name):
                said = "of other weights" if name == "weights" else f"{b.get(name)!r}"
                raise ValueError(
                    f"{run.folder} and {first.folder} were drawn by different models ({name}: "
                    f"{said}, not {'these' if name == 'weights' else repr(a.get(name))}); train "
                    "on those of one model"
                )


def digest(runs: Sequence[Rollouts], column: str) -> str:
    """Return a sha256 of the runs and one column of rewards."""
    found = [run.digest(column) for run in runs]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a run's manifest.json; raises ValueError if it is damaged or is not that of rollouts."""
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
    frames: Frames | None = None,
) -> None:
    """Add or replace columns of rewards atomically; spec: the reward that scored them.

    bounds: the range of the rewards of a column; version: `rewards.identity(spec)`; frames: which
    frames of videos were scored. Other columns and their metadata are kept.
    """
    merged = shard.rewards() | {name: list(values) for name, values in columns.items()}
    kept = {name: ends for name, ends in shard.bounds().items() if name not in columns}
    about = {
        "specs": json.dumps(shard.specs() | dict.fromkeys(columns, spec)),
        "versions": json.dumps(shard.versions() | dict.fromkeys(columns, version)),
        "bounds": json.dumps(kept | dict(bounds or {})),
    }
    of_videos = {name: value for name, value in shard.frames().items() if name not in columns}
    of_videos |= dict.fromkeys(columns, frames) if frames else {}
    if of_videos:
        about["frames"] = json.dumps({n: [f.which, f.score] for n, f in of_videos.items()})
    table = pa.table({k: pa.array(v, pa.float64()) for k, v in merged.items()})
    with atomic(shard.folder / "rewards.parquet") as scratch:
        pq.write_table(table.replace_schema_metadata(about), scratch)


def is_whole(folder: Path) -> bool:
    """Return whether the folder of a shard exists and its files are unchanged."""
    try:
        hashes = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        return all(sha256(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:  # read in pieces, since shards may be large
        return hashlib.file_digest(file, "sha256").hexdigest()
