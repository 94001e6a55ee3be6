"""Learning from images made once (GDRO) against learning from one's own samples (Flow-GRPO).

    python -m scripts.bench online --method gdro
    python -m scripts.bench online --method gdro-small
    python -m scripts.bench online --method grpo
    python -m scripts.bench online --table --plot docs/online.png

Words of tiny-sd3, one process each, the same prompts and the same held-out ones, whose pictures
the stock sampler draws at 20 steps. Seconds are those of making images, scoring and training; the
checks themselves do not count. Compare runs that were made side by side on one machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

import rewards
from finetune import checks

from .tuning import ROOT, command, prepare, timed

REWARD = "ocr(mode=strict)"
LOOKED_AT = "ocr(mode=strict) + 0*exact=ocr(mode=exact) + 0*clip(tiny)"
CONFIGS = {"gdro": "gdro_tiny.yaml", "gdro-small": "gdro_tiny.yaml", "grpo": "grpo_tiny.yaml"}
# images of each of 200 prompts, and the sampler's steps
ROLLOUTS = {"gdro": (12, 20), "gdro-small": (6, 10)}
SHOWN = {"reward": "OCR", "exact": "exact", "clip": "CLIP", "corrected": "corrected"}
NAMES = {
    "gdro": "GDRO, 12 images of 20 steps",
    "gdro-small": "GDRO, 6 images of 10 steps",
    "grpo": "Flow-GRPO",
}


def quality(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The embedded aesthetic head's 1 to 10 as 1 to 5, which the corrected score wants."""
    found = rewards.load("aesthetic(tiny)")(images, prompts)
    return 1 + 4 * (found.clamp(1, 10) - 1) / 9


def run(args: argparse.Namespace) -> None:
    """Train by one method, with a look at the held-out prompts now and then."""
    folder = args.out
    (tune, *_), test = prepare("words", folder)
    words = [
        f"--config={ROOT / 'scripts/configs' / CONFIGS[args.method]}",
        f"--out={folder / args.method}",
    ]
    words += [
        f"--check.prompts={test}",
        "--check.images=4",
        "--check.train-prompts=0",
        "--log-every=5",
    ]
    words += [f"--check.reward={LOOKED_AT}", f"--check.every={args.every}", "--resume"]
    words += [
        "--check.quality=scripts.benchmarks.online:quality",
        *(f"--{change}" for change in args.changes),
    ]
    if args.method == "grpo":
        words += [f"--prompts={tune}", f"--reward={REWARD}"]
        timed(folder, "grpo-train", command("train_adversarial.py", words, 1))
        return
    made, (images, steps) = folder / f"{args.method}-rollouts", ROLLOUTS[args.method]
    plan = ["--model=tiny-sd3", "--call.guidance-scale=1.0", f"--call.num-inference-steps={steps}"]
    plan += [f"--prompts={tune}", f"--out={made}", f"--images={images}", "--resume"]
    timed(folder, made.name, command("rollout.py", plan, 1))
    scored = [str(made), "--reward", REWARD]
    timed(folder, f"{args.method}-scores", command("score.py", scored, 1))
    words += [f"--rollouts={made}", "--check.call.guidance-scale=1.0"]
    words += ["--check.call.num-inference-steps=20"]
    timed(folder, f"{args.method}-train", command("train_gdro.py", words, 1))


def curve(folder: Path, method: str) -> list[dict[str, float]]:
    """The checks of a run, each with the seconds that had been spent."""
    before = 0.0
    if method in ROLLOUTS:
        files = (folder / f"{method}-{name}.seconds" for name in ("rollouts", "scores"))
        before = sum(float(file.read_text()) for file in files)
    spent, at, last = before, {0.0: before}, 0.0
    for row in checks.read(folder / method / "log.csv"):
        spent += row["seconds"] * (row["step"] - last)
        last = row["step"]
        at[last] = spent
    rows = checks.read(folder / method / "checks.csv")
    return [
        {"seconds": at[row["step"]]}
        | {k.removeprefix("held_out/"): v for k, v in row.items() if k != "seconds"}
        for row in rows
    ]


def reached(rows: Sequence[dict[str, float]], level: float) -> float | None:
    """The seconds at which a curve first lies at a level or above, straight between its points."""
    for a, b in pairwise(rows):
        if a["reward"] < level <= b["reward"]:
            share = (level - a["reward"]) / (b["reward"] - a["reward"])
            return a["seconds"] + share * (b["seconds"] - a["seconds"])
    return None


def markdown(curves: dict[str, list[dict[str, float]]]) -> str:
    """A line a check, and the seconds at which each run reached a level."""
    lines = ["| method | seconds | step | " + " | ".join(SHOWN.values()) + " |"]
    lines.append("|" + "---|" * (3 + len(SHOWN)))
    for method, rows in curves.items():
        for row in rows:
            cells = [NAMES[method], f"{row['seconds']:.0f}", f"{row['step']:.0f}"]
            lines.append("| " + " | ".join(cells + [f"{row[k]:.3f}" for k in SHOWN]) + " |")
    lines += ["", "| OCR | " + " | ".join(NAMES[m] for m in curves) + " |"]
    lines.append("|" + "---|" * (1 + len(curves)))
    for level in (0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        found = [reached(rows, level) for rows in curves.values()]
        lines.append(f"| {level} | " + " | ".join(f"{x:.0f} s" if x else "" for x in found) + " |")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Reward, held-out reward and corrected score against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    shown = {"reward": "OCR, held-out words", "clip": "CLIP, not trained on"}
    shown |= {"corrected": "corrected score"}
    for axes, (key, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for method, rows in curves.items():
            x, y = [row["seconds"] for row in rows], [row[key] for row in rows]
            axes.plot(x, y, marker=".", label=NAMES[method])
        axes.set_xlabel("seconds of one thread, images included")
        axes.set_title(
            {"reward": "OCR, held-out words", "clip": "CLIP, not trained on"}.get(key, key)
        )
        axes.set_title(title)
        axes.set_xlim(left=0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Run a method, or print the curves that there are."""
    parser = argparse.ArgumentParser(
        prog="online", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=sorted(CONFIGS))
    parser.add_argument("--out", type=Path, default=Path("runs/online"))
    parser.add_argument("--every", type=int, default=30, help="steps between checks")
    parser.add_argument(
        "--changes", nargs="*", default=[], help="name=value of the command's options"
    )
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--plot", type=Path, help="and draw it")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if args.method:
        run(args)
    if args.table or args.plot:
        found = {m: curve(args.out, m) for m in CONFIGS if (args.out / m / "checks.csv").exists()}
        print(markdown(found))
        if args.plot:
            plot(found, args.plot)
