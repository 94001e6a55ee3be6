"""Rollouts: images of many prompts, made once, with all that training needs of them.

A run is a folder of shards, a few prompts each:

    manifest.json                  what made it: model, call, filter, seed, versions
    00012/table.parquet            a row an image: prompt, group, index, seed, steered, log_weight,
                                   settings, image (PNG); `datasets.load_dataset("parquet", ...)`
    00012/tensors.safetensors      latents (rows, ...) and conditioning (a row a prompt)
    00012/shard.json               sha256 of both
    00012/rewards.parquet          columns that scripts/score.py adds, in the rows' order

A shard is written under another name and renamed, so it is there whole or not at all. Which images
a prompt gets depends on the seed and the prompt alone, not on shards or processes: each prompt is
drawn in calls of its own. (`max_batch` and other kernels: the same pictures, docs/checked.md.)
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steering import FeynmanKac, Steered
from steering.lineage import Moment
from steering.manifest import fingerprint, versions
from steering.pipeline import steer_each

from . import ranges
from .models import encode, family_of
from .ranges import KEYWORDS, PROMPTS, SEED, Range, group, optional, whole

__all__ = [
    "PLAIN",
    "Plan",
    "Rollouts",
    "Shard",
    "add_rewards",
    "check",
    "generate",
    "is_complete",
    "nothing",
    "open_run",
]

PLAIN = FeynmanKac(reward_scale=0.0, min_ess=0.0, noise=0.0)  # the pipeline's own sampler
FEATURES = {
    "prompt": {"dtype": "string", "_type": "Value"},
    "group": {"dtype": "int64", "_type": "Value"},
    "index": {"dtype": "int64", "_type": "Value"},
    "seed": {"dtype": "int64", "_type": "Value"},
    "steered": {"dtype": "bool", "_type": "Value"},
    "log_weight": {"dtype": "float64", "_type": "Value"},
    "settings": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
}


@dataclass(frozen=True)
class Plan:
    """What to make: `images` plain ones a prompt and `steered` by the filter.

    call: keywords of the pipeline's call. The steered ones start from noise of their own.
    """

    prompts: tuple[str, ...]
    images: int = 16
    steered: int = 0
    settings: FeynmanKac = field(default_factory=FeynmanKac)
    seed: int = 0
    prompts_per_shard: int = 4
    max_batch: int | None = None
    call: dict[str, Any] = field(default_factory=dict)

    RANGES: ClassVar[dict[str, Range]] = {
        "prompts": PROMPTS,
        "images": whole(0, 10_000),
        "steered": whole(0, 10_000),
        "settings": group(FeynmanKac),
        "seed": SEED,
        "prompts_per_shard": whole(1),
        "max_batch": optional(whole(1)),
        "call": KEYWORDS,
    }

    def __post_init__(self) -> None:
        ranges.check(self, self.RANGES)
        counts = {"images": self.images, "steered": self.steered}
        if sum(counts.values()) < 2:
            raise ValueError(f"{counts} make no group; ask for two images a prompt or more")
        if self.steered == 1:
            raise ValueError("steered is 1, which is no population; give 2 or more, or 0")
        twice = sorted({p for p in self.prompts if self.prompts.count(p) > 1})
        if twice or not self.prompts:
            what = f"the prompt {twice[0]!r} is there twice" if twice else "there is no prompt"
            raise ValueError(f"{what}; give each prompt once")

    def shards(self) -> list[range]:
        """The prompts of each shard, by index."""
        step, n = self.prompts_per_shard, len(self.prompts)
        return [range(i, min(i + step, n)) for i in range(0, n, step)]


def open_run(
    folder: Path,
    pipe: Any,
    plan: Plan,
    reward: str | None,
    resume: bool,
    model: str | None = None,
    lora: str | None = None,
) -> None:
    """Make the folder with its manifest, or check that it is a part of this very run.

    model: the name to load the pipeline by again; by default the one it was loaded by. lora: what
    tells the LoRA's weights from others, for `is_complete`.
    """
    family = family_of(pipe)
    about = {
        "pipeline": type(pipe).__name__,
        "model": model or pipe.config.get("_name_or_path") or None,
        "weights": fingerprint(getattr(pipe, family.network)),
        "reward": reward,
        "plan": _plain(plan),
    }
    file = folder / "manifest.json"
    if file.exists():
        was = json.loads(file.read_text(encoding="utf-8"))
        if not resume:
            raise ValueError(f"{folder} holds a run; add resume=true, or give another out=")
        for key, value in about.items():
            if was.get(key) != value:
                raise ValueError(
                    f"{folder} was made with another {key}; give another out=, or the same {key}"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; give another out=")
    folder.mkdir(parents=True, exist_ok=True)
    about |= {"lora": lora, "versions": versions()}
    _write(file, json.dumps(about, indent=1, ensure_ascii=False))


def is_complete(
    folder: Path, plan: Plan, reward: str | None, model: str, lora: str | None = None
) -> bool:
    """Whether this very run is there, every shard of it, told without its model.

    Arguments as for `open_run`. Whether a model of this name has the same weights as then is not
    looked at.
    """
    about = {"plan": _plain(plan), "reward": reward, "model": model, "lora": lora}
    try:
        was = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        same = {name: was[name] for name in about} == about
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and all(_is_whole(folder / f"{i:05d}") for i in range(len(plan.shards())))


def _plain(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(plan)))


def check(pipe: Any, plan: Plan, reward: Any = None, preview: Any = None) -> None:
    """ValueError, before any folder is made, for a call or a filter that cannot work."""
    for _ in _runs(pipe, plan, reward, preview, plan.prompts[0]):
        pass  # asking for a run checks it; nothing is drawn yet


def generate(
    folder: Path,
    pipe: Any,
    plan: Plan,
    reward: Any = None,
    rank: int = 0,
    world: int = 1,
    preview: Any = None,
    drawn: Callable[[float, int], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Make this process's missing or damaged shards; yields (done, of how many).

    preview: an AutoencoderTiny for the steered images' scores on the way. drawn: called after
    every step of the sampler, which draws a share of each image of its call, with the images that
    are drawn by then and how many there will be.
    """
    each, sizes = plan.images + plan.steered, [len(prompts) for prompts in plan.shards()]
    mine = [i for i in range(len(sizes)) if i % world == rank]
    missing = [i for i in mine if not _is_whole(folder / f"{i:05d}")]
    total = each * sum(sizes[i] for i in mine)
    meter = _Meter(drawn, total, total - each * sum(sizes[i] for i in missing))
    for done, number in enumerate(missing, 1 + len(mine) - len(missing)):
        _make(folder, number, pipe, plan, reward, preview, meter)
        yield done, len(mine)


