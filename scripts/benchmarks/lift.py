"""How much steering raises a reward, compared with plain samples and best-of-k of the same chain.

    python -m scripts.bench lift --model tiny-sd3 --task ocr --particles 2 4 8 --seeds 0 1
    python -m scripts.bench lift --split tune --out runs/tune.jsonl --set min_ess=1 reward_scale=30

docs/lift.md describes the measurement. Best-of-k is `min_ess=0` of the same chain with the same
seeds, so one run at the largest k gives the plain sample (particle 0) and best-of-k for every
smaller k. Rows are appended to a JSON-lines file, and a second call skips those it holds.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

import rewards
from rewards.images import to_images
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import OcrReward
from steering import FeynmanKac, Steered, steer, tiny
from steering.manifest import fingerprint
from tilt.drawing import filter_of
from tilt.statistics import percentile_interval

from ..parser import parser_of
from ..tables import head, line
from ..tiny.world import scene
from .rows import Rows

TASKS = {
    "ocr": {"reward": "ocr(mode=strict)", "scenes": ("text",), "judge": "OCR exact at 160 px"},
    "clip": {
        "reward": "clip(tiny)",
        "scenes": ("position", "color_attr"),
        "judge": "attribute detector",
    },
}
# what rows must share to be compared
GROUP = ("model", "task", "split", "prompts", "weights", "guidance_scale")


def prompts_of(task: str, count: int, split: str = "test") -> list[str]:
    """`count` different prompts, equally many of each kind of scene; "test": all unseen."""
    rng, prompts = np.random.default_rng(2024), []
    kinds = TASKS[task]["scenes"]
    if count < 1 or count % len(kinds):
        raise SystemExit(f"--prompts is {count} but must be a multiple of {len(kinds)} for {task}")
    left = dict.fromkeys(kinds, count // len(kinds))
    while any(left.values()):
        for kind in [kind for kind, missing in left.items() if missing]:
            prompt = scene(rng, kind, unseen=split == "test").prompt
            if prompt not in prompts:
                prompts.append(prompt)
                left[kind] -= 1
    return prompts


def steered(
    model: str, task: str, k: int, seed: int, settings: FeynmanKac, prompts: list[str], **call: Any
) -> Steered:
    """Steer every prompt once by the task's reward; `call` overrides the model's defaults."""
    pipe = call.pop("pipe", None) or tiny.load(model)
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call_defaults(model) | {"preview": tiny.preview(), "prompts_per_call": 4} | call
    reward = rewards.load(TASKS[task]["reward"])
    return steer(pipe, prompts, reward, k, settings, seed=seed, **call)


@torch.no_grad()
def judged(out: Steered, task: str) -> dict[str, Any]:
    """The rewards (b, k), and the scores (b, k) of a reward that was not used for steering.

    The latter is exact reading at another size, or the detector.
    """
    judge = OcrReward("exact", limit_side_len=160) if task == "ocr" else ObjectsReward()
    held_out = [
        judge(to_images(list(images)), [prompt] * len(images)).tolist()
        for images, prompt in zip(out.images, out.prompts, strict=True)
    ]
    return {"rewards": out.rewards.tolist(), "held_out": held_out}


def cells(
    particles: list[int], seeds: list[int], settings: FeynmanKac
) -> list[tuple[str, int, int, FeynmanKac]]:
    """(method, k, seed, settings): the baselines at the largest k, and FK at every k above 1.

    "stock" is best-of-k of the noiseless sampler, which has a different p.
    """
    best_of = replace(settings, min_ess=0.0)
    baselines = {"best-of": best_of, "stock": replace(best_of, noise=0.0)}
    todo = []
    for seed in seeds:
        todo += [(name, max(particles), seed, baseline) for name, baseline in baselines.items()]
        todo += [("fk", k, seed, settings) for k in particles if k > 1]
    return todo


def parse_settings(pairs: list[str]) -> FeynmanKac:
    """FeynmanKac from words such as min_ess=1 and funnel=[4,2]."""
    fields: Any = OmegaConf.to_container(OmegaConf.from_dotlist(pairs))
    return filter_of(fields)


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


def table(rows: list[dict]) -> str:
    """Markdown: plain, best-of-k and FK at each k, and FK minus best-of-k, paired."""
    lines = []
    for key in sorted(
        {tuple(r[n] for n in (*GROUP, "label")) for r in rows if r["method"] == "fk"}
    ):
        *group, label = key
        same = [row for row in rows if [row[name] for name in GROUP] == group]
        mine = [row for row in same if row["label"] == label and row["method"] == "fk"]
        baselines = [row for row in same if row["method"] == "best-of"]
        noise = mine[0]["settings"]["noise"]
        base = [row for row in baselines if row["settings"]["noise"] == noise]
        stock = [row for row in same if row["method"] == "stock"]
        model, task, split, *_, guidance = group
        prompts = "unseen prompts" if split == "test" else "tuning prompts"
        seeds = len({row["seed"] for row in mine})
        lines += [
            f"\n**{model}, steered on `{TASKS[task]['reward']}`** ({len(mine[0]['rewards'])}"
            f" {prompts}, guidance {guidance:g}, {seeds} seeds{', ' + label if label else ''})\n",
            head("k", "", "reward", TASKS[task]["judge"]),
        ]
        values = {(1, "plain"): (base, 1), (1, "plain, stock sampler"): (stock, 1)}
        lines += [line(*cell, *map(interval, chosen(*of))) for cell, of in values.items() if of[0]]
        for k in sorted({row["k"] for row in mine}):
            lines += compared(k, [row for row in mine if row["k"] == k], base, stock)
    return "\n".join(lines)


def compared(k: int, fk: list[dict], base: list[dict], stock: list[dict]) -> list[str]:
    """The rows of FK at one k, and of the baselines that were run with as many particles."""
    values = {"FK": chosen(fk, k)}
    if wide := [row for row in base if row["k"] >= k]:
        best = chosen(wide, k)
        values = {"best of k": best, **values, "FK - best of k": values["FK"] - best}
    if deep := [row for row in stock if row["k"] >= k]:
        values = {"best of k, stock sampler": chosen(deep, k), **values}
    return [line(k, method, *map(interval, found)) for method, found in values.items()]


def main(argv: list[str] | None = None) -> None:
    """Run the missing cells and print the table."""
    parser = parser_of(__doc__, __name__)
    add = parser.add_argument
    add("--model", choices=tiny.NAMES, default="tiny-sd3")
    add("--task", choices=sorted(TASKS), default="ocr")
    add("--particles", type=int, nargs="+", default=[2, 4, 8])
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--prompts", type=int, default=60)
    add("--split", choices=("test", "tune"), default="test", help="which prompts")
    add("--guidance-scale", type=float, default=1.0, help="a lower one leaves more to steer")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of FeynmanKac")
    add("--out", type=Path, default=Path("runs/lift.jsonl"))
    add("--table", action="store_true", help="only print the existing results")
    args = parser.parse_args(argv)
    rows = Rows(args.out)
    if not args.table:
        complete(rows, args.model, args.task, args)
    print(table(rows))


def complete(rows: Rows, model: str, task: str, args: argparse.Namespace) -> None:
    """Run the cells that the file of `rows` lacks."""
    prompts = prompts_of(task, args.prompts, args.split)
    networks = [
        part for part in tiny.load(model).components.values() if isinstance(part, nn.Module)
    ]
    weights = "-".join(fingerprint(network)[:4] for network in networks)
    group = (model, task, args.split, args.prompts, weights, args.guidance_scale)
    shared = dict(zip(GROUP, group, strict=True)) | {"label": " ".join(args.set)}
    for method, k, seed, settings in cells(args.particles, args.seeds, parse_settings(args.set)):
        fields = json.loads(json.dumps(asdict(settings)))
        cell = shared | {"method": method, "k": k, "seed": seed, "settings": fields}
        if not rows.has(cell):
            print(cell, flush=True)
            call = {"guidance_scale": args.guidance_scale}
            rows.keep(cell | judged(steered(model, task, k, seed, settings, prompts, **call), task))
