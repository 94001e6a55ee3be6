"""Checks during training: images of fixed prompts and fixed noise are drawn and scored.

They measure the reward on held-out prompts, with the pipeline's own sampler, and if asked a second
reward that is not trained on.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL.Image import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from steering.call import frames_of
from steering.frames import Frames
from steering.outputs import levels, still
from steering.pipeline import steer_each

from .ranges import KEYWORDS, NAME, SEED, TEXT, check, setting, whole
from .rollouts import PLAIN, nothing

__all__ = [
    "GRID_ROWS",
    "Check",
    "Sheet",
    "Watch",
    "append",
    "best_row",
    "corrected",
    "draw",
    "is_over",
    "means",
    "read",
    "rewind",
]

PER_CALL = 4  # prompts per call of the pipeline that draws images; one of videos
GRID_ROWS = 8  # held-out prompts in a grid


@dataclass
class Check:
    """The settings of checks during training."""

    every: int = setting(0, whole(0), "steps between checks, which draw and score images; 0: never")
    prompts: str = setting("", TEXT, "file of prompts that are not trained on")
    train_prompts: int = setting(8, whole(0), "number of training prompts that are checked as well")
    images: int = setting(4, whole(1, 10_000), "images per prompt")
    reward: str = setting("", TEXT, "reward of the checks; by default the reward of the training")
    quality: str = setting(
        "", TEXT, "reward q from 1 to 5, for the corrected score r (q - 3) + 0.2"
    )
    best: str = setting("held_out/reward", NAME, "metric whose best check is exported to lora/")
    patience: int = setting(0, whole(0), "stop after this many checks without a new best; 0: never")
    seed: int = setting(1, SEED, "seed of the noise in checks")
    call: dict[str, Any] = setting(
        dict, KEYWORDS, "keywords of the pipeline's call; by default those in training"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Sheet:
    """The result of a check: scores of all images or videos by name, and an image of each."""

    scores: dict[str, list[float]] = field(default_factory=dict)
    images: list[tuple[int, list[Image]]] = field(default_factory=list)


def means(sheets: Sequence[Sheet]) -> dict[str, float]:
    """Return the means over all images of the sheets, by name.

    Scores that are not finite ("no answer") are left out; the mean is NaN if none is finite.
    """
    names = dict.fromkeys(name for sheet in sheets for name in sheet.scores)
    found = {}
    for name in names:
        every = [x for sheet in sheets for x in sheet.scores.get(name, [])]
        values = torch.tensor(every, dtype=torch.float64)
        found[name] = float(values[values.isfinite()].mean())
    return found


def corrected(reward: float, quality: float) -> float:
    """Return r (q - 3) + 0.2, a reward r weighted by an image quality q from 1 to 5.

    GDRO's score against reward hacking, computed from means; the 0.2 is only for plots.
    """
    return reward * (quality - 3) + 0.2


def _moved(pipe: Any, device: Any, keep: Sequence[str]) -> Any:
    return pipe.to(device)


@dataclass(frozen=True)
class Watch:
    """The checks of one training run.

    seen, unseen: training and held-out prompts; rewards: "reward" and optionally "quality"; call:
    keywords of the pipeline's call; load(**components): returns the pipeline with these components;
    place(pipe, device, keep=parts): returns it on the device, where these parts stay; frames: how
    the rewards score videos.
    """

    check: Check
    seen: Sequence[str]
    unseen: Sequence[str]
    rewards: Mapping[str, Any]
    call: dict[str, Any]
    load: Callable[..., Any]
    place: Callable[..., Any] = _moved
    frames: Frames = field(default_factory=Frames)

    def look(self, part: str, network: Any, accelerator: Any) -> tuple[dict[str, float], Image]:
        """Return means by name ("held_out/reward", "train/reward", ...) and a grid of held-out
        images.

        Prompts are split among processes. The other components are loaded and freed again.
        """
        shown = network.register_state_dict_post_hook(_shares)  # for the manifest's fingerprints
        try:
            return self._look(part, network, accelerator)
        finally:
            shown.remove()

    def _look(self, part: str, network: Any, accelerator: Any) -> tuple[dict[str, float], Image]:
        pipe = self.place(self.load(**{part: network}), accelerator.device, keep=[part])
        pipe.set_progress_bar_config(disable=True)
        rank, world = accelerator.process_index, accelerator.num_processes
        row: dict[str, float] = {}
        held_out: list[tuple[int, list[Image]]] = []
        for split, prompts in (("held_out", self.unseen), ("train", self.seen)):
            if not prompts:
                continue
            mine = range(rank, len(prompts), world)
            given = (self.check, self.call, self.frames)
            sheet = draw(pipe, prompts, mine, self.rewards, *given)
            most = range(0, len(prompts), world)
            each = _per_call(pipe, self.call)
            if accelerator.is_fsdp2 and -(-len(mine) // each) < -(-len(most) // each):
                # forward passes on other processes need this process's shard of the weights
                draw(pipe, prompts, range(1), {}, *given)
            sheets = gather_object([sheet])
            row |= {f"{split}/{name}": value for name, value in means(sheets).items()}
            if split == "held_out":
                held_out = sorted((pair for sheet in sheets for pair in sheet.images), key=_first)
        if "held_out/quality" in row:
            row["held_out/corrected"] = corrected(row["held_out/reward"], row["held_out/quality"])
        shown = [images for _, images in held_out[:GRID_ROWS]]
        grid = make_image_grid([x for images in shown for x in images], len(shown), len(shown[0]))
        return row, grid


def _shares(module: Any, state: dict[str, Any], *_: Any) -> None:
    """Replace each weight in the state by this process's shard."""
    for name, value in state.items():
        if isinstance(value, DTensor):
            state[name] = value.to_local()


