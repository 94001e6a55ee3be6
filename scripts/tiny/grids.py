"""Draw grid.png of the embedded models' cards: what each makes, finds or rates, good and bad.

    python -m scripts.tiny.grids
    python -m scripts.tiny.grids --models tiny-sd3 --columns 4 --out /tmp/grids

Nothing is picked: the first prompt of each kind, seeds from 0 on. One machine draws the same bytes
each time; another may round a few pixels differently.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.images import to_images
from rewards.models.aesthetic import AestheticReward
from rewards.models.clip import ClipReward
from rewards.models.dino import DinoReward
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import OcrReward
from tilt.report.grid import Cell, Row, grid

from ..parser import parser_of
from . import train_aesthetic
from .cards import FOLDERS
from .evaluate import HELD_OUT, generate, prompts_of
from .world import TASKS, Scene, render, scene

SIDE = 128  # of a cell, px: the models' pixels at twice their size
SIZE = 26  # type that a telephone's screen leaves legible
COLOURS = 192
POOL = 30  # held-out pictures a task, among which neighbours are looked for


def sheet(rows: Sequence[Row], heads: Sequence[str]) -> Image.Image:
    """The rows from top to bottom, `heads` over the columns."""
    return grid([heads], rows, SIDE, size=SIZE, labels_above=True)


def row_of(label: str, images: Sequence[Image.Image], captions: Sequence[str] | None = None) -> Row:
    """A row of a grid: a label above, pictures, and a caption below each (by default none)."""
    captions = captions or [""] * len(images)
    return Row(label, [[Cell(*pair) for pair in zip(images, captions, strict=True)]])


def pipeline_grid(name: str, columns: int) -> Image.Image:
    """A row a prompt, the first of each task, seen and unseen; column i is seed i."""
    kinds = [(task, False) for task in TASKS] + [(task, True) for task in HELD_OUT]
    prompts = [prompts_of(*kind, 1)[0] for kind in kinds]
    by_seed = [generate(name, prompts, seed) for seed in range(columns)]
    reader, detector = OcrReward("exact"), ObjectsReward()
    rows = []
    for i, (task, unseen) in enumerate(kinds):
        images = [pictures[i] for pictures in by_seed]
        judge = reader if task == "text" else detector
        right = int((judge(to_images(images), [prompts[i]] * columns) > 0.999).sum())
        place = ", never seen in training" if unseen else ""
        rows.append(row_of(f"{prompts[i]}{place}: {right} of {columns} right", images))
    return sheet(rows, [f"seed {seed}" for seed in range(columns)])


def held_out(seed: int, each: int) -> list[Scene]:
    """`each` scenes of every task, of the kinds that training never saw where there are any."""
    rng = np.random.default_rng([seed, 29])
    return [scene(rng, task, task in HELD_OUT) for task in TASKS for _ in range(each)]


def nearest(queries: Tensor, pool: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each unit vector of queries (n, d) the `count` nearest in pool (m, d), with cosines."""
    close = (queries @ pool.T).topk(count, dim=1)
    pairs = zip(close.indices.tolist(), close.values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


@torch.no_grad()
def clip_grid(columns: int) -> Image.Image:
    """A row a caption, one of each task: the pictures that tiny-clip finds nearest to it."""
    pool = [render(drawn) for drawn in held_out(1, POOL)]
    captions = [drawn.prompt for drawn in held_out(1, POOL)[::POOL]]
    towers = ClipReward("tiny").towers
    found = nearest(towers.text_features(captions), towers.image_features(to_images(pool)), columns)
    rows = [
        row_of(caption, [pool[i] for i, _ in row], [f"{cosine:.2f}" for _, cosine in row])
        for caption, row in zip(captions, found, strict=True)
    ]
    return sheet(rows, ["nearest", *map(str, range(2, columns + 1))])


@torch.no_grad()
def dino_grid(columns: int) -> Image.Image:
    """A row a picture, one of each task, and beside it what tiny-dino finds nearest to it."""
    pool = [render(drawn) for drawn in held_out(1, POOL)]
    queries = held_out(2, 1)
    pictures = [render(drawn) for drawn in queries]
    look = DinoReward("tiny").image_features
    found = nearest(look(to_images(pictures)), look(to_images(pool)), columns - 1)
    rows = [
        row_of(
            drawn.prompt,
            [picture, *(pool[i] for i, _ in row)],
            ["", *(f"{cosine:.2f}" for _, cosine in row)],
        )
        for drawn, picture, row in zip(queries, pictures, found, strict=True)
    ]
    return sheet(rows, ["query", "nearest", *map(str, range(2, columns))])


@torch.no_grad()
def aesthetic_grid(columns: int) -> Image.Image:
    """One scene spoiled in each way, a column an amount from 0 to 1, its rating underneath."""
    drawn = train_aesthetic.scenes_of(1, seed=100, unseen=True) * columns
    amounts, rate = np.linspace(0, 1, columns), AestheticReward("tiny")
    rows = []
    for kind in train_aesthetic.KINDS:
        spoiled = train_aesthetic.spoiled(kind, drawn, amounts, seed=100)
        pixels = (255 * spoiled).round().byte().permute(0, 2, 3, 1).numpy()
        ratings = [f"{rating:.1f}" for rating in rate(spoiled, [""] * columns).tolist()]
        rows.append(row_of(kind, [Image.fromarray(picture) for picture in pixels], ratings))
    return sheet(rows, [f"s = {amount:.1f}" for amount in amounts])


GRIDS: dict[str, tuple[Callable[[int], Image.Image], int]] = {  # and their columns
    "tiny-sd3": (partial(pipeline_grid, "tiny-sd3"), 8),
    "tiny-sd": (partial(pipeline_grid, "tiny-sd"), 8),
    "clip": (clip_grid, 6),
    "dino": (dino_grid, 7),
    "aesthetic": (aesthetic_grid, 6),
}


def main(argv: list[str] | None = None) -> None:
    """Draw the grids, and save them beside the cards."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--columns", type=int, help="cells across (default: the card's)")
    parser.add_argument("--out", type=Path, help="save OUT/MODEL.png, not beside the card")
    args = parser.parse_args(argv)
    if args.columns is not None and args.columns < 2:
        parser.error(f"--columns is {args.columns}; a grid has at least 2")
    for name in args.models:
        draw, columns = GRIDS[name]
        file = FOLDERS[name] / "grid.png" if args.out is None else args.out / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        page = draw(args.columns or columns)
        # fewer colours need half the bytes, and the difference is hardly visible
        page.quantize(COLOURS, kmeans=1, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
