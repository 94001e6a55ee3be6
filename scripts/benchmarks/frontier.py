"""Reward against network evaluations and seconds: best-of-n, plain FK, and what goes below it.

    python -m scripts.bench frontier --task ocr --seeds 0 1
    python -m scripts.bench frontier --task clip --guidance-scale 2 --seeds 0 1
    python -m scripts.bench frontier --table
    python -m scripts.bench frontier --figure docs/frontier.png

Prompts, judges and intervals as in `lift`. An evaluation is one row of the network's batch: a
particle at a step, twice where it is guided. Seconds are the process's own (one thread), so that a
shared machine counts for less; they hold everything, scores, decoding and the final images.
Rows go to a JSON-lines file; a second call skips what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steering import FeynmanKac, Steered, tiny
from steering.networks import networks

from .lift import TASKS, chosen, interval, judged, prompts_of, read, steered

FUNNELS = {  # population after each of the eight scores
    "16 to 4": (16, 16, 12, 10, 8, 6, 4, 4),
    "16 to 2": (12, 8, 8, 6, 4, 4, 2, 2),
    "8 to 2": (8, 6, 6, 4, 4, 4, 2, 2),
    "32 to 4": (24, 16, 12, 8, 8, 4, 4, 4),
}


LATE = (16, 16, 16, 12, 10, 8, 6, 6)  # whole while guidance lasts


@dataclass(frozen=True)
class Point:
    """One way to spend evaluations: k particles, settings, and what else steer() is given."""

    k: int
    settings: FeynmanKac = FeynmanKac()  # noqa: RUF009 (frozen)
    call: dict[str, Any] = field(default_factory=dict)


def points(guided: bool) -> dict[str, Point]:
    """By name; intervals of guidance only where there is guidance."""
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
            point = Point(16, FeynmanKac(funnel=sizes), both)
            found[f"funnel {name}, guided 0-0.5"] = point
    return found


def measured(
    model: str, task: str, prompts: list[str], seed: int, guidance: float, point: Point
) -> tuple[Steered, float, float]:
    """The result, rows evaluated a prompt and this process's seconds a prompt."""
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
        evaluations, seconds = (
            float(np.mean([row[key] for row in mine])) for key in ("evaluations", "seconds")
        )
        k = len(mine[0]["rewards"][0])
        if name != "best of 16":
            values = chosen(mine, k)
            found[name] = {"evaluations": evaluations, "seconds": seconds, "values": values}
            continue
        for n in (1, 2, 4, 6, 8, 10, 16):
            share = n / k
            found[f"best of {n}"] = {
                "evaluations": evaluations * share,
                "seconds": seconds * share,
                "values": chosen(mine, n),
            }
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
    keys = ("model", "task", "guidance_scale", "prompts")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        model, task, guidance, count = key
        found = summaries([row for row in rows if tuple(row[name] for name in keys) == key])
        seeds = len({row["seed"] for row in rows if tuple(row[name] for name in keys) == key})
        reward, judge = TASKS[task]["reward"], TASKS[task]["judge"]
        lines += [
            f"\n**{model}, steered on `{reward}`** ({count} unseen prompts, guidance {guidance:g},"
            f" {seeds} seeds)\n",
            f"| | evaluations | of FK 16 | seconds | reward | minus FK 16 | {judge} | minus best of"
            " n at no fewer evaluations |",
            "|---|---|---|---|---|---|---|---|",
        ]
        base = found.get("FK 16")
        for name, point in sorted(found.items(), key=lambda item: item[1]["evaluations"]):
            r, h = point["values"]
            share = minus = more = ""
            if base is not None:
                share = f"{point['evaluations'] / base['evaluations']:.2f}"
                minus = interval(r - base["values"][0])
            if not name.startswith("best of"):
                other = rival(found, point["evaluations"])
                more = f"{interval(h - found[other]['values'][1])} ({other.split()[-1]})"
            lines.append(
                f"| {name} | {point['evaluations']:.0f} | {share} | {point['seconds']:.2f} |"
                f" {interval(r)} | {minus} | {interval(h)} | {more} |"
            )
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """Reward and held-out score over evaluations and over seconds, a row for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    tasks = list(dict.fromkeys((row["task"], row["guidance_scale"]) for row in rows))
    grid, axes = plt.subplots(
        len(tasks), 3, figsize=(15, 4.3 * len(tasks)), squeeze=False, layout="constrained"
    )
    for line, (task, guidance) in zip(axes, tasks, strict=True):
        mine = [r for r in rows if (r["task"], r["guidance_scale"]) == (task, guidance)]
        found = summaries(mine)
        reward, judge = TASKS[task]["reward"], TASKS[task]["judge"]
        for axis, across, which, label in (
            (line[0], "evaluations", 0, reward),
            (line[1], "seconds", 0, reward),
            (line[2], "evaluations", 1, f"{judge} (not steered on)"),
        ):
            _draw(axis, found, across, which)
            axis.set(
                xlabel=f"{across} a prompt",
                ylabel=label,
                title=f"{mine[0]['model']}, guidance {guidance:g}",
            )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.3)
        line[0].legend(fontsize=7)
    grid.savefig(path, dpi=110)


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
    parser = argparse.ArgumentParser(
        prog="frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--task", choices=sorted(TASKS), default="ocr")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--figure", type=Path, help="draw what is there")
    args = parser.parse_args(argv)
    rows = read(args.out)
    if not (args.table or args.figure):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        prompts = prompts_of(args.task, args.prompts)
        todo = [(s, item) for s in args.seeds for item in points(args.guidance_scale > 1).items()]
        for seed, (name, point) in todo:
            head = {
                "model": args.model,
                "task": args.task,
                "guidance_scale": args.guidance_scale,
                "prompts": args.prompts,
                "seed": seed,
                "point": name,
            }
            if any(all(row[key] == value for key, value in head.items()) for row in rows):
                continue
            print(head, flush=True)
            with torch.no_grad():
                out, evaluations, seconds = measured(
                    args.model, args.task, prompts, seed, args.guidance_scale, point
                )
                cost = {"evaluations": evaluations, "seconds": seconds}
                row = head | cost | judged(out, args.task)
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if args.figure:
        figure(rows, args.figure)
    print(table(rows))


if __name__ == "__main__":
    main()