def _per_call(pipe: Any, call: dict[str, Any]) -> int:
    """Return the number of prompts that a call of the pipeline draws."""
    return PER_CALL if frames_of(type(pipe), call)[1] == 1 else 1


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    only: Sequence[int],
    rewards: Mapping[str, Any],
    check: Check,
    call: dict[str, Any],
    frames: Frames = Frames(),  # noqa: B008 (frozen)
) -> Sheet:
    """Draw `check.images` images of each prompt in `only` by the stock sampler, and score them.

    rewards: by name, as `rewards.load` makes them; components of "reward" are reported as well.
    frames: how videos are scored, of which the sheet has the middle frames. A prompt's noise
    depends only on the seed and the prompt; in float32, other prompts in the call change its images
    by at most one grey level in at most 1 % of the values (docs/checked.md).
    """
    sheet = Sheet()
    drawn = steer_each(
        pipe,
        prompts,
        nothing,
        check.images,
        PLAIN,
        seed=check.seed,
        prompts_per_call=_per_call(pipe, call),
        progress=False,
        only=only,
        **call,
    )
    indices = iter(only)
    for out in drawn:
        for prompt, images in zip(out.prompts, out.images, strict=True):
            sheet.images.append((next(indices), [still(image) for image in images]))
            pixels = levels(images).to(pipe._execution_device)
            texts = [prompt] * len(images)
            for name, values in _scored(rewards, pixels, texts, frames).items():
                sheet.scores.setdefault(name, []).extend(values)
    return sheet


def _scored(
    rewards: Mapping[str, Any], images: Tensor, prompts: list[str], frames: Frames
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, reward in rewards.items():
        total, parts = frames.evaluate(reward, images, prompts)
        if name == "reward" and len(parts) > 1:
            found |= {part: values.tolist() for part, values in parts.items()}
        found[name] = total.tolist()
    return found


def append(file: Path, row: Mapping[str, float]) -> None:
    """Append a row to a CSV table of numbers, after a header if it is the first row.

    Raises ValueError if the table has other columns.
    """
    fresh = not file.exists()
    if not fresh:
        with file.open(encoding="utf-8", newline="") as source:
            columns = next(csv.reader(source), [])
        if columns != list(row):
            raise ValueError(
                f"{file} has the columns {columns}, not {list(row)}: it belongs to another run or "
                "version; move it away"
            )
    with file.open("a", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})


def read(file: Path) -> list[dict[str, float]]:
    """Return the rows of such a table, without an incomplete last row; none if it is missing.

    Raises ValueError if the file is no such table.
    """
    if not file.exists():
        return []
    try:
        whole, _, _ = file.read_bytes().decode("utf-8").rpartition("\n")
        rows = list(csv.DictReader(whole.splitlines()))
        found = [{k: float(v) for k, v in row.items()} for row in rows]
        if found and "step" not in found[0]:
            raise ValueError("it has no column named step")
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{file} is no table of numbers with one row per step ({error}): it is damaged, or "
            "another kind of file; move it away"
        ) from None
    return found


def rewind(file: Path, step: int) -> None:
    """Delete the rows after a step, which an interrupted run will write again."""
    rows = [row for row in read(file) if row["step"] <= step]
    file.unlink(missing_ok=True)
    for row in rows:
        append(file, row | {"step": int(row["step"])})


def best_row(rows: Sequence[Mapping[str, float]], metric: str) -> Mapping[str, float]:
    """Return the first row with the highest value of `metric`.

    Values that are not finite are ignored. Raises ValueError if no value is finite, and for an
    unknown metric, with the known ones.
    """
    if metric not in rows[0]:
        known = sorted(set(rows[0]) - {"step"})
        raise ValueError(f"the checks have no metric {metric!r}; there are {known}")
    scored = [row for row in rows if math.isfinite(row[metric])]
    if not scored:
        raise ValueError(
            f"{metric} is {rows[-1][metric]} at every check, the last of them at step "
            f"{rows[-1]['step']:.0f}: no image has a score; set check.reward=, or check.best= to "
            "another metric"
        )
    return max(scored, key=lambda row: row[metric])


def is_over(rows: Sequence[Mapping[str, float]], check: Check) -> bool:
    """Return whether the best check is at least `check.patience` checks ago."""
    if not rows or not check.patience:
        return False
    best = best_row(rows, check.best)["step"]
    return sum(row["step"] > best for row in rows) >= check.patience
