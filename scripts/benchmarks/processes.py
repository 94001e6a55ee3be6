"""Prompts per second of two processes over those of one, each with a core of its own.

    python -m scripts.bench processes --pairs 5 --prompts 8

Two workers are started as torchrun starts them, with one core and one thread each. They load the
model and draw a prompt to warm up. Then, in pairs, one of them draws all prompts while the other
sleeps, and both draw every second one of the same prompts, files included. Before each, there is a
barrier; seconds count from there to the last file of the slower worker, so imports, loading and the
launcher are left out. Which of a pair comes first alternates, and so does the worker that is alone.

*Of CPU seconds* is the same ratio with the CPU seconds of the slower worker, which other users of
the machine do not change. --commands adds whole commands of scripts/steer.py, from the start of
Python to the grids, of one process on one core and of two.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import rewards
from steering import FeynmanKac, tiny
from tilt import runs
from tilt.prompts import Prompt

from ..parser import parser_of
from ..tables import span, table
from .machine import about
from .timing import seconds
from .tuning import command

MODEL, PARTICLES = "tiny-sd3", 4
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


class Drawer:
    """Draws prompts in a worker: holds the model, the reward and the folder."""

    def __init__(self, folder: Path):
        self.folder, self.times = folder, 0
        self.pipe = tiny.load(MODEL)
        self.pipe.set_progress_bar_config(disable=True)
        self.reward = rewards.load("clip(tiny)")
        call = tiny.call_defaults(MODEL) | {"preview": tiny.preview(), "particles": PARTICLES}
        self.kinds: dict[str, dict[str, Any]] = {
            "steered": call | {"settings": FeynmanKac(), "progress": False}
        }

    def __call__(self, count: int, ranks: Sequence[int], state: PartialState) -> list[float]:
        """Seconds in which `ranks` draw `count` prompts, after a barrier: wall-clock and CPU.

        All workers get the values of the slowest one.
        """
        self.times += 1
        prompts = [Prompt(f"{i} red circles") for i in range(count)]
        rank = state.process_index
        mine = prompts[ranks.index(rank) :: len(ranks)] if rank in ranks else []
        shares = runs.divide(self.folder / str(self.times), mine, 1)
        state.wait_for_everyone()
        clocks = (time.perf_counter, time.process_time)
        began = [clock() for clock in clocks]
        for folder, results in runs.steer_pending(self.pipe, self.reward, shares, self.kinds):
            runs.keep(folder, results)
        took = [
            clock() - start if mine else 0.0 for clock, start in zip(clocks, began, strict=True)
        ]
        return [max(kind) for kind in zip(*gather_object([took]), strict=True)]


def work(cores: Sequence[int], pairs: int, prompts: int, folder: str) -> list[list[float]]:
    """A worker: the ratios two/one of prompts per second and per CPU second, of each pair."""
    state = PartialState(cpu=True)
    os.sched_setaffinity(0, {cores[state.process_index]})
    torch.set_num_threads(1)
    draw = Drawer(Path(folder))
    draw(2, (0, 1), state)
    found = []
    for pair in range(pairs):
        alone = (pair // 2 % 2,)
        order = ((0, 1), alone) if pair % 2 else (alone, (0, 1))
        took = {ranks: draw(prompts, ranks, state) for ranks in order}
        found.append([a / b for a, b in zip(took[alone], took[0, 1], strict=True)])
    state.destroy_process_group()
    return found


def measure(pairs: int, prompts: int) -> dict[str, list[float]]:
    """The ratios two/one of alternating pairs, of prompts per "second" and per "CPU second".

    prompts: how many each side of a pair draws, an even number. Raises ValueError for an odd one,
    which two cannot share evenly, and where this process has fewer than two cores.
    """
    if prompts < 2 or prompts % 2:
        raise ValueError(f"prompts={prompts}: pass an even number, which two can share evenly")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError(f"{len(cores)} core is not enough: each of two processes takes its own")
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)  # read by the workers when they import torch
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = elastic_launch(config, work)(cores[:2], pairs, prompts, folder)[0]
    finally:
        os.environ.clear()
        os.environ.update(before)
    clock, cpu = zip(*found, strict=True)
    return {"second": list(clock), "CPU second": list(cpu)}


def commands(pairs: int, prompts: int) -> list[float]:
    """The ratios two/one of prompts per second of whole commands of scripts/steer.py.

    Raises subprocess.CalledProcessError where one fails.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = []
    for pair in range(pairs):
        order = (1, 2) if pair % 2 == 0 else (2, 1)
        took = {count: _command(count, cores, prompts) for count in order}
        found.append(took[1] / took[2])
    return found


def _command(count: int, cores: Sequence[int], prompts: int) -> float:
    words = [f"{i} red circles" for i in range(prompts)]
    words += ["--model", MODEL, "--particles", str(PARTICLES)]
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores[:count]))]
    with tempfile.TemporaryDirectory() as folder:
        line = [*pinned, *command("steer.py", [*words, "--out", f"{folder}/out"], count)]
        run = partial(subprocess.run, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
        return seconds(lambda: run(line))


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--commands", type=int, default=0, help="pairs of commands")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as the workers have
    found = measure(args.pairs, args.prompts)
    rows = {"prompts per second": found["second"], "of CPU seconds": found["CPU second"]}
    if args.commands:
        rows["whole commands"] = commands(args.commands, args.prompts)
    print(about(torch.device("cpu"), torch.float32) + " a process\n")
    print(f"{MODEL}, k = {PARTICLES}, {args.prompts} prompts\n")
    heads = ("two processes / one", "median [min, max]", "pairs")
    print(table(heads, [(name, span(of, 2), len(of)) for name, of in rows.items()]))
