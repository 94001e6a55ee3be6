"""Scores of the shards of rollouts: which are missing, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rewards
from rewards.images import to_images
from rewards.samples import open_picture
from steering.frames import Frames
from steering.outputs import levels
from tilt.score_table import is_scored

if TYPE_CHECKING:
    from finetune.shards import Rollouts, Shard

__all__ = ["references_of", "score_shard", "scored", "unscored"]


def unscored(
    source: Path,
    names: Sequence[str],
    made_by: set[tuple[str, str]],
    frames: Frames,
    growing: bool = False,
    known: Sequence[str] = (),
) -> tuple[Rollouts, list[Shard]]:
    """Return the rollouts, and the shards whose columns are not all by the specs in `made_by`.

    Those of videos have to be of these frames. NaN is no score, except in shards that are `known`,
    which have just been asked for. Raises ValueError for frames that the rollouts do not have.
    """
    from finetune.shards import Rollouts

    def is_left(shard: Shard) -> bool:
        by = {(shard.scored_by(name), shard.versions().get(name, "")) for name in names}
        asked, of = shard.folder.name in known, {shard.frames().get(name) for name in names}
        other = by != made_by or of != {frames if shard.num_frames() else None}
        return other or not (asked or all(map(is_scored, scored(shard, names))))

    run = Rollouts(source, growing, known)
    for shard in run.shards[:1]:
        frames.check(shard.num_frames())
    return run, [shard for shard in run.shards if is_left(shard)]


def references_of(run: Rollouts) -> dict[str, list[str]]:
    """Return the files of each prompt's reference images; {} for rollouts without any."""
    plan = run.manifest["plan"]
    files = plan.get("references") or []
    return dict(zip(plan["prompts"], files, strict=True)) if files else {}


def scored(shard: Shard, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a shard, with these columns."""
    columns = shard.rewards()
    cells = zip(*(columns[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in cells]


def score_shard(
    reward: rewards.WeightedSum,
    shard: Shard,
    size: int,
    device: torch.device,
    named: Mapping[str, Sequence[str]],
    frames: Frames,
) -> dict[str, list[float]]:
    """Return {column: score of each row} of one shard; named: reference images of each prompt."""
    prompts, outputs = [row["prompt"] for row in shard.table(["prompt"])], shard.images()
    videos = shard.num_frames() is not None
    size = 1 if videos else size
    references = None
    if named and reward.wants_references:
        opened = {p: [open_picture(Path(n)) for n in named[p]] for p in dict.fromkeys(prompts)}
        references = [opened[prompt] for prompt in prompts]
    columns: dict[str, list[float]] = {}
    for start in range(0, len(prompts), size):
        chosen = slice(start, start + size)
        few: Any = list(islice(outputs, size))
        few = levels(few).to(device) if videos else to_images(few, device)
        with torch.no_grad():
            total, components = frames.evaluate(
                reward, few, prompts[chosen], references and references[chosen]
            )
        for name, column in ({"reward": total} | components).items():
            columns.setdefault(name, []).extend(column.tolist())
    return columns
