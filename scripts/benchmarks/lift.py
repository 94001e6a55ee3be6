"""How much steering lifts a reward, against plain samples and best-of-k of the same chain.

    python -m scripts.bench lift --model tiny-sd3 --task ocr --particles 2 4 8 --seeds 0 1
    python -m scripts.bench lift --table
    python -m scripts.bench lift --split tune --out runs/tune.jsonl --set min_ess=1 reward_scale=30

Prompts are ones that training never saw (scripts/tiny/unseen.json); settings are chosen on others,
which it may have seen (`--split tune`). Best-of-k is `min_ess=0` of the
same chain at the same seeds, so one run at the largest k gives plain (particle 0) and best-of-k for
every smaller k. Each image is judged twice: by the reward that steered it and by one that did not.
Rows go to a JSON-lines file; a second call skips what is there. Intervals: 95 %, percentile
bootstrap over prompts of the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import rewards
from rewards.images import to_images
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import OcrReward
from steering import FeynmanKac, Steered, steer, tiny
from steering.manifest import fingerprint
from tilt.statistics import percentile_interval

from ..tiny.world import scene

TASKS = {
    "ocr": {"reward": "ocr(mode=strict)", "scenes": ("text",), "judge": "OCR exact at 160 px"},
    "clip": {
        "reward": "clip(tiny)",
        "scenes": ("position", "color_attr"),
        "judge": "attribute detector",
    },
}


def prompts_of(task: str, count: int, split: str = "test") -> list[str]:
    """`count` different prompts, equally many of each kind of scene; "test": all unseen."""
    rng, prompts = np.random.default_rng(2024), []
    kinds = TASKS[task]["scenes"]
    if count < 1 or count % len(kinds):
        raise SystemExit(f"--prompts is {count} but must be a multiple of {len(kinds)} for {task}")
    kinds_left = {kind: count // len(kinds) for kind in kinds}
    while any(kinds_left.values()):
        for kind in [k for k, left in kinds_left.items() if left]:
            prompt = scene(rng, kind, unseen=split == "test").prompt
            if prompt not in prompts:
                prompts.append(prompt)
                kinds_left[kind] -= 1
    return prompts


def judge(task: str) -> Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]:
    """The reward that nothing is steered on: exact reading at another size, or the detector."""
    scorer = OcrReward("exact", limit_side_len=160) if task == "ocr" else ObjectsReward()
    return lambda images, prompts: scorer(to_images(list(images)), list(prompts)).numpy()


def steered(
    model: str,
    task: str,
    k: int,
    seed: int,
    settings: FeynmanKac,
    prompts: list[str],
    **call: Any,
) -> Steered:
    """Steer every prompt once by the task's reward; `call` over the embedded model's defaults."""
    pipe = call.pop("pipe", None) or tiny.load(model)
    pipe.set_progress_bar_config(disable=True)
    keywords: Any = tiny.call_defaults(model) | call
    return steer(
        pipe,
        prompts,
        rewards.load(TASKS[task]["reward"]),
        particles=k,
        settings=settings,
        seed=seed,
        preview=tiny.preview(),
        prompts_per_call=4,
        **keywords,
    )


def judged(out: Steered, task: str) -> dict:
    """Rewards (b, k) and the judge's scores of every image (b, k)."""
    check = judge(task)
    held_out = [
        check(images, [prompt] * len(images)).tolist()
        for images, prompt in zip(out.images, out.prompts, strict=True)
    ]
    return {"rewards": out.rewards.tolist(), "held_out": held_out}


def cells(args: argparse.Namespace, settings: FeynmanKac) -> list[tuple[str, int, int, FeynmanKac]]:
    """(method, k, seed, settings): one best-of run at the largest k, FK at every k.

    "stock" is best-of-k of the noiseless sampler, another p: the first thing a reader asks for.
    """
    best_of = replace(settings, min_ess=0.0)
    baselines = {"best-of": best_of, "stock": replace(best_of, noise=0.0)}
    todo = []
    for seed in args.seeds:
        for name, baseline in baselines.items():
            if args.method in ("all", name):
                todo.append((name, max(args.particles), seed, baseline))
        if args.method in ("all", "fk"):
            todo += [("fk", k, seed, settings) for k in args.particles if k > 1]
    return todo


def parse_settings(pairs: list[str]) -> FeynmanKac:
    """FeynmanKac from FIELD=VALUE words; numbers and lists as JSON, anything else a name."""
    values = {}
    for pair in pairs:
        field, _, text = pair.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        values[field] = tuple(value) if isinstance(value, list) else value
    return FeynmanKac(**values)


