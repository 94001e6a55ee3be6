"""Measure the embedded models and write their model cards.

    python -m scripts.tiny.evaluate --run runs/tiny
    python -m scripts.tiny.evaluate --run runs/tiny --models tiny-sd3 --each 40 --no-cards

Per task: prompts that training saw and prompts it never saw (scripts/tiny/unseen.json), one picture
each at the default steps and guidance. Words are judged by RapidOCR (exact, without case), the rest
by the colour-shape detector of `rewards.objects`. Intervals: 95 %, Wilson.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.clip import ClipReward
from rewards.images import to_images
from rewards.objects import ObjectsReward
from rewards.ocr import OcrReward
from steering import generators, tiny

from .world import TASKS, render, scene

ROOT = Path(__file__).parents[2]


def prompts_of(task: str, unseen: bool, count: int) -> list[str]:
    """`count` prompts of a task, the same at every call."""
    rng = np.random.default_rng([TASKS.index(task), int(unseen), 7])
    return [scene(rng, task, unseen).prompt for _ in range(count)]


def generate(name: str, prompts: list[str], seed: int = 0, batch: int = 32) -> list[Image.Image]:
    """One picture a prompt from the embedded pipeline with its stock scheduler."""
    pipe = tiny.load(name)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), batch):
        chunk = prompts[i : i + batch]
        draws = generators(seed + i, chunk, 1)
        images += pipe(chunk, generator=draws, **tiny.call_defaults(name)).images
    return images


def wilson(right: float, n: int) -> str:
    """The share right/n in per cent with its 95 % interval."""
    z, p = 1.96, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f"{100 * p:.0f} % [{100 * (centre - half):.0f}, {100 * (centre + half):.0f}]"


def accuracies(name: str, each: int) -> tuple[list[str], Image.Image]:
    """Rows of the card's table and a sheet of samples, one row a task."""
    reader, detector = OcrReward("exact"), ObjectsReward()
    rows, sheet = [], Image.new("RGB", (12 * 66, 2 * len(TASKS) * 66), "white")
    totals = {False: [0.0, 0], True: [0.0, 0]}
    for row, task in enumerate(TASKS):
        shares = []
        for unseen in (False, True):
            if unseen and task in ("single_object", "two_object", "counting"):
                shares.append("-")  # nothing is held out of these
                continue
            prompts = prompts_of(task, unseen, each)
            images = generate(name, prompts)
            judge = reader if task == "text" else detector
            right = float((judge(to_images(images), prompts) > 0.999).sum())
            shares.append(wilson(right, each))
            if task != "text":
                totals[unseen][0] += right
                totals[unseen][1] += each
            for column, image in enumerate(images[:12]):
                sheet.paste(image, (column * 66 + 1, (2 * row + unseen) * 66 + 1))
        rows.append(f"| {task} | {shares[0]} | {shares[1]} |")
    shares = [wilson(*totals[unseen]) for unseen in (False, True)]
    rows.append(f"| all but text | {shares[0]} | {shares[1]} |")
    return rows, sheet


def retrieval(trials: int = 40, captions: int = 64) -> str:
    """Top-1 of tiny-clip over 64 different held-out captions, image to text, on clean renders."""
    towers = ClipReward("tiny").towers
    right = 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 11])
        scenes = {}
        while len(scenes) < captions:
            task = TASKS[int(rng.integers(len(TASKS)))]
            drawn = scene(rng, task, unseen=task in ("colors", "color_attr", "position", "text"))
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
    """Images seen and minutes, as the training wrote them down."""
    file = run / f"{name}.json"
    if not file.exists():
        return "not recorded"
    report = json.loads(file.read_text())
    return f"{report['images'] / 1e3:.0f} k images seen in {report['minutes']:.0f} minutes"


def card(name: str, run: Path, each: int) -> str:
    """The model card of an embedded pipeline, as Markdown."""
    folder = ROOT / "steering" / "tiny" / name
    rows, sheet = accuracies(name, each)
    sheet.save(run / f"{name}.png")
    print("\n".join(rows), flush=True)
    defaults = ", ".join(f"{key}={value}" for key, value in tiny.call_defaults(name).items())
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A real `{json.loads((folder / 'model_index.json').read_text())['_class_name']}` of"
            " 64x64 pictures from a rendered world (`scripts/tiny/world.py`), for demos and tests.",
            "It is wrong often enough to leave something to steer, and of no other use.",
            "",
            f"- Parameters: {parameters(folder)}; fp16 safetensors.",
            f"- Training: {training(run, name)} of one CPU core, in three stretches: an older world"
            f" with AdamW; `python -m scripts.tiny.train_diffusion {name} --slips 0 --start` on it;"
            " and eight minutes with `--slips 0.5 --lr 7e-4 --start`, in which half of the letters"
            " are drawn at random. The weights are 0.25 of the second and 0.75 of the third"
            " (`scripts.tiny.export --mix`): the second spells without fault, which leaves nothing"
            " to steer.",
            f"- Sampled with {defaults}.",
            "- Licence: Apache-2.0. The letters are drawn with Pillow's own scalable font.",
            "",
            f"Accuracy, {each} prompts a cell, one picture each, seen and unseen by training"
            f" (`python -m scripts.tiny.evaluate --models {name} --each {each}`):",
            "",
            "| task | seen | unseen |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def clip_card(run: Path) -> str:
    """The model card of tiny-clip."""
    share = retrieval()
    print("tiny-clip top-1 over 64:", share, flush=True)
    return "\n".join(
        [
            "# tiny-clip",
            "",
            "An open_clip model of the rendered world (`scripts/tiny/world.py`), for demos, tests",
            "and claims measured on the embedded pipelines; it knows nothing else.",
            "",
            f"- Parameters: {parameters(ROOT / 'rewards' / 'tiny' / 'clip')}; fp16 safetensors.",
            f"- Training: {training(run, 'clip')} (`python -m scripts.tiny.train_clip`, CPU).",
            f"- Top-1 image-to-text retrieval among 64 held-out captions: {share}"
            " (`python -m scripts.tiny.evaluate --models clip`).",
            "- Licence: Apache-2.0.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, write README.md into the folders of the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--models", nargs="+", default=["tiny-sd3", "tiny-sd", "clip"])
    parser.add_argument("--each", type=int, default=100, help="prompts a cell")
    parser.add_argument("--cards", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    for name in args.models:
        text = clip_card(args.run) if name == "clip" else card(name, args.run, args.each)
        folder = ROOT / ("rewards" if name == "clip" else "steering") / "tiny" / name
        if args.cards:
            (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
