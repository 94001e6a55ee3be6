"""Compare rewards with each other, with people's preferences, and images in a tournament."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rewards
from rewards.backends.local_vlm import LocalVlm
from rewards.models.vlm_judge import JudgeReward
from rewards.samples import read_samples
from tilt.comparison import agreement_report, preference_report, ranked, win_report
from tilt.loading import pick_device
from tilt.options import SEED, Parser, ended
from tilt.score_summary import FIGURES
from tilt.score_table import read_table

__all__ = ["main", "parser"]

EXAMPLES = """\
examples:
  # how far the columns of a table of scores agree
  tilt compare agreement --table scores.csv --columns clip ocr

  # how often one table's images beat another's of the same prompts and seeds
  tilt compare wins --table tuned.csv --baseline base.csv --column reward

  # best-of-n accuracy of a reward on lines of {"prompt": ..., "chosen": ..., "rejected": [...]}
  tilt compare preferences --file choices.jsonl --reward "clip(tiny)"

  # rank the images of each prompt by a vision-language model that sees two at a time
  tilt compare tournament --images out/demo --judge "judge(url=URL, model=NAME)"
"""


def parser() -> argparse.ArgumentParser:
    """Every option."""
    kind = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="tilt compare", description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMPARISON")
    one = commands.add_parser("agreement", help="how far the columns of a table agree")
    one.add_argument("--table", type=Path, required=True, help="Table of scores.")
    one.add_argument("--columns", nargs="+", default=[], help="Columns (default: all scores).")
    one = commands.add_parser("wins", help="how often one table's images beat another's")
    one.add_argument("--table", type=Path, required=True, help="Table of scores.")
    one.add_argument("--baseline", type=Path, required=True, help="Table to compare it with.")
    one.add_argument("--column", default="reward", help="Column to compare (default: reward).")
    one.add_argument("--seed", type=SEED, default=0, help="Seed of the bootstrap (default: 0).")
    one = commands.add_parser("preferences", help="accuracy of a reward on a preference file")
    one.add_argument("--file", type=Path, required=True, help="Preference file, .jsonl.")
    one.add_argument("--reward", required=True, help="Spec of the reward.")
    one = commands.add_parser("tournament", help="rank the images of each prompt by a judge")
    one.add_argument("--images", type=Path, required=True, help="Folder of images, or .jsonl file.")
    one.add_argument("--prompt", help="Prompt of the images that do not record their own.")
    one.add_argument("--judge", required=True, help="Spec of the judge, judge(url=..., model=...).")
    for one in (commands.choices["preferences"], commands.choices["tournament"]):
        one.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto).")
    return p


def main(argv: Sequence[str]) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence."""
    return ended("tilt compare", lambda: print(_report(parser().parse_args(argv))))


def _report(args: argparse.Namespace) -> str:
    if args.command == "agreement":
        return agreement_report(_table(args.table), args.columns)
    if args.command == "wins":
        return win_report(_table(args.table), _table(args.baseline), args.column, args.seed)
    if args.command == "preferences":
        device = pick_device(args.device)
        return preference_report(args.file, rewards.load(args.reward, device, imports=True), device)
    samples = read_samples(args.images, args.prompt, exclude=FIGURES)
    found = ranked(samples, _judge(args.judge, args.device))
    lines = [
        f"{prompt}\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(paths, 1))
        for prompt, paths in found.items()
    ]
    return "\n".join(lines)


def _table(path: Path) -> list[dict[str, Any]]:
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path} holds no rows; score some images first")
    return rows


def _judge(spec: str, device: str) -> JudgeReward:
    found = rewards.load(spec, imports=True).parts[0].reward
    if not isinstance(found, JudgeReward):
        raise ValueError(f"{spec!r} is no judge; write judge(url=..., model=...) or judge(FOLDER)")
    if isinstance(found.model, LocalVlm):
        found.model.to(pick_device(device))
    return found
