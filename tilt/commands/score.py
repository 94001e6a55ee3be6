"""Score existing images with any rewards, and write a table and a histogram.

The images are those of a folder, of a .jsonl file, of a run of `tilt steer`, or of rollouts, whose
shards get a column for each reward. Under `accelerate launch`, the processes divide the images.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import rewards
from finetune.ranges import (
    FLAG,
    NAME,
    SCORE_FRAMES,
    TEXT,
    VIDEO_SCORE,
    optional,
    refuse_idle,
    setting,
    whole,
)
from rewards.algebra import calibrate
from rewards.combine import component_names, names_in
from rewards.samples import Sample, batches, load_batch, open_picture, read_samples
from steering.frames import Frames
from steering.outputs import levels
from tilt import started
from tilt.commands.rewards import listing
from tilt.exit_status import of_command
from tilt.framing import ABOUT_FRAMES, ABOUT_SCORE, frames_in
from tilt.loading import pick_device
from tilt.options import Options
from tilt.processes import Processes, Stopped, join
from tilt.score_summary import FIGURES, draw, summary
from tilt.score_table import TEXTS, Table, ensure_writable, is_scored, read_table, working_files
from tilt.shard_scores import references_of, score_shard, scored, unscored

if TYPE_CHECKING:
    from finetune.shards import Rollouts

EXAMPLES = """\
examples:
  # list the rewards
  tilt score --list

  # the images of a run of `tilt steer`, which record their prompts; weight 0 is only reported
  tilt score out/demo --reward "ocr(mode=strict) + 0*clip(tiny)"

  # one prompt for a whole folder, into a parquet file
  tilt score pictures --prompt "a red circle" --reward "clip(tiny)" \\
    --out scores.parquet

  # save the scale of each component on these images, to use the same scale for other images
  tilt score pictures.jsonl --reward "clip(tiny) + jpeg" --calibrate scale.json
  tilt score more.jsonl --reward "calibrated(clip(tiny), file=scale.json)"

  # resume an interrupted run
  tilt score pictures.jsonl --reward "clip(tiny) + 0.01*jpeg" --out scores.csv --resume

a .jsonl file has one object per line; paths are relative to the file:
  {"image": "a.png", "prompt": "a red circle", "references": ["circle.png"]}
