"""Score pictures that are there already by any rewards, into a table and a picture of it.

The pictures are those of a folder, of a .jsonl file, of a run of `tilt steer`, or of rollouts,
whose shards get a column for each reward.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import rewards
from rewards.algebra import calibrate
from rewards.combine import Aggregate, Function, Part, component_names, names_in
from rewards.images import to_images
from rewards.samples import Sample, batches, load_batch, read_samples
from tilt import started
from tilt.commands.rewards import listing
from tilt.loading import pick_device
from tilt.options import COUNT, Parser, check_words, one_line, path
from tilt.score_summary import FIGURES, draw, summary
from tilt.score_table import TEXTS, Table, ensure_writable, read_table

if TYPE_CHECKING:
    from finetune.shards import Shard

EXAMPLES = """\
examples:
  # what rewards there are
  tilt score --list

  # the pictures of a run of `tilt steer`, which know their prompts; weight 0 is only reported
  tilt score out/demo --reward "ocr(mode=strict) + 0*clip(tiny)"

  # one prompt for a whole folder, into a parquet file
  tilt score pictures --prompt "a red circle" --reward "clip(tiny)" \\
    --out scores.parquet

  # the scale of each component on these pictures, for specs that mean the same everywhere
  tilt score pictures.jsonl --reward "clip(tiny) + jpeg" --calibrate scale.json
  tilt score more.jsonl --reward "calibrated(clip(tiny), file=scale.json)"

  # carry on where an interrupted run stopped
  tilt score pictures.jsonl --reward "clip(tiny) + 0.01*jpeg" --out scores.csv --resume

a .jsonl file has one object a line, its paths relative to it:
  {"image": "a.png", "prompt": "a red circle", "references": ["circle.png"]}
"""


def parser() -> argparse.ArgumentParser:
    """Every option."""
    p = Parser(
        prog="tilt score",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("source", nargs="?", type=path, help="folder of pictures, or a .jsonl file")
    p.add_argument("--reward", help="a spec such as 'clip(tiny) + 0.5*ocr(mode=strict)'")
    p.add_argument("--prompt", help="of all pictures that do not say their own")
    p.add_argument("--out", type=path, help=".csv or .parquet (default: scores.csv beside them)")
    p.add_argument("--resume", action="store_true", help="skip what --out already holds")
    p.add_argument("--batch-size", type=COUNT, default=32, help="pictures at once (default: 32)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    scale = "also write a calibration file, for calibrated(..., file=FILE) in a spec"
    p.add_argument("--calibrate", type=path, metavar="FILE", help=scale)
    p.add_argument("--list", action="store_true", help="print the rewards, and stop")
    return p


def run(args: argparse.Namespace) -> int:
    """Score what is not there yet, of a run of `tilt rollout` or of pictures."""
    if args.list:
        print(listing())
        return 0
    if args.source is None or args.reward is None:
        raise ValueError("give a folder or a .jsonl file, and --reward (--list shows them)")
    if args.calibrate:
        ensure_writable(Path(os.path.expanduser(args.calibrate)))
    if (args.source / "00000" / "tensors.safetensors").is_file():
        return score_rollouts(args, pick_device(args.device))
    return score_pictures(args, pick_device(args.device))


def load(spec: str, device: torch.device, prompts: Sequence[str]) -> rewards.WeightedSum:
    """The reward of these prompts; ValueError if a component would hide a column of the table."""
    started.say(f"loading {spec}")
    reward = rewards.load(spec, device, imports=True)
    for name in component_names(reward.parts):
        if name in ("reward", *TEXTS):
            raise ValueError(
                f"a component is called {name!r}, as a column of the table is; "
                "give it another name, as in 'mine=clip'"
            )
    reward.check(prompts)
    return reward


def needs_references(parts: Sequence[Part]) -> bool:
    """Whether one of these compares with references, and is no function, which may do without."""
    for reward in (part.reward for part in parts):
        if isinstance(reward, Aggregate):
            needs = reward.references or any(needs_references(m.parts) for m in reward.members)
        else:
            needs = not isinstance(reward, Function) and getattr(reward, "wants_references", False)
        if needs:
            return True
    return False


def score_pictures(args: argparse.Namespace, device: torch.device) -> int:
    """Refuse what cannot work, the cheapest check first; then fill the table and report."""
    samples = read_samples(args.source, args.prompt, exclude=FIGURES)
    if args.calibrate and len(samples) < 2:
        raise ValueError(f"--calibrate needs two pictures or more but {args.source} holds one")
    beside = args.source if args.source.is_dir() else args.source.parent
    out = args.out or beside / "scores.csv"
    picture = out.with_name(out.name + ".histogram.png")  # no picture of the user's has such a name
    if args.resume and not args.calibrate and is_complete(out, args.reward, samples):
        print(f"{out} is complete")
        report(read_table(out), picture)
        return 0
    reward = load(args.reward, device, [sample.prompt for sample in samples])
    without = [sample.image for sample in samples if not sample.references]
    if without and needs_references(reward.parts):
        raise ValueError(
            f"{reward} compares with reference pictures but {without[0]} has none; write "
            '"references": [...] in its line of a .jsonl file'
        )
    table = Table(out, versioned(reward.spec), args.resume)
    rows = [texts(sample, reward.wants_references) for sample in samples]
    left = table.missing(rows)
    try:
        score(reward, [samples[i] for i in left], table, args.batch_size, device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(table.rows)} of {len(samples)} are kept") from None
    print(out if table.finish(rows) else f"{out} is complete")
    report(table.rows, picture)
    keep_scale(reward, table.rows, args.calibrate)
    return 0


def is_complete(out: Path, spec: str, samples: Sequence[Sample]) -> bool:
    """Whether the table is there with all these rows, of this very reward, which is not loaded."""
    if not out.is_file() or out.with_name(out.name + ".part").exists():
        return False
    table = Table(out, versioned(rewards.spelled(spec, imports=True)), resume=True)
    references = bool(table.rows) and "references" in table.rows[0]
    rows = [texts(sample, references) for sample in samples]
    return not table.missing(rows) and not table.finish(rows)


def versioned(spec: str) -> str:
    """A spec with what tells its reward from that of another version, or from other files."""
    return f"{spec} [version {rewards.identity(spec)}]"


def texts(sample: Sample, references: bool) -> dict[str, str]:
    """The columns that name a row: all that its scores depend on, with references or without."""
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
) -> None:
    """Add a row for each of these: what names it, total and each component."""
    there = len(table.rows)
    every = there + len(samples)
    with torch.no_grad(), tqdm(total=every, initial=there, unit="picture") as bar:
        for batch in batches(samples, size):
            images, prompts, references = load_batch(batch, device)
            total, components = reward.evaluate(images, prompts, references=references)
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


def report(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Print what the scores are, and draw them."""
    print(summary(rows))
    draw(rows, picture)
    print(picture)