def read(file: Path) -> list[dict]:
    """All rows written so far."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def chosen(rows: list[dict], k: int) -> np.ndarray:
    """(2, b): reward and held-out score of the best of the first k particles, mean over seeds."""
    values = []
    for row in rows:
        r, h = (np.array(row[key])[:, :k] for key in ("rewards", "held_out"))
        best = r.argmax(axis=1)
        values.append([r[np.arange(len(r)), best], h[np.arange(len(h)), best]])
    return np.mean(values, axis=0)


def interval(values: np.ndarray, seed: int = 0) -> str:
    """Mean and 95 % bootstrap interval over prompts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(axis=1)
    return percentile_interval(float(values.mean()), torch.from_numpy(means)).text()


def _group(row: dict) -> tuple:
    """What rows must share to be compared."""
    return tuple(
        row[name] for name in ("model", "task", "split", "prompts", "weights", "guidance_scale")
    )


def table(rows: list[dict]) -> str:
    """Markdown: plain, best-of-k and FK at each k, and FK minus best-of-k, paired."""
    lines = []
    for key in sorted({(*_group(r), r["label"]) for r in rows if r["method"] == "fk"}):
        *group, label = key
        model, task, split, _, _, guidance = group
        same = [r for r in rows if _group(r) == tuple(group)]
        mine = [r for r in same if r["label"] == label]
        base = [
            r
            for r in same
            if r["method"] == "best-of" and r["settings"]["noise"] == mine[0]["settings"]["noise"]
        ]
        name, other = TASKS[task]["reward"], TASKS[task]["judge"]
        prompts = "unseen prompts" if split == "test" else "tuning prompts"
        seeds = len({r["seed"] for r in mine})
        lines += [
            f"\n**{model}, steered on `{name}`** ({len(mine[0]['rewards'])} {prompts},"
            f" guidance {guidance:g}, {seeds} seeds{', ' + label if label else ''})\n",
            f"| k | | reward | {other} |",
            "|---|---|---|---|",
        ]
        stock = [r for r in same if r["method"] == "stock"]
        for title, single in (("plain", base), ("plain, stock sampler", stock)):
            if single:
                reward, held_out = chosen(single, 1)
                lines.append(f"| 1 | {title} | {interval(reward)} | {interval(held_out)} |")
        for k in sorted({r["k"] for r in mine if r["method"] == "fk"}):
            fk = chosen([r for r in mine if r["method"] == "fk" and r["k"] == k], k)
            values = {"FK": fk}
            if wide := [r for r in base if r["k"] >= k]:
                best = chosen(wide, k)
                values = {"best of k": best, "FK": fk, "FK - best of k": fk - best}
            if deep := [r for r in stock if r["k"] >= k]:
                values = {"best of k, stock sampler": chosen(deep, k)} | values
            for method, (reward, held_out) in values.items():
                lines.append(f"| {k} | {method} | {interval(reward)} | {interval(held_out)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run the missing cells, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--task", choices=sorted(TASKS), default="ocr")
    parser.add_argument("--particles", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="of the prompts")
    add = parser.add_argument
    add("--guidance-scale", type=float, default=1.0, help="less leaves more to steer")
    parser.add_argument("--method", choices=("all", "best-of", "stock", "fk"), default="all")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="FeynmanKac")
    parser.add_argument("--out", type=Path, default=Path("runs/lift.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args(argv)
    rows = read(args.out)
    if not args.table:
        settings = parse_settings(args.set)
        prompts = prompts_of(args.task, args.prompts, args.split)
        networks = tiny.load(args.model).components.values()
        weights = "-".join(
            fingerprint(part)[:4] for part in networks if isinstance(part, nn.Module)
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        label = " ".join(args.set)
        for method, k, seed, chosen_settings in cells(args, settings):
            head = {
                "model": args.model,
                "task": args.task,
                "method": method,
                "k": k,
                "seed": seed,
                "prompts": args.prompts,
                "split": args.split,
                "weights": weights,
                "guidance_scale": args.guidance_scale,
                "label": label,
                "settings": json.loads(json.dumps(asdict(chosen_settings))),
            }
            if any(all(row[name] == value for name, value in head.items()) for row in rows):
                continue
            print(head, flush=True)
            with torch.no_grad():
                out = steered(
                    args.model,
                    args.task,
                    k,
                    seed,
                    chosen_settings,
                    prompts,
                    guidance_scale=args.guidance_scale,
                )
                row = head | judged(out, args.task)
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
