"""Reward against network evaluations and seconds: best-of-n, plain FK, and cheaper ways.

    python -m scripts.bench frontier --task clip --guidance-scale 2 --seeds 0 1
    python -m scripts.bench frontier --figure docs/frontier.png

docs/performance.md describes the measurement. Seconds are CPU seconds of this process (one thread),
so that a shared machine disturbs them less. Rows are appended to a JSON-lines file, and a second
call skips those it holds.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from steering import FeynmanKac, Steered, tiny
from steering.networks import networks

from ..parser import parser_of
from ..tables import head, line
from .lift import TASKS, chosen, interval, judged, prompts_of, steered
from .rows import Rows

FUNNELS = {  # population after each of the eight scores
    "16 to 4": (16, 16, 12, 10, 8, 6, 4, 4),
    "16 to 2": (12, 8, 8, 6, 4, 4, 2, 2),
    "8 to 2": (8, 6, 6, 4, 4, 4, 2, 2),
    "32 to 4": (24, 16, 12, 8, 8, 4, 4, 4),
}
LATE = (16, 16, 16, 12, 10, 8, 6, 6)  # does not shrink while guidance lasts
GROUP = ("model", "task", "guidance_scale", "prompts")  # what rows must share to be compared


@dataclass(frozen=True)
class Point:
    """One way to spend evaluations: k particles, settings, and what else steer() is given."""

    k: int
    settings: FeynmanKac = FeynmanKac()  # noqa: RUF009 (frozen)
    call: dict[str, Any] = field(default_factory=dict)


def points(guided: bool) -> dict[str, Point]:
    """The points by name; intervals of guidance only if there is guidance."""
    found = {"best of 16": Point(16, FeynmanKac(min_ess=0.0))}
    found |= {f"FK {k}": Point(k) for k in (2, 4, 8, 16)}
    for name, sizes in FUNNELS.items():
        found[f"funnel {name}"] = Point(int(name.split()[0]), FeynmanKac(funnel=sizes))
    found["FK 16, previews half as large"] = Point(16, call={"preview_size": 0.5})
    if guided:
        for low, high in ((0.0, 0.5), (0.0, 0.7), (0.1, 0.6)):
            call = {"guidance_interval": (low, high)}
            found[f"FK 16, guided {low:g}-{high:g}"] = Point(16, call=call)
        both = {"guidance_interval": (0.0, 0.5)}
        for name, sizes in {"16 to 4": FUNNELS["16 to 4"], "16 to 6": LATE}.items():
            found[f"funnel {name}, guided 0-0.5"] = Point(16, FeynmanKac(funnel=sizes), both)
    return found


def measured(
    model: str, task: str, prompts: list[str], seed: int, guidance: float, point: Point
) -> tuple[Steered, float, float]:
    """The result, and for each prompt the rows evaluated and the CPU seconds of this process."""
    rows, pipe = 0, tiny.load(model)

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        sample: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        rows += len(sample)

    for network in networks(pipe).values():
        network.register_forward_pre_hook(count, with_kwargs=True)
    call = {"guidance_scale": guidance, "pipe": pipe, **point.call}
    began = time.process_time()
    out = steered(model, task, point.k, seed, point.settings, prompts, **call)
    seconds = time.process_time() - began
    return out, rows / len(prompts), seconds / len(prompts)


def summaries(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """By point: evaluations, seconds and (2, b) reward and held-out score, means over seeds.

    Best-of-n for n < 16 is the best of the first n of the 16, at its share of the evaluations.
    """
    found = {}
    for name in dict.fromkeys(row["point"] for row in rows):
        mine = [row for row in rows if row["point"] == name]
        k = len(mine[0]["rewards"][0])
        sizes = {name: k}
        if name == "best of 16":
            sizes = {f"best of {n}": n for n in (1, 2, 4, 6, 8, 10, 16)}
        for point, n in sizes.items():
            costs = ("evaluations", "seconds")
            spent = {cost: float(np.mean([row[cost] for row in mine])) * n / k for cost in costs}
            found[point] = {**spent, "values": chosen(mine, n)}
    return found


def rival(found: dict[str, dict[str, Any]], evaluations: float) -> str:
    """The smallest best-of-n that costs at least as many evaluations."""
    enough = [
        (point["evaluations"], name)
        for name, point in found.items()
        if name.startswith("best of") and point["evaluations"] >= evaluations - 1e-6
    ]
    return min(enough)[1] if enough else "best of 16"


def table(rows: list[dict]) -> str:
    """Markdown, one table for each model, task and guidance scale."""
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in GROUP) for row in rows):
        model, task, guidance, count = key
        mine = [row for row in rows if tuple(row[name] for name in GROUP) == key]
        found, seeds = summaries(mine), len({row["seed"] for row in mine})
        judge, rest = TASKS[task]["judge"], "minus best of n at no fewer evaluations"
        lines += [
            f"\n**{model}, steered on `{TASKS[task]['reward']}`** ({count} unseen prompts, guidance"
            f" {guidance:g}, {seeds} seeds)\n",
            head("", "evaluations", "of FK 16", "seconds", "reward", "minus FK 16", judge, rest),
        ]
        order = sorted(found, key=lambda name: found[name]["evaluations"])
        lines += [point_line(name, found) for name in order]
    return "\n".join(lines)


def point_line(name: str, found: dict[str, dict[str, Any]]) -> str:
    """A row of the table, with differences from FK 16, if it was run, and from best of n."""
    point, base = found[name], found.get("FK 16")
    (r, h), cost = point["values"], point["evaluations"]
    share = minus = more = ""
    if base is not None:
        share = f"{cost / base['evaluations']:.2f}"
        minus = interval(r - base["values"][0])
    if not name.startswith("best of"):
        other = rival(found, cost)
        more = f"{interval(h - found[other]['values'][1])} ({other.split()[-1]})"
    numbers = (f"{cost:.0f}", share, f"{point['seconds']:.2f}")
    return line(name, *numbers, interval(r), minus, interval(h), more)


def figure(rows: list[dict], path: Path) -> None:
    """Reward and held-out score over evaluations and over seconds, a row for each task."""
    tasks = list(dict.fromkeys((row["task"], row["guidance_scale"]) for row in rows))
    page = Figure(figsize=(15, 4.3 * len(tasks)), layout="constrained")
    grid = page.subplots(len(tasks), 3, squeeze=False)
    for axes, (task, guidance) in zip(grid, tasks, strict=True):
        mine = [r for r in rows if (r["task"], r["guidance_scale"]) == (task, guidance)]
        found, reward = summaries(mine), TASKS[task]["reward"]
        held_out = f"{TASKS[task]['judge']} (not steered on)"
        title = f"{mine[0]['model']}, guidance {guidance:g}"
        across, labels = ("evaluations", "seconds", "evaluations"), (reward, reward, held_out)
        for axis, cost, which, label in zip(axes, across, (0, 0, 1), labels, strict=True):
            _draw(axis, found, cost, which)
            axis.set(xlabel=f"{cost} a prompt", ylabel=label, title=title)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
    page.savefig(path, dpi=110)


def _draw(axis: Any, found: dict[str, dict[str, Any]], across: str, which: int) -> None:
    kinds = {"best of": ("o-", "0.5"), "FK": ("s-", "tab:blue"), "funnel": ("^", "tab:orange")}
    for kind, (style, colour) in kinds.items():
        plain = [p for n, p in found.items() if n.startswith(kind) and "," not in n]
        plain.sort(key=lambda point: point[across])
        x, y = [p[across] for p in plain], [p["values"][which].mean() for p in plain]
        axis.plot(x, y, style, color=colour, label={"best of": "best of n"}.get(kind, kind))
    others = {n: p for n, p in found.items() if "," in n}
    for i, (name, point) in enumerate(others.items()):
        mean = point["values"][which].mean()
        axis.plot(point[across], mean, "Dv*PX<"[i], color=f"C{i + 2}", ms=7, label=name)


def main(argv: list[str] | None = None) -> None:
    """Run the missing points, print the table, draw the figure."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--task", choices=sorted(TASKS), default="ocr")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the existing results")
    parser.add_argument("--figure", type=Path, help="draw the existing results")
    args = parser.parse_args(argv)
    rows = Rows(args.out)
    if not (args.table or args.figure):
        complete(rows, args)
    if args.figure:
        figure(rows, args.figure)
    print(table(rows))


def complete(rows: Rows, args: argparse.Namespace) -> None:
    """Run the points that the file of `rows` lacks."""
    prompts, guidance = prompts_of(args.task, args.prompts), args.guidance_scale
    group = dict(zip(GROUP, (args.model, args.task, guidance, args.prompts), strict=True))
    for seed in args.seeds:
        for name, point in points(guidance > 1).items():
            row = group | {"seed": seed, "point": name}
            if rows.has(row):
                continue
            print(row, flush=True)
            out, evaluations, seconds = measured(
                args.model, args.task, prompts, seed, guidance, point
            )
            spent = {"evaluations": evaluations, "seconds": seconds}
            rows.keep(row | spent | judged(out, args.task))