"""


@dataclass
class Score:
    """The images to score, and the reward."""

    source: str | None = setting(None, optional(NAME), "folder of images, or a .jsonl file")
    reward: str | None = setting(
        None, optional(NAME), "a spec such as 'clip(tiny) + 0.5*ocr(mode=strict)'"
    )
    prompt: str | None = setting(None, optional(TEXT), "prompt of images without a recorded prompt")
    out: str | None = setting(
        None, optional(NAME), ".csv or .parquet file (default: scores.csv beside the images)"
    )
    resume: bool = setting(False, FLAG, "skip images that already have their scores (NaN is none)")
    follow: bool = setting(
        False, FLAG, "score shards of rollouts as other jobs draw them, until all are scored"
    )
    batch_size: int = setting(32, whole(1), "images per batch")
    score_frames: Any = setting("all", SCORE_FRAMES, f"in rollouts of videos: {ABOUT_FRAMES}")
    video_score: str = setting("mean", VIDEO_SCORE, f"in rollouts of videos: {ABOUT_SCORE}")
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps")
    calibrate: str | None = setting(
        None,
        optional(NAME),
        "also write a calibration file, for calibrated(..., file=FILE) in a spec",
    )
    list: bool = setting(False, FLAG, "print the rewards and exit")


OPTIONS = Options("tilt score", Score, __doc__ or "", EXAMPLES, positional="source")


def run(settings: Score) -> None:
    """Score the images, or the shards of `tilt rollout`, that have no scores yet."""
    if settings.list:
        print(listing())
        return
    if settings.source is None or settings.reward is None:
        raise ValueError("give a folder or a .jsonl file, and --reward (--list shows them)")
    if settings.calibrate:
        ensure_writable(Path(os.path.expanduser(settings.calibrate)))
    source, processes = Path(settings.source), join(settings.device)
    device = processes.device if settings.device == "auto" else None
    device = device or processes.agree(lambda: pick_device(settings.device))
    of_rollouts = settings.follow or (source / "00000" / "tensors.safetensors").is_file()
    if not of_rollouts:
        refuse_idle(settings, ["score_frames", "video_score"], f"{source} holds no rollouts")
    work = score_rollouts if of_rollouts else score_pictures
    work(source, settings.reward, settings, device, processes)


def load(spec: str, device: torch.device, prompts: Sequence[str]) -> rewards.WeightedSum:
    """Load the reward for these prompts; ValueError if a component has the name of a column."""
    started.say(f"loading {spec}")
    reward = rewards.load(spec, device, imports=True)
    for name in component_names(reward.parts):
        if name in ("reward", *TEXTS):
            raise ValueError(
                f"a component is called {name!r}, which is a column of the table; "
                "give it another name, as in 'mine=clip'"
            )
    reward.check(prompts)
    return reward


def score_pictures(
    source: Path, spec: str, settings: Score, device: torch.device, processes: Processes
) -> None:
    """Check everything, the cheapest check first; then fill the table and report."""
    samples = processes.agree(lambda: read_samples(source, settings.prompt, exclude=FIGURES))
    beside = source if source.is_dir() else source.parent
    out = Path(settings.out) if settings.out else beside / "scores.csv"
    picture = out.with_name(out.name + ".histogram.png")  # unlike the name of any scored image
    again = settings.resume and not settings.calibrate
    if processes.told(lambda: again and is_complete(out, spec, samples)):
        processes.finish()
        if processes.is_main:
            print(f"{out} is complete")
            report(read_table(out), picture)
        return

    def ready() -> tuple[rewards.WeightedSum, Table]:
        if settings.calibrate and len(samples) < 2:
            raise ValueError(f"--calibrate needs two images or more but {source} has one")
        reward = load_for(samples, spec, device)
        return reward, Table(out, versioned(reward.spec), settings.resume, processes.index)

    reward, table = processes.agree(ready)
    rows = [texts(sample, reward.wants_references) for sample in samples]
    left = processes.agree(lambda: table.missing(rows))
    share = (processes.index, processes.count)
    try:
        score(reward, [samples[i] for i in left], table, settings.batch_size, device, share)
        processes.finish()
    except KeyboardInterrupt as cut:
        kept = f"{sum(map(is_scored, table.rows))} of {len(samples)} are kept"
        raise type(cut)(kept if processes.count == 1 else "finished batches are kept") from None
    if processes.is_main:
        table.collect()
        print(out if table.finish(rows) else f"{out} is complete")
        report(table.rows, picture)
        keep_scale(reward, table.rows, settings.calibrate)


def load_for(samples: Sequence[Sample], spec: str, device: torch.device) -> rewards.WeightedSum:
    """Load the reward for these samples; ValueError if one lacks references that it needs."""
    reward = load(spec, device, [sample.prompt for sample in samples])
    without = [sample.image for sample in samples if not sample.references]
    if without and reward.needs_references:
        raise ValueError(
            f"{reward} compares with reference images but {without[0]} has none; write "
            '"references": [...] in its line of a .jsonl file'
        )
    return reward


def is_complete(out: Path, spec: str, samples: Sequence[Sample]) -> bool:
    """Return whether the table has all these rows, of the same reward, without loading it."""
    if not out.is_file() or working_files(out):
        return False
    table = Table(out, versioned(rewards.spelled(spec, imports=True)), resume=True)
    references = bool(table.rows) and "references" in table.rows[0]
    rows = [texts(sample, references) for sample in samples]
    return not table.missing(rows) and not table.finish(rows)


def versioned(spec: str) -> str:
    """Return a spec with the identity of its reward, which depends on its version and files."""
    return f"{spec} [version {rewards.identity(spec)}]"


def texts(sample: Sample, references: bool) -> dict[str, str]:
    """Return the columns that identify a row: everything that its scores depend on."""
    row = {"image": str(sample.image), "prompt": sample.prompt}
    if references:
        row["references"] = json.dumps([str(path) for path in sample.references])
    return row


def score(
    reward: rewards.WeightedSum,
    samples: Sequence[Sample],
    table: Table,
    size: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    frames: Frames = Frames(),  # noqa: B008 (frozen)
) -> None:
    """Add a row for each sample: its identity, the total and each component.

    Samples may be folders of videos, of which `frames` are scored, in batches of one. share: this
    process's index and the number of processes, which divide the batches, so that every image is
    scored in the batch of one process.
    """
    index, count = share
    mine = list(batches(samples, size))[index::count]
    there = sum(map(is_scored, table.rows))
    every, hidden = there + sum(map(len, mine)), index > 0
    with torch.no_grad(), tqdm(total=every, initial=there, unit="image", disable=hidden) as bar:
        for batch in mine:
            total, components = judged(reward, batch, device, frames)
            columns = {"reward": total} | components
            values = {name: column.tolist() for name, column in columns.items()}
            table.add(
                [
                    texts(sample, reward.wants_references)
                    | {name: column[i] for name, column in values.items()}
                    for i, sample in enumerate(batch)
                ]
            )
            bar.update(len(batch))


def judged(
    reward: rewards.WeightedSum, batch: Sequence[Sample], device: torch.device, frames: Frames
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the totals (n,) and components of n images, or of one video."""
    video = [open_picture(path) for path in frames_in(batch[0].image)]
    if not video:
        images, prompts, references = load_batch(batch, device)
        return reward.evaluate(images, prompts, references=references)
    named = [[open_picture(path) for path in sample.references] for sample in batch]
    given = named if any(named) else None
    prompts = [sample.prompt for sample in batch]
    return frames.evaluate(reward, levels([video]).to(device), prompts, given)


