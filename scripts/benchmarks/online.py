"""Learning from images made once (GDRO) against learning from one's own samples (Flow-GRPO).

    python -m scripts.bench online --method grpo
    python -m scripts.bench online --method guard --epochs 50
    python -m scripts.bench online --table --plot docs/online.png

docs/adversarial.md describes the measurement. Compare only runs that were made side by side on one
machine.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

import rewards
from finetune import checks

from ..parser import parser_of
from ..tables import head, line
from .tuning import ROOT, prepare, timed

REWARD = "ocr(mode=strict)"
WATCHED = "ocr(mode=strict) + 0*exact=ocr(mode=exact) + 0*clip(tiny)"
CONFIGS = {"gdro": "gdro_tiny.yaml", "gdro-small": "gdro_tiny.yaml", "grpo": "grpo_tiny.yaml"}
# images of each of 200 prompts, and the sampler's steps
ROLLOUTS = {"gdro": (12, 20), "gdro-small": (6, 10)}
SHOWN = {"reward": "OCR", "exact": "exact", "clip": "CLIP", "corrected": "corrected"}
NAMES = {
    "gdro": "GDRO, 12 images of 20 steps",
    "gdro-small": "GDRO, 6 images of 10 steps",
    "grpo": "Flow-GRPO",
}
# other objectives beside Flow-GRPO, with its rate, groups and images, and no setting tuned
SAME = {"groups": "4", "k": "8", "micro-groups": "4", "lr": "2e-3"}
FLOW = ["--grpo.sde=flow", "--grpo.noise=0.7"]
PEERS = {
    "flow-sde": FLOW,
    "guard": [*FLOW, "--grpo.ratio=guard"],
    "cps": ["--grpo.noise=0.951", "--grpo.ratio=error"],
    "dance": ["--grpo.sde=dance", "--grpo.noise=0.3"],
    "nft": ["--method=nft", "--nft.adaptive", *(f"--nft.{n}={v}" for n, v in SAME.items())],
    "awm": ["--method=awm", *(f"--awm.{n}={v}" for n, v in SAME.items())],
}
NAMES |= {
    "flow-sde": "Flow-SDE",
    "guard": "Flow-SDE, GRPO-Guard",
    "cps": "Flow-CPS as published",
    "dance": "Dance-SDE",
    "nft": "DiffusionNFT, adaptive",
    "awm": "AWM",
}
Curve = list[dict[str, float]]  # the checks of a run


def quality(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The embedded aesthetic head's 1 to 10 as 1 to 5, as the corrected score requires."""
    found = rewards.load("aesthetic(tiny)")(images, prompts)
    return 1 + 4 * (found.clamp(1, 10) - 1) / 9


def run(method: str, folder: Path, every: int, epochs: int) -> None:
    """Train by one method, and evaluate the held-out prompts every so many steps."""
    (tune, *_), test = prepare("words", folder)
    kind = method if method in ("nft", "awm") else "grpo"
    config = ROOT / "scripts/configs" / CONFIGS.get(method, CONFIGS["grpo"])
    words = [f"--config={config}"] if kind == "grpo" else []
    words += [f"--out={folder / method}", f"--check.prompts={test}"]
    words += ["--check.images=4", "--check.train-prompts=0"]
    words += [f"--check.reward={WATCHED}", f"--check.every={every}", "--resume", "--log-every=5"]
    words += ["--check.quality=scripts.benchmarks.online:quality"]
    if method not in ROLLOUTS:
        words += [f"--prompts={tune}", f"--reward={REWARD}", *PEERS.get(method, [])]
        words += [f"--{kind}.steps={epochs}"]
        timed(folder, f"{method}-train", "train_adversarial.py", words)
        return
    made, (images, steps) = folder / f"{method}-rollouts", ROLLOUTS[method]
    plan = ["--model=tiny-sd3", "--call.guidance-scale=1.0", f"--call.num-inference-steps={steps}"]
    plan += [f"--prompts={tune}", f"--out={made}", f"--images={images}", "--resume"]
    timed(folder, made.name, "rollout.py", plan)
    timed(folder, f"{method}-scores", "score.py", [str(made), "--reward", REWARD])
    words += [f"--rollouts={made}", "--check.call.guidance-scale=1.0"]
    words += ["--check.call.num-inference-steps=20"]
    timed(folder, f"{method}-train", "train_gdro.py", words)


def curve(folder: Path, method: str) -> Curve:
    """The checks of a run, each with the wall-clock seconds that had been spent."""
    before = 0.0
    if method in ROLLOUTS:
        files = (folder / f"{method}-{name}.time.json" for name in ("rollouts", "scores"))
        before = sum(json.loads(file.read_text())["wall"] for file in files)
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


def reached(rows: Curve, level: float) -> float | None:
    """The seconds at which a curve first reaches a level, linearly interpolated."""
    for a, b in pairwise(rows):
        if a["reward"] < level <= b["reward"]:
            share = (level - a["reward"]) / (b["reward"] - a["reward"])
            return a["seconds"] + share * (b["seconds"] - a["seconds"])
    return None


def markdown(curves: dict[str, Curve]) -> str:
    """A row for each check, and the seconds at which each run reached a level."""
    lines = [head("method", "seconds", "step", *SHOWN.values())]
    for method, rows in curves.items():
        for row in rows:
            whole = (f"{row[key]:.0f}" for key in ("seconds", "step"))
            lines.append(line(NAMES[method], *whole, *(f"{row[key]:.3f}" for key in SHOWN)))
    lines += ["", head("OCR", *(NAMES[method] for method in curves))]
    for level in (0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        found = [reached(rows, level) for rows in curves.values()]
        lines.append(line(level, *(f"{x:.0f} s" if x else "" for x in found)))
    return "\n".join(lines)


def plot(curves: dict[str, Curve], file: Path) -> None:
    """Reward, held-out reward and corrected score against seconds."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    shown = {"reward": "OCR, held-out words", "clip": "CLIP, not trained on"}
    shown |= {"corrected": "corrected score"}
    for axes, (key, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for method, rows in curves.items():
            x, y = [row["seconds"] for row in rows], [row[key] for row in rows]
            axes.plot(x, y, marker=".", label=NAMES[method])
        axes.set(xlabel="seconds of one thread, images included", title=title)
        axes.set_xlim(left=0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Run a method, or print the existing curves."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--method", choices=sorted([*CONFIGS, *PEERS]))
    parser.add_argument("--out", type=Path, default=Path("runs/online"))
    parser.add_argument("--every", type=int, default=30, help="steps between checks")
    parser.add_argument("--epochs", type=int, default=150, help="epochs of an online method")
    parser.add_argument("--table", action="store_true", help="print the existing results")
    parser.add_argument("--plot", type=Path, help="print and draw the existing results")
    args = parser.parse_args(argv)
    folder = args.out.resolve()
    if args.method:
        run(args.method, folder, args.every, args.epochs)
    if args.table or args.plot:
        found = {m: curve(folder, m) for m in NAMES if (folder / m / "checks.csv").exists()}
        print(markdown(found))
        if args.plot:
            plot(found, args.plot)