@dataclass
class _Meter:
    """How many images are drawn, told at every step of the sampler."""

    tell: Callable[[float, int], None] | None
    total: int
    finished: int  # images of the calls that have ended

    def step(self, count: int, moment: Moment) -> None:
        """Of a call of `count` images; one that starts again, with fewer rows, counts anew."""
        if self.tell is not None:
            share = (moment.step + 1) / moment.num_steps
            self.tell(self.finished + count * share, self.total)


def _is_whole(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _make(
    folder: Path,
    number: int,
    pipe: Any,
    plan: Plan,
    reward: Any,
    preview: Any,
    meter: _Meter,
) -> None:
    indices = plan.shards()[number]
    parts = [
        part
        for i in indices
        for part in _of_prompt(pipe, plan, reward, preview, plan.prompts[i], i, meter)
    ]
    prompts = [plan.prompts[i] for i in indices]
    tensors = {f"given.{name}": row for name, row in encode(pipe, prompts, **plan.call).items()}
    tensors["latents"] = torch.cat([latents for _, latents in parts])
    rows = [row for block, _ in parts for row in block]
    scratch = folder / f".{number:05d}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    about = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    table = pa.Table.from_pylist(rows, _schema()).replace_schema_metadata(about)
    pq.write_table(table, scratch / "table.parquet")
    save_file(
        {k: v.contiguous().cpu() for k, v in tensors.items()}, scratch / "tensors.safetensors"
    )
    hashes = {name: _sha256(scratch / name) for name in ("table.parquet", "tensors.safetensors")}
    _write(scratch / "shard.json", json.dumps(hashes))
    final = folder / f"{number:05d}"
    shutil.rmtree(final, ignore_errors=True)  # a damaged one
    scratch.rename(final)


def _of_prompt(
    pipe: Any, plan: Plan, reward: Any, preview: Any, prompt: str, group: int, meter: _Meter
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Rows and latents: the plain images of a prompt, then the steered ones."""
    for settings, run, steered in _runs(pipe, plan, reward, preview, prompt, meter):
        (out,) = run
        meter.finished += plan.steered if steered else plan.images  # a funnel leaves fewer
        yield _rows(out, group, plan.seed, settings, steered), out.latents[0]


def _runs(
    pipe: Any, plan: Plan, reward: Any, preview: Any, prompt: str, meter: _Meter | None = None
) -> Iterator[tuple[FeynmanKac, Iterator[Steered], bool]]:
    runs: list[tuple[int, FeynmanKac, Any, int]]
    runs = [(plan.images, PLAIN, nothing, 0), (plan.steered, plan.settings, reward, 1)]
    for count, settings, judge, occurrence in runs:
        if count:
            run = steer_each(
                pipe,
                [prompt, prompt],
                judge,
                count,
                settings,
                seed=plan.seed,
                preview=preview if occurrence else None,
                max_batch=plan.max_batch,
                progress=False,
                watch=partial(meter.step, count) if meter else None,
                only=[occurrence],  # another occurrence of the prompt has other noise
                **plan.call,
            )
            yield settings, run, occurrence == 1


def nothing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward of plain samples."""
    return torch.zeros(len(images), device=images.device)


def _rows(
    out: Steered, group: int, seed: int, settings: FeynmanKac, steered: bool
) -> list[dict[str, Any]]:
    text = json.dumps(asdict(settings))
    return [
        {
            "prompt": out.prompts[0],
            "group": group,
            "index": i,
            "seed": seed,
            "steered": steered,
            "log_weight": float(out.log_weights[0, i]),
            "settings": text,
            "image": {"bytes": _png(image), "path": f"{group:05d}-{'s' * steered}{i:02d}.png"},
        }
        for i, image in enumerate(out.images[0])
    ]


def _schema() -> pa.Schema:
    kinds = {
        "string": pa.string(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "float64": pa.float64(),
    }
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [(name, kinds[f["dtype"]] if "dtype" in f else picture) for name, f in FEATURES.items()]
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:  # a piece at a time: shards may be large
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)


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
        """The columns that were added, by name; none yet is {}."""
        file = self.folder / "rewards.parquet"
        return pq.read_table(file).to_pydict() if file.exists() else {}

    def scored_by(self, column: str = "reward") -> str:
        """The spec that a column was scored by, or ""."""
        return self.specs().get(column, "")

    def specs(self) -> dict[str, str]:
        """The specs that the columns were scored by, where it is known: {column: spec}."""
        file = self.folder / "rewards.parquet"
        about = pq.read_schema(file).metadata if file.exists() else None
        return json.loads((about or {}).get(b"specs", b"{}"))


class Rollouts:
    """A finished run. ValueError names shards that are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            plan = self.manifest["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder} holds no rollouts; make some with scripts/rollout.py"
            ) from None
        self.folder = folder
        count = -(-len(plan["prompts"]) // plan["prompts_per_shard"])
        self.shards = [Shard(folder / f"{i:05d}") for i in range(count)]
        broken = [shard.folder.name for shard in self.shards if not _is_whole(shard.folder)]
        if broken:
            raise ValueError(
                f"{folder} lacks, or has damaged, the shards {', '.join(broken[:5])}"
                f"{' and more' if broken[5:] else ''}; repeat scripts/rollout.py with resume=true"
            )


def add_rewards(shard: Shard, columns: Mapping[str, Sequence[float]], spec: str = "") -> None:
    """Add or replace columns of rewards, whole or not at all; spec: what these were scored by.

    Columns of other names stay as they are, with the specs that they were scored by.
    """
    merged = shard.rewards() | {name: list(values) for name, values in columns.items()}
    specs = shard.specs() | dict.fromkeys(columns, spec)
    scratch = shard.folder / ".rewards.new"
    table = pa.table({k: pa.array(v, pa.float64()) for k, v in merged.items()})
    pq.write_table(table.replace_schema_metadata({"specs": json.dumps(specs)}), scratch)
    scratch.replace(shard.folder / "rewards.parquet")