def report(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Print a summary of the scores, and draw their histogram."""
    print(summary(rows))
    draw(rows, picture)
    print(picture)


def keep_scale(
    reward: rewards.WeightedSum, rows: Sequence[dict[str, Any]], calibration: str | None
) -> None:
    """Save the scores as a calibration file, if one is given."""
    if calibration:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        measured = calibrate.by_fingerprint(reward, columns.pop("reward"), columns)
        calibrate.save(Path(calibration), measured)
        print(calibration)


def score_rollouts(
    source: Path, spec: str, settings: Score, device: torch.device, processes: Processes
) -> None:
    """Add the columns "reward" and each component to every shard of `tilt rollout`.

    Existing columns are replaced. --resume skips shards in which all of them have this spec and
    this version of the reward, and no score is NaN. While it follows, NaN is not asked for again.
    """
    from finetune.following import PAUSE
    from finetune.learnability import little_in_rollouts
    from finetune.shards import add_rewards

    for option in ("out", "prompt"):
        if getattr(settings, option) is not None:
            raise ValueError(f"rollouts contain their prompts and scores; leave out --{option}")
    spec, reward = rewards.spelled(spec, imports=True), None
    names, version = ["reward", *names_in(spec)], rewards.identity(spec)
    made_by = {(spec, version)} if settings.resume or settings.follow else set()
    frames = Frames(settings.score_frames, settings.video_score)
    look = partial(unscored, source, names, made_by, frames)
    run, left = processes.told(lambda: look(settings.follow))
    if left or settings.calibrate or not run.is_complete:
        reward = processes.agree(lambda: load_for_rollouts(run, spec, device))
        named = references_of(run)
        try:
            while left or not run.is_complete:
                mine = left[processes.index :: processes.count]
                for shard in tqdm(mine, unit="shard", disable=not (mine and processes.is_main)):
                    found = score_shard(reward, shard, settings.batch_size, device, named, frames)
                    of = frames if shard.num_frames() else None
                    add_rewards(shard, found, spec, {"reward": reward.range}, version, of)
                if run.is_complete:
                    break
                time.sleep(0 if left else PAUSE)
                known = [shard.folder.name for shard in run.shards]
                run, left = processes.told(partial(look, True, known))
            processes.finish()
        except KeyboardInterrupt as cut:
            raise type(cut)("finished shards are kept") from None
    if not processes.is_main:
        return
    rows = [row for shard in run.shards for row in scored(shard, names)]
    if run.shards[0].num_frames():
        print(f"videos, scored by {frames}")
    report(rows, source / "scores.histogram.png")
    if reward:
        keep_scale(reward, rows, settings.calibrate)
    if little := little_in_rollouts(run, "reward"):
        print(f"before training on these rollouts: {little}")


def load_for_rollouts(run: Rollouts, spec: str, device: torch.device) -> rewards.WeightedSum:
    """Load the reward for the prompts of rollouts; ValueError if they lack references for it."""
    prompts, named = run.manifest["plan"]["prompts"], references_of(run)
    reward = load(spec, device, prompts)
    without = [prompt for prompt in prompts if not named.get(prompt)]
    if without and reward.needs_references:
        raise ValueError(
            f"{reward} compares with reference images, which these rollouts do not have for the "
            f'prompt {without[0]!r:.80}; write "references": [...] in its line of the .jsonl file '
            "for tilt rollout"
        )
    return reward


def main(argv: Sequence[str]) -> int:
    """Return exit status 0, 2 for refused input, 130 after Ctrl-C, 1 if another process ended."""
    try:
        return of_command(OPTIONS, argv, run)
    except KeyboardInterrupt as stop:
        died, kept = isinstance(stop, Stopped), str(stop) or "nothing is lost"
        why = "another process ended" if died else "interrupted"
        print(f"tilt score: {why}; {kept}: repeat the command with --resume", file=sys.stderr)
        return 1 if died else 130