def keep_scale(
    reward: rewards.WeightedSum, rows: Sequence[dict[str, Any]], calibration: Path | None
) -> None:
    """Keep the scores as a scale if that is asked for."""
    if calibration:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        measured = calibrate.by_fingerprint(reward, columns.pop("reward"), columns)
        calibrate.save(calibration, measured)
        print(calibration)


def score_rollouts(args: argparse.Namespace, device: torch.device) -> int:
    """Add the columns "reward" and each component to every shard of `tilt rollout`.

    A column that is there already is replaced. --resume skips shards where all of them are of
    this very spec, scored by this very version of the reward.
    """
    from finetune.outlook import of_rollouts
    from finetune.shards import Rollouts, add_rewards

    for option in ("out", "prompt"):
        if getattr(args, option) is not None:
            raise ValueError(
                "rollouts have prompts and keep their scores in their own shards; "
                f"leave out --{option}"
            )
    run, reward = Rollouts(args.source), None
    spec = rewards.spelled(args.reward, imports=True)
    names, version = ["reward", *names_in(spec)], rewards.identity(spec)
    left = [
        shard
        for shard in run.shards
        if not args.resume
        or {(shard.scored_by(name), shard.versions().get(name)) for name in names}
        != {(spec, version)}
    ]
    if left or args.calibrate:
        reward = load(args.reward, device, run.manifest["plan"]["prompts"])
        if needs_references(reward.parts):
            raise ValueError(f"{reward} compares with reference pictures, which rollouts lack")
        try:
            for shard in tqdm(left, unit="shard"):
                found = score_shard(reward, shard, args.batch_size, device)
                add_rewards(shard, found, spec, {"reward": reward.range}, version)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished shards are kept") from None
    rows = [row for shard in run.shards for row in scored(shard, names)]
    report(rows, args.source / "scores.histogram.png")
    if reward:
        keep_scale(reward, rows, args.calibrate)
    if little := of_rollouts(run, "reward"):
        print(f"before a model is trained on these: {little}")
    return 0


def scored(shard: Shard, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a shard, with these columns."""
    columns = shard.rewards()
    cells = zip(*(columns[name] for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in cells]


def score_shard(
    reward: rewards.WeightedSum, shard: Shard, size: int, device: torch.device
) -> dict[str, list[float]]:
    """{column: score of each row} of one shard."""
    prompts, pictures = [row["prompt"] for row in shard.table(["prompt"])], shard.images()
    columns: dict[str, list[float]] = {}
    for start in range(0, len(prompts), size):
        chosen = slice(start, start + size)
        with torch.no_grad():
            total, components = reward.evaluate(
                to_images(pictures[chosen], device), prompts[chosen]
            )
        for name, column in ({"reward": total} | components).items():
            columns.setdefault(name, []).extend(column.tolist())
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        check_words(words)
        return run(parser().parse_args(words))
    except (ValueError, OSError) as error:
        print(f"tilt score: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        kept = str(stop) or "nothing is lost"
        print(f"tilt score: interrupted; {kept}: repeat the command with --resume", file=sys.stderr)
        return 130
