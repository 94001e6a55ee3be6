"""What fine-tuning gains on unseen prompts, how long it takes, and which settings matter.

    python -m scripts.bench tuning --model tiny-sd3 --task words --out runs/tuning --vary

docs/finetuning.md describes the measurement. Runs scripts/rollout.py, score.py, train_gdro.py and
evaluate.py one after another, each in as many processes as there are cores, and measures their CPU
time. What is finished is not run again. --vary trains on the same rollouts with one setting changed
at a time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import checks
from tilt.statistics import Interval

from ..parser import parser_of
from ..tables import table
from ..tiny.world import TASKS, scene
from .lift import interval

ROOT = Path(__file__).parents[2]
REWARDS = {
    "words": "ocr(mode=strict) + 0*clip(tiny)",
    "attributes": "objects(mode=share) + 0*clip(tiny)",
}
IMAGES = {"words": 12, "attributes": 32}  # of a prompt in rollouts
CONFIGS = {
    ("tiny-sd3", "words"): "gdro_tiny",
    ("tiny-sd3", "attributes"): "gdro_tiny_shapes",
    ("tiny-sd", "attributes"): "gdro_tiny_sd_shapes",
}
HEADLINE = {"words": "exact", "attributes": "mean of 6 tasks"}
# (tuning, testing) prompts of a task; some have few prompts, which are split at random
COUNTS = {
    "single_object": (3, 2),
    "two_object": (13, 7),
    "counting": (13, 7),
    "colors": (24, 6),
    "position": (40, 20),
    "color_attr": (40, 20),
    "text": (200, 40),
}
STEERED = "steered rollouts"
ROUNDS = "2 rounds"
SPLIT_BY_CHANCE = ("single_object", "two_object", "counting")
# one setting changed at a time; the number of images in a step stays the same
VARIATIONS = {
    "k=2": ["--gdro.k=2", "--gdro.groups=24", "--gdro.micro-groups=12"],
    "k=12": ["--gdro.k=12", "--gdro.groups=4"],
    "γ=0": ["--gdro.hold-best=0"],
    "τ=0.01": ["--gdro.temperature=0.01"],
    "τ=0.5": ["--gdro.temperature=0.5"],
    "rank": ["--gdro.form=rank"],
    "top1": ["--gdro.form=top1"],
    "noise for each": ["--no-gdro.shared-noise"],
    "β÷3": ["--gdro.beta=3"],
    "β×3": ["--gdro.beta=30"],
    "shift 1": ["--gdro.shift=1"],
    "unweighted": ["--gdro.weight=constant", "--gdro.beta=100", "--gdro.hold-best=200"],  # tiny-sd
}


def prompts_of(task: str, turn: int = 0, limit: int = 10_000) -> tuple[list[str], list[str]]:
    """Different prompts of one of the world's tasks, to tune on and to test on; none is in both.

    Those to test on are of kinds that the base never saw, if there are such kinds. Another turn
    gives other prompts of the same kinds; the few prompts of a small task stay.
    """
    rng = np.random.default_rng([TASKS.index(task), 2024 + (task not in SPLIT_BY_CHANCE) * turn])
    tune, test = COUNTS[task]
    found: list[list[str]] = [[], []]
    if task in SPLIT_BY_CHANCE:
        every = sorted({scene(rng, task).prompt for _ in range(limit)})
        order = rng.permutation(len(every))
        return [every[i] for i in order[:tune]], [every[i] for i in order[tune : tune + test]]
    for prompts, unseen, count in zip(found, (False, True), (tune, test), strict=True):
        while len(prompts) < count:
            prompt = scene(rng, task, unseen).prompt
            prompts += [] if prompt in prompts or prompt in found[0] else [prompt]
    return found[0], found[1]


def prepare(task: str, folder: Path) -> tuple[list[Path], Path]:
    """The files of prompts: one for each round of tuning, and one to test on."""
    kinds = ["text"] if task == "words" else [kind for kind in TASKS if kind != "text"]
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, part: int, turn: int = 0) -> Path:
        file = folder / f"{task}-{name}.txt"
        prompts = [prompt for kind in kinds for prompt in prompts_of(kind, turn)[part]]
        file.write_text("".join(f"{prompt}\n" for prompt in prompts))
        return file

    return [write("tune", 0), write("tune-2", 0, turn=1)], write("test", 1)


def command(script: str, words: Sequence[str], processes: int) -> list[str]:
    """The command line of a script in some processes."""
    launch = [sys.executable]
    if processes > 1:  # accelerate's own launcher starts one where there is no GPU
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
    return [*launch, str(ROOT / "scripts" / script), *words]


def timed(folder: Path, name: str, script: str, words: Sequence[str], processes: int = 1) -> float:
    """Run a script once, with its output in a log; the CPU seconds of its processes together.

    The file NAME.time.json also holds the wall-clock seconds. Of a script that failed and is run
    again, only the last time counts.
    """
    taken = folder / f"{name}.time.json"
    if not taken.exists():
        line = command(script, words, processes)
        print(f"{name}: {' '.join(line[-6:])}", file=sys.stderr)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        with (folder / f"{name}.log").open("w") as log:
            alone = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            code = subprocess.run(line, cwd=ROOT, env=alone, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{name} failed, see {log.name}")
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        taken.write_text(json.dumps({"cpu": cpu, "wall": wall}))
    return json.loads(taken.read_text())["cpu"]


def one(args: argparse.Namespace, name: str, changes: Sequence[str]) -> dict[str, Any]:
    """Make rollouts, unless they exist, train and evaluate; the results."""
    folder = args.out / args.task / args.model
    prompts, test = prepare(args.task, folder)
    plan = [f"--images={args.images}"]
    rollouts, tuned = folder / "rollouts", folder / name.replace(" ", "-")
    if name == STEERED:
        rollouts = folder / "steered"
        plan = ["--images=8", "--steered=4", f"--reward={REWARDS[args.task]}"]
    first = folder / "default" if name == ROUNDS else tuned
    took = trained(args, prompts[0], rollouts, first, plan, changes)
    if name == ROUNDS:
        onwards = [f"--lora={first / 'lora'}"]
        again = [*plan, *onwards, "--seed=1"]
        took += trained(args, prompts[1], folder / "rollouts-2", tuned, again, [*changes, *onwards])
    words = [f"--model={args.model}", f"--call.guidance-scale={args.guidance}", "--resume"]
    words += [f"--prompts={test}", f"--out={tuned / 'eval'}", f"--lora={tuned / 'lora'}"]
    words += [f"--reward={REWARDS[args.task]}", f"--images={args.test_images}"]
    timed(folder, f"{tuned.name}-eval", "evaluate.py", words, args.processes)
    row = {"model": args.model, "task": args.task, "name": name, "guidance": args.guidance}
    row |= {"seconds": took, "changes": list(changes), "measures": variants(tuned / "eval")}
    return row | {"drift": checks.read(tuned / "log.csv")[-1]["drift"]}


def trained(
    args: argparse.Namespace,
    prompts: Path,
    rollouts: Path,
    out: Path,
    plan: Sequence[str],
    changes: Sequence[str],
) -> float:
    """Train a LoRA in out/lora on rollouts of the prompts; the CPU seconds of both."""
    folder, n = out.parent, args.processes
    words = [f"--model={args.model}", f"--call.guidance-scale={args.guidance}", "--resume"]
    words += [f"--prompts={prompts}", f"--out={rollouts}", *plan]
    scored = [str(rollouts), "--reward", REWARDS[args.task]]
    settings = [f"--config={args.config}", f"--rollouts={rollouts}", f"--out={out}", "--resume"]
    return (
        timed(folder, rollouts.name, "rollout.py", words, n)
        + timed(folder, f"{rollouts.name}-scores", "score.py", scored)
        + timed(folder, f"{out.name}-train", "train_gdro.py", [*settings, *changes], n)
    )


def variants(folder: Path) -> dict[str, dict[str, Any]]:
    """{measure: {"variants": {variant: ...}}} of an evaluation."""
    sections = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["sections"]
    return {m["name"]: m for section in sections.values() for m in section}


def markdown(rows: Sequence[dict]) -> str:
    """A row for each run: the main measure against the base and the default run, and CLIP."""
    heads = ["model", "task", "run", "CPU minutes", "measure", "base", "tuned", "tuned - base"]
    heads += ["- default run", "CLIP - base", "drift"]
    defaults = {(r["model"], r["task"]): r for r in rows if r["name"] == "default"}
    return table(heads, [_cells(row, defaults) for row in rows])


def _cells(row: dict[str, Any], defaults: dict[tuple[str, str], dict]) -> list[str]:
    name, key = HEADLINE[row["task"]], (row["model"], row["task"])
    base, tuned = (row["measures"][name]["variants"][v] for v in ("base", "tuned"))
    held_out, default = row["measures"]["clip"]["variants"]["tuned"], defaults.get(key, row)
    more = ""
    if default is not row:
        other = default["measures"][name]["variants"]["tuned"]
        more = interval(np.array(tuned["values"]) - np.array(other["values"]))
        more = more if more.startswith("-") else f"+{more}"
    means = (f"{found['mean']['mean']:.3f}" for found in (base, tuned))
    cells = [*key, row["name"], f"{row['seconds'] / 60:.1f}", name, *means]
    gains = [signed(tuned["difference"]), more, signed(held_out["difference"])]
    return [*cells, *gains, f"{row['drift']:+.4f}"]


def signed(gain: dict[str, float]) -> str:
    """As in "+0.500 [+0.400, +0.600]"."""
    return Interval(gain["mean"], gain["low"], gain["high"]).text("+")


def main(argv: list[str] | None = None) -> None:
    """Run what is not there yet and print the table of all results."""
    parser = parser_of(__doc__, __name__)
    add = parser.add_argument
    add("--model", default="tiny-sd3", choices=["tiny-sd3", "tiny-sd"])
    add("--task", default="words", choices=sorted(REWARDS))
    add("--out", type=Path, default=Path("runs/tuning"))
    add("--config", type=Path, help="settings of training (default: those of the task)")
    add("--images", type=int, help="images a prompt in rollouts (default: the task's)")
    add("--test-images", type=int, default=8, help="images a prompt in tests")
    add("--guidance", type=float, default=1.0)
    add("--processes", type=int, default=os.cpu_count() or 1)
    add("--vary", nargs="*", help="change one setting at a time (default: all)")
    add("--steered", action="store_true", help="also from 8 plain and 4 steered images")
    add("--rounds", action="store_true", help="also train a second round")
    add("--table", action="store_true", help="only print the existing results")
    args = parser.parse_args(argv)
    args.out, args.images = args.out.resolve(), args.images or IMAGES[args.task]
    file = f"{CONFIGS.get((args.model, args.task), 'gdro_tiny')}.yaml"
    args.config = (args.config or ROOT / "scripts/configs" / file).resolve()
    if not args.table:
        runs: dict[str, list[str]] = {"default": []}
        if args.vary is not None:
            runs |= {name: VARIATIONS[name] for name in args.vary or VARIATIONS}
        runs |= {STEERED: []} if args.steered else {}
        runs |= {ROUNDS: []} if args.rounds else {}
        for name, changes in runs.items():
            row = one(args, name, changes)
            file = args.out / args.task / args.model / f"{name.replace(' ', '-')}.json"
            file.write_text(json.dumps(row))
    files = [file for file in args.out.glob("*/*/*.json") if not file.match("*.time.json")]
    rows = [json.loads(file.read_text()) for file in files]
    order = ["default", *VARIATIONS, STEERED, ROUNDS]
    print(markdown(sorted(rows, key=lambda r: (r["task"], r["model"], order.index(r["name"])))))
