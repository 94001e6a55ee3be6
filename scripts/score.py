"""Score pictures that are there already by any rewards, into a table and a picture of it.

The pictures are those of a folder, of a .jsonl file, of a run of steer.py, or of rollouts, whose
shards get a column for each reward.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rewards
from rewards import calibrate
from rewards.images import to_images
from rewards.samples import Sample, batches, load_batch, read_samples
from rewards.table import Table, draw, summary
from steering.loading import pick_device

EXAMPLES = """\
examples:
  # what rewards there are
  python scripts/score.py --list

  # the pictures of a run of steer.py, which know their prompts; weight 0 is only reported
  python scripts/score.py out/demo --reward "ocr(mode=strict) + 0*clip(tiny)"

  # one prompt for a whole folder, into a parquet file
  python scripts/score.py pictures --prompt "a red circle" --reward "clip(tiny)" \\
    --out scores.parquet

  # the scale of each component on these pictures, for specs that mean the same everywhere
  python scripts/score.py pictures.jsonl --reward "clip(tiny) + jpeg" --calibrate scale.json
  python scripts/score.py more.jsonl --reward "calibrated(clip(tiny), file=scale.json)"

  # carry on where an interrupted run stopped
  python scripts/score.py pictures.jsonl --reward "clip(tiny) + 0.01*jpeg" --out scores.csv --resume

a .jsonl file has one object a line, its paths relative to it:
  {"image": "a.png", "prompt": "a red circle", "references": ["circle.png"]}
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (--help lists what there is)")


def parser() -> argparse.ArgumentParser:
    """Every option."""
    p = _Parser(
        prog="score.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("source", nargs="?", type=Path, help="folder of pictures, or a .jsonl file")
    p.add_argument("--reward", help="a spec such as 'clip(tiny) + 0.5*ocr(mode=strict)'")
    p.add_argument("--prompt", help="of all pictures that do not say their own")
    p.add_argument("--out", type=Path, help=".csv or .parquet (default: scores.csv beside them)")
    p.add_argument("--resume", action="store_true", help="skip what --out already holds")
    p.add_argument("--batch-size", type=_count, default=32, help="pictures at once (default: 32)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    scale = "also write a calibration file, for calibrated(..., file=FILE) in a spec"
    p.add_argument("--calibrate", type=Path, metavar="FILE", help=scale)
    p.add_argument("--list", action="store_true", help="print the rewards, and stop")
    return p


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of 1 or more")
    return int(text)


def listing() -> str:
    """The built-in rewards: what each is, its weights, size, licence, range and gradient."""
    width = max(map(len, [*rewards.available(), *rewards.aggregators()])) + 2
    lines = []
    for name, line in rewards.available().items():
        module, attribute, _ = rewards.REWARDS[name]
        factory = getattr(importlib.import_module(module), attribute)
        card = factory.card
        size = f" ({card.size})" if card.size else ""
        lines += [
            f"{name:{width}}{line}",
            f"{'':{width}}weights   {card.weights or 'none'}{size}",
            f"{'':{width}}licence   {card.licence}",
            f"{'':{width}}range     {card.range}",
            f"{'':{width}}gradient  {'yes' if factory.differentiable else 'no'}",
            f"{'':{width}}source    {card.citation}",
        ]
    lines += ["", "of other rewards, as in 'min(clip, 0.5*ocr)':"]
    lines += [f"{name:{width}}{line}" for name, line in rewards.aggregators().items()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot work, the cheapest check first; then score what is not there yet."""
    if args.list:
        print(listing())
        return 0
    if args.source is None or not args.reward:
        raise ValueError("give a folder or a .jsonl file, and --reward (--list shows them)")
    device = pick_device(args.device)
    if (args.source / "00000" / "tensors.safetensors").is_file():
        return score_rollouts(args, rewards.load(args.reward, device), device)
    samples = read_samples(args.source, args.prompt)
    reward = rewards.load(args.reward, device)
    reward.check([sample.prompt for sample in samples])
    beside = args.source if args.source.is_dir() else args.source.parent
    out = args.out or beside / "scores.csv"
    picture = out.with_name(out.name + ".histogram.png")  # no picture of the user's has such a name
    if out.exists() and args.resume and not out.with_name(out.name + ".part").exists():
        print(f"{out} is complete")
        return 0
    table = Table(out, reward.spec, args.resume)
    try:
        score(reward, samples, table, args.batch_size, device)
    except KeyboardInterrupt:
        done = len(table.rows)
        print(
            f"score.py: interrupted; {done} of {len(samples)} are kept: repeat the command with "
            f"--out {out} --resume to carry on",
            file=sys.stderr,
        )
        return 130
    table.finish([str(sample.image) for sample in samples])
    print(summary(table.rows))
    draw(table.rows, picture)
    if args.calibrate:
        columns = {name: [row[name] for row in table.rows] for name in table.rows[0]}
        measured = calibrate.by_fingerprint(reward, columns.pop("reward"), columns)
        calibrate.save(args.calibrate, measured)
    print(out, picture, *([args.calibrate] if args.calibrate else []), sep="\n")
    return 0


def score(
    reward: Any, samples: Sequence[Sample], table: Table, size: int, device: torch.device
) -> None:
    """Add a row for every picture that has none: image, prompt, total and each component."""
    done = {row["image"] for row in table.rows}
    left = [sample for sample in samples if str(sample.image) not in done]
    with torch.no_grad(), tqdm(total=len(samples), initial=len(done), unit="picture") as bar:
        for batch in batches(left, size):
            images, prompts, references = load_batch(batch, device)
            total, components = reward.evaluate(images, prompts, references=references)
            columns = {"reward": total} | components
            values = {name: column.tolist() for name, column in columns.items()}
            table.add(
                [
                    {"image": str(sample.image), "prompt": sample.prompt}
                    | {name: column[i] for name, column in values.items()}
                    for i, sample in enumerate(batch)
                ]
            )
            bar.update(len(batch))


def score_rollouts(args: argparse.Namespace, reward: Any, device: torch.device) -> int:
    """Add the columns "reward" and each component to every shard of scripts/rollout.py."""
    from finetune.rollouts import Rollouts, add_rewards

    run = Rollouts(args.source)
    reward.check(run.manifest["plan"]["prompts"])
    rows: list[dict[str, Any]] = []
    for shard in tqdm(run.shards, unit="shard"):
        prompts = [row["prompt"] for row in shard.table(["prompt"])]
        columns: dict[str, list[float]] = {}
        if not args.resume or shard.scored_by() != reward.spec:
            for part in range(0, len(prompts), args.batch_size):
                chosen = slice(part, part + args.batch_size)
                images = to_images(shard.images()[chosen], device)
                with torch.no_grad():
                    total, components = reward.evaluate(images, prompts[chosen])
                for name, column in ({"reward": total} | components).items():
                    columns.setdefault(name, []).extend(column.tolist())
            add_rewards(shard, columns, reward.spec)
        values = shard.rewards()
        rows += [
            {"image": f"{shard.folder.name}/{i}", "prompt": prompt}
            | {name: column[i] for name, column in values.items()}
            for i, prompt in enumerate(prompts)
        ]
    print(summary(rows))
    draw(rows, args.source / "scores.histogram.png")
    print(args.source / "scores.histogram.png")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence; 130 after Ctrl-C."""
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print(f"score.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
