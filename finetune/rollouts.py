"""Rollouts: images or videos of many prompts, with the latents and conditioning of training.

A run is a folder of shards of a few prompts each:

    manifest.json                  model, call, filter, seed and versions of the run
    00012/table.parquet            a row per image: prompt, group, index, seed, steered, log_weight,
                                   settings, image (PNG), or frames of a video (`pictures`)
    00012/tensors.safetensors      latents (rows, ...), each prompt's conditioning, and its form
    00012/shard.json               sha256 of both
    00012/rewards.parquet          columns that scoring adds, in the rows' order

Shards are written atomically. The images of a prompt depend only on the seed and the prompt, not on
shards or processes, because each prompt is drawn in separate calls. (docs/checked.md says how
little `max_batch` and other kernels change them.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from steering import FeynmanKac, Steered
from steering.call import check_frames
from steering.frames import Frames
from steering.lineage import Moment
from steering.manifest import fingerprint, versions
from steering.pipeline import steer_each

from . import pictures, ranges
from .files import atomic, disk_errors, write
from .folder import ELSEWHERE, begun, refuse_changes
from .network import part_of
from .ranges import KEYWORDS, PROMPTS, REFERENCES, SEED, Range, group, optional, whole
from .recording import Recorder
from .shards import NOTE, is_whole, read_manifest, sha256

__all__ = [
    "PLAIN",
    "Plan",
    "check",
    "generate",
    "is_complete",
    "nothing",
    "open_run",
]

MANIFEST = "manifest.json"
FRAMES = {"score_frames": "all", "video_score": "mean"}  # recorded for steered images
PLAIN = FeynmanKac(reward_scale=0.0, min_ess=0.0, noise=0.0)  # the pipeline's own sampler


@dataclass(frozen=True)
class Plan:
    """The rollouts to make: `images` plain and `steered` steered images per prompt.

    call: keywords of the pipeline's call. Steered images have different noise from plain ones.
    references: the files of each prompt's images for rewards that compare with some, or ().
    score_frames, video_score: how the filter's reward scores videos, as in steer().
    """

    prompts: tuple[str, ...]
    images: int = 16
    steered: int = 0
    settings: FeynmanKac = field(default_factory=FeynmanKac)
    seed: int = 0
    prompts_per_shard: int = 4
    max_batch: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    references: tuple[tuple[str, ...], ...] = ()
    score_frames: int | str = "all"
    video_score: str = "mean"

    RANGES: ClassVar[dict[str, Range]] = {
        "prompts": PROMPTS,
        "images": whole(0, 10_000),
        "steered": whole(0, 10_000),
        "settings": group(FeynmanKac),
        "seed": SEED,
        "prompts_per_shard": whole(1),
        "max_batch": optional(whole(1)),
        "call": KEYWORDS,
        "references": REFERENCES,
        "score_frames": ranges.SCORE_FRAMES,
        "video_score": ranges.VIDEO_SCORE,
    }

    def __post_init__(self) -> None:
        ranges.check(self, self.RANGES)
        Frames(self.score_frames, self.video_score)  # checks the two together
        counts = {"images": self.images, "steered": self.steered}
        if sum(counts.values()) < 2:
            raise ValueError(f"{counts} make no group; make two or more images per prompt")
        if self.steered == 1:
            raise ValueError(
                "steered is 1, but the filter needs several particles; give 2 or more, or 0"
            )
        twice = sorted({p for p in self.prompts if self.prompts.count(p) > 1})
        if twice or not self.prompts:
            what = f"the prompt {twice[0]!r} is given twice" if twice else "there is no prompt"
            raise ValueError(f"{what}; give each prompt once")
        if self.references and len(self.references) != len(self.prompts):
            raise ValueError(
                f"references has {len(self.references)} entries for {len(self.prompts)} prompts; "
                "give one for each, or none"
            )

    def shards(self) -> list[range]:
        """Return the prompt indices of each shard."""
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
    quantize: str = "none",
) -> None:
    """Make the folder with its manifest, or check that it belongs to the same run.

    model: the name to load the pipeline by again, by default the one it was loaded by. lora: a
    digest of the LoRA's weights. quantize: what the weights were quantised to.
    """
    network = getattr(pipe, part_of(pipe))
    about = {
        "pipeline": type(pipe).__name__,
        "model": model or pipe.config.get("_name_or_path") or None,
        "dtype": str(network.dtype).removeprefix("torch."),
        "quantize": quantize,
        "weights": fingerprint(network),
        "reward": reward,
        "lora": lora,
    }
    was = _manifest_of(folder)
    if begun(folder, MANIFEST, kind="run of rollouts", resume=resume):
        # older runs lack them
        old = {"dtype": about["dtype"], "quantize": "none", "lora": lora} | was
        before = {name: old.get(name) for name in about} | _named(_since(plan) | was["plan"])
        refuse_changes(folder, before, about | _named(_plain(plan)))
        return
    about |= {"plan": _plain(plan), "versions": versions()}
    with disk_errors(folder, ELSEWHERE):
        write(folder / MANIFEST, json.dumps(about, indent=1, ensure_ascii=False))


def _manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a run's folder, {} without one; ValueError for that of another."""
    file = folder / MANIFEST
    try:
        return read_manifest(file) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is damaged, or is not of rollouts; {ELSEWHERE}") from None


