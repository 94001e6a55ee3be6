"""Prompts per second of two processes over those of one, each with a core of its own.

    python -m scripts.bench processes --pairs 5 --prompts 8

Two workers are started as torchrun starts them, each bound to one core and one thread. They load
the model and draw a prompt to warm up. Then, in pairs, one of them draws all prompts while the
other sleeps, and both draw every second one of the same prompts, through the functions of
scripts/steer.py, files written. Before each, a barrier; a worker reports the seconds from there to
its last file, and the slower one's count. So imports, loading and the launcher are left out. Which
of a pair comes first alternates, and so does the worker that is alone: the cores of a shared
machine differ. The figure is the ratio of prompts per second, pair by pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import rewards
from steering import FeynmanKac, runs, tiny
from steering.prompts import Prompt

from .machine import about

MODEL, PARTICLES = "tiny-sd3", 4
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


class Drawer:
    """What a worker holds while the pairs run: the model, the reward and where files go."""

    def __init__(self, folder: Path):
        self.folder, self.times = folder, 0
        self.pipe = tiny.load(MODEL)
        self.pipe.set_progress_bar_config(disable=True)
        self.reward = rewards.load("clip(tiny)")
        call = tiny.call_defaults(MODEL) | {"preview": tiny.preview(), "particles": PARTICLES}
        self.kinds: dict[str, dict[str, Any]] = {
            "steered": call | {"settings": FeynmanKac(), "progress": False}
        }

    def __call__(self, count: int, ranks: Sequence[int], state: PartialState) -> float:
        """Seconds in which `ranks` draw so many prompts, after a barrier; the same on all."""
        self.times += 1
        prompts = [Prompt(f"{i} red circles") for i in range(count)]
        rank = state.process_index
        mine = prompts[ranks.index(rank) :: len(ranks)] if rank in ranks else []
        shares = runs.divide(self.folder / str(self.times), mine, 1)
        state.wait_for_everyone()
        began = time.perf_counter()
        for folder, results in runs.steer_pending(self.pipe, self.reward, shares, self.kinds):
            runs.keep(folder, results)
        return max(gather_object([time.perf_counter() - began if mine else 0.0]))


def work(cores: Sequence[int], pairs: int, prompts: int, folder: str) -> list[float]:
    """A worker: the ratios two/one of prompts per second."""
    state = PartialState(cpu=True)
    os.sched_setaffinity(0, {cores[state.process_index]})
    torch.set_num_threads(1)
    draw = Drawer(Path(folder))
    draw(2, (0, 1), state)
    found = []
    for pair in range(pairs):
        alone = (pair // 2 % 2,)
        order = ((0, 1), alone) if pair % 2 else (alone, (0, 1))
        seconds = {ranks: draw(prompts, ranks, state) for ranks in order}
        found.append(seconds[alone] / seconds[0, 1])
    state.destroy_process_group()
    return found


def measure(pairs: int, prompts: int) -> list[float]:
    """The ratios two/one of prompts per second, of alternating pairs.

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
            return elastic_launch(config, work)(cores[:2], pairs, prompts, folder)[0]
    finally:
        os.environ.clear()
        os.environ.update(before)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print a table of one row."""
    parser = argparse.ArgumentParser(
        prog="processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as the workers have
    found = measure(args.pairs, args.prompts)
    print(about(torch.device("cpu"), torch.float32) + f" a process, {args.pairs} pairs\n")
    print("| model | k | prompts | prompts per second, two / one: median [min, max] |")
    print("|---|---|---|---|")
    print(
        f"| {MODEL} | {PARTICLES} | {args.prompts} | {statistics.median(found):.2f}"
        f" [{min(found):.2f}, {max(found):.2f}] |"
    )


if __name__ == "__main__":
    main()
