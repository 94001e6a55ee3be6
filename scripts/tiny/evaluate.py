"""Measure the embedded models and write their model cards.

    python -m scripts.tiny.evaluate --run runs/tiny
    python -m scripts.tiny.evaluate --run runs/tiny --models tiny-sd3 --each 40 --no-cards

Each task has prompts that training saw and prompts that it never saw (scripts/tiny/unseen.json),
with one picture each at the default steps and guidance. Words are judged by RapidOCR (exact,
ignoring case), the rest by the detector of `rewards.models.objects`. Intervals: 95 %, Wilson.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.images import to_images
from rewards.models.aesthetic import AestheticReward
from rewards.models.clip import ClipReward
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import OcrReward
from steering import generators, tiny

from ..parser import parser_of
from . import cards, train_aesthetic, train_dino
from .world import TASKS, render, scene

HELD_OUT = ("colors", "position", "color_attr", "text")  # tasks that have unseen prompts


def prompts_of(task: str, unseen: bool, count: int) -> list[str]:
    """`count` prompts of a task, the same at every call."""
    rng = np.random.default_rng([TASKS.index(task), int(unseen), 7])
    return [scene(rng, task, unseen).prompt for _ in range(count)]


def generate(
    name: str, prompts: list[str], seed: int = 0, batch: int = 32, **keywords: int
) -> list[Image.Image]:
    """One picture of each prompt, by the embedded pipeline with its stock scheduler.

    keywords: of its call; they override the defaults.
    """
    pipe = tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), batch):
        chunk = prompts[i : i + batch]
        draws = generators(seed + i, chunk, 1)
        images += pipe(chunk, generator=draws, **tiny.call_defaults(name) | keywords).images
    return images


def wilson(right: float, n: int) -> str:
    """The share right/n in per cent with its 95 % interval."""
    z, p = 1.96, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f"{100 * p:.0f} % [{100 * (centre - half):.0f}, {100 * (centre + half):.0f}]"


def accuracies(name: str, each: int) -> list[str]:
    """Rows of the card's table, one for each task and one for all but text."""
    reader, detector, rows = OcrReward("exact"), ObjectsReward(), []
    totals = {False: [0.0, 0], True: [0.0, 0]}
    for task in TASKS:
        shares = []
        for unseen in (False, True):
            if unseen and task not in HELD_OUT:
                shares.append("-")
                continue
            prompts = prompts_of(task, unseen, each)
            images = generate(name, prompts)
            judge = reader if task == "text" else detector
            right = float((judge(to_images(images), prompts) > 0.999).sum())
            shares.append(wilson(right, each))
            if task != "text":
                totals[unseen][0] += right
                totals[unseen][1] += each
        rows.append(f"| {task} | {shares[0]} | {shares[1]} |")
    shares = [wilson(*totals[unseen]) for unseen in (False, True)]
    rows.append(f"| all but text | {shares[0]} | {shares[1]} |")
    return rows


def retrieval(trials: int = 40, captions: int = 64) -> str:
    """Top-1 of tiny-clip over 64 different held-out captions, image to text, on clean renders."""
    towers = ClipReward("tiny").towers
    right = 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 11])
        scenes = {}
        while len(scenes) < captions:
            task = TASKS[int(rng.integers(len(TASKS)))]
            drawn = scene(rng, task, unseen=task in HELD_OUT)
            scenes.setdefault(drawn.prompt, drawn)
        images = to_images([render(drawn) for drawn in scenes.values()])
        with torch.no_grad():
            similarity = towers.image_features(images) @ towers.text_features(list(scenes)).T
        right += int((similarity.argmax(1) == torch.arange(captions)).sum())
    return wilson(right, trials * captions)


def parameters(folder: Path) -> str:
    """Millions of parameters of each part of a folder."""
    from safetensors import safe_open

    parts = []
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            count = sum(math.prod(weights.get_slice(k).get_shape()) for k in weights.keys())  # noqa: SIM118
        part = file.parent.name if file.parent != folder else folder.name
        parts.append(f"{part} {count / 1e6:.2f} M")
    return ", ".join(parts)


def training(run: Path, name: str) -> str:
    """Images seen and minutes, from the file that the training wrote."""
    file = run / f"{name}.json"
    if not file.exists():
        return "not recorded"
    report = json.loads(file.read_text())
    minutes = round(report["minutes"])
    unit = "minute" if minutes == 1 else "minutes"
    return f"{report['images'] / 1e3:.0f} k images seen in {minutes} {unit}"


def pipeline_card(name: str, run: Path, each: int) -> str:
    """The model card of an embedded pipeline, as Markdown."""
    folder = cards.FOLDERS[name]
    rows = accuracies(name, each)
    print("\n".join(rows), flush=True)
    return cards.card(
        "pipeline",
        name=name,
        kind=json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"],
        parameters=parameters(folder),
        training=training(run, name),
        defaults=", ".join(f"{key}={value}" for key, value in tiny.call_defaults(name).items()),
        each=each,
        rows=rows,
    )


def clip_card(run: Path) -> str:
    """The model card of tiny-clip."""
    share = retrieval()
    print("tiny-clip top-1 over 64:", share, flush=True)
    count = parameters(cards.FOLDERS["clip"])
    return cards.card("clip", parameters=count, training=training(run, "clip"), share=share)


def dino_card(run: Path) -> str:
    """The model card of tiny-dino."""
    folder = cards.FOLDERS["dino"]
    neighbours = train_dino.neighbour_table(folder)
    ranks = train_dino.ranking_table(folder)
    print("\n".join([*neighbours, "", *ranks]), flush=True)
    return cards.card(
        "dino",
        parameters=parameters(folder),
        training=training(run, "dino"),
        neighbours=neighbours,
        ranks=ranks,
    )


def steps_agreement(count: int = 200) -> str:
    """How often tiny-aesthetic rates tiny-sd3's picture of 20 steps above that of 4."""
    rate = AestheticReward("tiny")
    prompts = [prompt for task in TASKS for prompt in prompts_of(task, False, -(-count // 7))]
    prompts = prompts[:count]
    scores = [
        rate(to_images(generate("tiny-sd3", prompts, num_inference_steps=steps)), prompts)
        for steps in (4, 20)
    ]
    return wilson(float((scores[1] > scores[0]).sum()), count)


def aesthetic_card(run: Path) -> str:
    """The model card of tiny-aesthetic."""
    reward = AestheticReward("tiny")
    tables = train_aesthetic.tables(lambda x: reward(x, [""] * len(x)))
    steps = steps_agreement()
    print("\n".join([*tables, "", steps]), flush=True)
    return cards.card(
        "aesthetic",
        parameters=reward.towers.width + 1,
        training=training(run, "aesthetic"),
        steps=steps,
        tables=tables,
    )


REWARDS = {"clip": clip_card, "dino": dino_card, "aesthetic": aesthetic_card}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write README.md into the folders of the models."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--models", nargs="+", default=list(cards.FOLDERS))
    parser.add_argument("--each", type=int, default=100, help="prompts of a cell")
    parser.add_argument("--cards", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    for name in args.models:
        make = REWARDS.get(name)
        text = pipeline_card(name, args.run, args.each) if make is None else make(args.run)
        if args.cards:
            (cards.FOLDERS[name] / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
