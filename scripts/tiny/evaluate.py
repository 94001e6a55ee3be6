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

from rewards.aesthetic import AestheticReward
from rewards.clip import ClipReward
from rewards.images import to_images
from rewards.objects import ObjectsReward
from rewards.ocr import OcrReward
from steering import generators, tiny

from . import train_aesthetic, train_dino
from .world import TASKS, render, scene

ROOT = Path(__file__).parents[2]
MODELS = ["tiny-sd3", "tiny-sd", "clip", "dino", "aesthetic"]


def prompts_of(task: str, unseen: bool, count: int) -> list[str]:
    """`count` prompts of a task, the same at every call."""
    rng = np.random.default_rng([TASKS.index(task), int(unseen), 7])
    return [scene(rng, task, unseen).prompt for _ in range(count)]


def generate(
    name: str, prompts: list[str], seed: int = 0, batch: int = 32, **keywords: int
) -> list[Image.Image]:
    """One picture a prompt from the embedded pipeline with its stock scheduler.

    keywords: of its call, in place of the defaults.
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
    minutes = round(report["minutes"])
    unit = "minute" if minutes == 1 else "minutes"
    return f"{report['images'] / 1e3:.0f} k images seen in {minutes} {unit}"


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


def dino_card(run: Path) -> str:
    """The model card of tiny-dino."""
    folder = ROOT / "rewards" / "tiny" / "dino"
    neighbours = "\n".join(train_dino.neighbour_table(folder))
    ranks = "\n".join(train_dino.ranking_table(folder))
    print(neighbours, ranks, sep="\n\n", flush=True)
    return f"""# tiny-dino

A transformers `Dinov2Model` of the rendered world (`scripts/tiny/world.py`), for demos, tests
and claims measured on the embedded pipelines; it knows nothing else. It has DINO's architecture,
student and teacher, but not its loss, which learned less in six minutes than this one in five:
class tokens are contrasted with a queue (MoCo), and the pixels of hidden patches are guessed
(SimMIM). It saw pictures only, no captions and no labels.

- Parameters: {parameters(folder)}; fp16 safetensors.
- Input: 64x64 pixels in patches of 8; ImageNet's mean and standard deviation.
- Training: {training(run, "dino")} (`python -m scripts.tiny.train_dino`,
  one thread of a CPU).
- Licence: Apache-2.0.

Measured on the cosine of class tokens (`python -m scripts.tiny.evaluate --models dino`), beside a
network that learned nothing and the pixels themselves. Pixels do well, because in this world
things lie on a grid and hardly move from one drawing to the next.

The vote of the 10 nearest of 4000 scenes, on 1000 others:

{neighbours}

How often a scene that is drawn again (other sizes and places) is nearer to its first drawing than
the scene with one attribute changed, drawn again as well; 1000 scenes, of the kinds that training
never saw where there are any:

{ranks}
"""


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
    table = "\n".join(train_aesthetic.tables(lambda x: reward(x, [""] * len(x))))
    steps = steps_agreement()
    print(table, steps, sep="\n\n", flush=True)
    return f"""# tiny-aesthetic

A linear head on tiny-clip's picture embedding (keys `weight` and `bias`, as LAION's version 1),
for demos and tests. What it rates is damage, not beauty: 10 is a clean drawing of the world of
`scripts/tiny/world.py`, and blur, noise, JPEG, lost contrast, broken shapes or noise in the
latents of tiny-sd3's autoencoder bring that down to 1. It does not look at the prompt and knows
nothing of other pictures. tiny-clip was trained to see through blur and noise, so ratings are
rough, and scenes differ in theirs: compare pictures of one prompt.

- Parameters: {reward.towers.width + 1}; fp16 safetensors.
- Training: ridge regression in closed form, {training(run, "aesthetic")}
  (`python -m scripts.tiny.train_aesthetic`, CPU).
- Rates tiny-sd3's picture of 20 steps above that of 4 steps, same prompt and seed: {steps}.
- Licence: Apache-2.0.

{table}

Measured by `python -m scripts.tiny.evaluate --models aesthetic`.
"""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, write README.md into the folders of the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--each", type=int, default=100, help="prompts a cell")
    parser.add_argument("--cards", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    for name in args.models:
        make = {"clip": clip_card, "dino": dino_card, "aesthetic": aesthetic_card}.get(name)
        text = card(name, args.run, args.each) if make is None else make(args.run)
        folder = ROOT / ("steering" if make is None else "rewards") / "tiny" / name
        if args.cards:
            (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