def _named(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan's entries under the names of the command's settings."""
    return {"filter" if name == "settings" else name: value for name, value in plan.items()}


def is_complete(
    folder: Path,
    plan: Plan,
    reward: str | None,
    model: str,
    lora: str | None = None,
    quantize: str = "none",
) -> bool:
    """Return whether the folder holds this run with all its shards, without loading the model.

    Arguments as for `open_run`. The weights of the model are not compared, only its name.
    """
    about = {"plan": _plain(plan), "reward": reward, "model": model, "lora": lora}
    about |= {"quantize": quantize}
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        was = {"quantize": "none"} | json.loads(text)
        was["plan"] = _since(plan) | was["plan"]
        same = {name: was[name] for name in about} == about
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and all(is_whole(folder / f"{i:05d}") for i in range(len(plan.shards())))


def _plain(plan: Plan) -> dict[str, Any]:
    found = json.loads(json.dumps(asdict(plan)))
    if not plan.references:  # older runs do not record them
        del found["references"]
    return {name: v for name, v in found.items() if name not in FRAMES or plan.steered}


def _since(plan: Plan) -> dict[str, Any]:
    """Return the entries that older runs lack."""
    return FRAMES if plan.steered else {}


def check(pipe: Any, plan: Plan, reward: Any = None, preview: Any = None) -> None:
    """Raise ValueError, before any folder is made, for a call or a filter that cannot work."""
    if plan.steered:
        check_frames(Frames(plan.score_frames, plan.video_score), type(pipe), plan.call)
    for _ in _runs(pipe, plan, reward, preview, plan.prompts[0]):
        pass  # making the iterator checks the arguments; nothing is drawn yet


def generate(
    folder: Path,
    pipe: Any,
    plan: Plan,
    reward: Any = None,
    rank: int = 0,
    world: int = 1,
    preview: Any = None,
    drawn: Callable[[float, int], None] | None = None,
    renewed: Callable[[], dict[str, Any]] | None = None,
) -> Iterator[tuple[int, int]]:
    """Make this process's missing or damaged shards; yields (shards done, shards in total).

    preview: an AutoencoderTiny for the scores during steering. drawn(done, total): called
    after every step of the sampler; a call that is halfway counts as half of its images. renewed:
    called before each shard, to load the newest weights; returns what they are, for NOTE.
    """
    each, sizes = plan.images + plan.steered, [len(prompts) for prompts in plan.shards()]
    mine = [i for i in range(len(sizes)) if i % world == rank]
    places = [folder / f"{i:05d}" for i in range(len(sizes))]
    noted = [renewed is None or (place / NOTE).exists() for place in places]
    missing = [i for i in mine if not (noted[i] and is_whole(places[i]))]
    total = each * sum(sizes[i] for i in mine)
    meter = _Meter(drawn, total, total - each * sum(sizes[i] for i in missing))
    recorder = Recorder(pipe, plan.call) if missing else None
    for done, number in enumerate(missing, 1 + len(mine) - len(missing)):
        note = renewed() if renewed else None
        _make(folder, number, pipe, plan, reward, preview, meter, recorder)
        if note:
            write(places[number] / NOTE, json.dumps(note))
        yield done, len(mine)


@dataclass
class _Meter:
    """Reports the number of images drawn at every step of the sampler."""

    tell: Callable[[float, int], None] | None
    total: int
    finished: int  # images of the calls that have ended

    def step(self, count: int, moment: Moment) -> None:
        """Report a step of a call of `count` images; a restarted call counts from 0 again."""
        if self.tell is not None:
            share = (moment.step + 1) / moment.num_steps
            self.tell(self.finished + count * share, self.total)


def _make(
    folder: Path,
    number: int,
    pipe: Any,
    plan: Plan,
    reward: Any,
    preview: Any,
    meter: _Meter,
    recorder: Any,
) -> None:
    indices = plan.shards()[number]
    prompts = [plan.prompts[i] for i in indices]
    given = recorder.record(prompts)  # first, since it refuses what cannot be trained
    parts = [
        part
        for i in indices
        for part in _of_prompt(pipe, plan, reward, preview, plan.prompts[i], i, meter)
    ]
    tensors = {
        f"given.{i}.{name}": value
        for i, row in enumerate(given.rows)
        for name, value in row.items()
    }
    tensors["latents"] = torch.cat([latents for _, latents in parts])
    rows = [row for block, _ in parts for row in block]
    with atomic(folder / f"{number:05d}") as scratch:  # may replace a damaged shard
        scratch.mkdir()
        _write_shard(scratch, rows, tensors, given.form.dumps())


def _write_shard(
    scratch: Path, rows: list[dict[str, Any]], tensors: dict[str, Tensor], form: str
) -> None:
    pictures.write(scratch / "table.parquet", rows)
    held = {name: value.contiguous().cpu() for name, value in tensors.items()}
    save_file(held, scratch / "tensors.safetensors", {"form": form})
    hashes = {name: sha256(scratch / name) for name in ("table.parquet", "tensors.safetensors")}
    write(scratch / "shard.json", json.dumps(hashes))


def _of_prompt(
    pipe: Any, plan: Plan, reward: Any, preview: Any, prompt: str, group: int, meter: _Meter
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Yield table rows and latents: the plain images of a prompt, then the steered ones."""
    for settings, run, steered in _runs(pipe, plan, reward, preview, prompt, meter):
        (out,) = run
        meter.finished += plan.steered if steered else plan.images  # a funnel leaves fewer
        yield _rows(out, group, plan.seed, settings, steered), out.last[0]


def _runs(
    pipe: Any, plan: Plan, reward: Any, preview: Any, prompt: str, meter: _Meter | None = None
) -> Iterator[tuple[FeynmanKac, Iterator[Steered], bool]]:
    runs: list[tuple[int, FeynmanKac, Any, int]]
    runs = [(plan.images, PLAIN, nothing, 0), (plan.steered, plan.settings, reward, 1)]
    for count, settings, judge, occurrence in runs:
        if count:
            compares = plan.references and getattr(judge, "wants_references", False)
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
                references=[_references(plan, prompt)] * 2 if compares else None,
                watch=partial(meter.step, count) if meter else None,
                only=[occurrence],  # different occurrences of a prompt have different noise
                **({name: getattr(plan, name) for name in FRAMES} if occurrence else {}),
                **plan.call,
            )
            yield settings, run, occurrence == 1


def _references(plan: Plan, prompt: str) -> list[Image.Image]:
    names = plan.references[plan.prompts.index(prompt)]
    return [Image.open(name).convert("RGB") for name in names]


def nothing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return rewards of 0, for plain samples."""
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
            **pictures.cells(image, f"{group:05d}-{'s' * steered}{i:02d}"),
        }
        for i, image in enumerate(out.images[0])
    ]
