"""Reference pictures of a style: scenes of the world with another background.

    python -m scripts.tiny.styles paper --out references

`paper` has a cream background, which no picture of the world has, `night` only the dark blue one,
and `plain` all of the world's. The scenes are of the kinds that the embedded models were trained
on; they are written without prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..parser import parser_of
from .world import COLOURS, TASKS, Scene, render, scene

STYLES = {"paper": (250, 235, 205), "night": (28, 32, 48)}
INK = {"paper": "black", "night": "white"}


def styled(plain: Scene, style: str) -> Scene:
    """The scene in a style; letters without a colour of their own take one that is visible."""
    if style == "plain":
        return plain
    ink = plain.ink if plain.ink in COLOURS else INK[style]
    return replace(plain, background=STYLES[style], ink=ink)


def scenes(style: str, count: int, seed: int, tasks: Sequence[str] = TASKS) -> list[Scene]:
    """`count` scenes of a style, of each task in turn."""
    rng = np.random.default_rng(seed)
    return [styled(scene(rng, tasks[i % len(tasks)]), style) for i in range(count)]


def main(argv: list[str] | None = None) -> None:
    """Write the pictures as 0000.png and so on."""
    parser = parser_of(__doc__)
    parser.add_argument("style", choices=["plain", *STYLES])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, drawn in enumerate(scenes(args.style, args.count, args.seed, args.tasks)):
        render(drawn).save(args.out / f"{i:04d}.png")
    print(f"{args.count} pictures in {args.out}")


if __name__ == "__main__":
    main()
