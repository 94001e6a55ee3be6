"""What the filter's settings do to one population, as a picture: a row a setting, the same seeds.

    python -m scripts.bench explain --out docs/explain.png

The frame's colour says which of the starting particles a picture descends from; under it stand its
reward and its share of the weight. The same numbers are printed as a table. One prompt and one
seed: it shows what the settings do, not how much they gain (that is `lift`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import rewards
from steering import FeynmanKac, Steered, steer, tiny
from steering.weights import normalize

PARTICLES = 6
STEPS = 20
SETTINGS = {
    "λ = 0\nthe model alone": FeynmanKac(reward_scale=0),
    "min_ess = 0\nbest of k": FeynmanKac(min_ess=0),
    "λ = 10\nno tempering": FeynmanKac(reward_scale=10, tempering="none"),
    "λ = 100\nno tempering": FeynmanKac(tempering="none"),
    "λ = 100, adaptive\nthe defaults": FeynmanKac(),
    "the defaults,\nbut min_ess = 0.5": FeynmanKac(min_ess=0.5),
    "the defaults,\na funnel to 2": FeynmanKac(funnel=(6, 6, 5, 5, 4, 4, 3, 2)),
}


@dataclass(frozen=True)
class Shown:
    """One setting's population: k_final pictures, and of each what stands under it."""

    name: str
    images: Sequence[Image.Image]
    rewards: Sequence[float]
    weights: Sequence[float]  # they sum to 1
    origins: Sequence[int]  # the starting particle, 0 to k - 1
    replaced: int  # scores that replaced or dropped a particle
    scores: int  # on the way
    least_ess: float  # before resampling, over the scores; k where there are none
    log_z: float


def row_of(name: str, out: Steered) -> Shown:
    """What there is to show of the only prompt of a run."""
    scores = out.lineage.scores
    return Shown(
        name=name,
        images=out.images[0],
        rewards=out.rewards[0].tolist(),
        weights=normalize(out.log_weights)[0].tolist(),
        origins=out.lineage.origins(PARTICLES).expand(1, -1)[0].tolist(),
        replaced=sum(bool(score.replaced[0]) for score in scores),
        scores=len(scores),
        least_ess=min((score.ess[0].item() for score in scores), default=float(PARTICLES)),
        log_z=out.log_z[0].item(),
    )


def measure(model: str, prompt: str, reward: str, guidance: float, seed: int) -> list[Shown]:
    """Every setting's run of one prompt, from the same noise."""
    pipe, scorer = tiny.load(model), rewards.load(reward, imports=True)
    call = tiny.call_defaults(model) | {"num_inference_steps": STEPS, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    call |= {"preview": tiny.preview(), "progress": False, "seed": seed}
    return [
        row_of(name, steer(pipe, prompt, scorer, PARTICLES, settings, **call))
        for name, settings in SETTINGS.items()
    ]


def figure(rows: Sequence[Shown]) -> Figure:
    """A row a setting, its pictures from the left."""
    page = Figure(figsize=(9.6, 1.42 * len(rows)), dpi=100, facecolor="white")
    grid = page.subplots(len(rows), PARTICLES, squeeze=False)
    page.subplots_adjust(0.17, 0.03, 0.99, 0.99, wspace=0.08, hspace=0.3)
    for row, axes in zip(rows, grid, strict=True):
        for ax in axes:
            ax.set_axis_off()
        box = axes[0].get_position()
        page.text(0.01, (box.y0 + box.y1) / 2, row.name, fontsize=9, va="center")
        shown = zip(axes, row.images, row.rewards, row.weights, row.origins, strict=False)
        for ax, image, reward, weight, origin in shown:
            ax.set_axis_on()
            ax.imshow(image, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color=f"C{origin}", linewidth=3)
            ax.set_xlabel(f"{reward:.3g}, weight {weight:.0%}", fontsize=8, labelpad=3)
    return page


def table(rows: Sequence[Shown]) -> str:
    """The numbers of the picture, as Markdown."""
    heads = (
        "",
        "scores that replaced any",
        "least ESS",
        "ancestors left",
        "weighted reward",
        "log Ẑ",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        mean = sum(r * w for r, w in zip(row.rewards, row.weights, strict=True))
        cells = (
            row.name.replace("\n", " "),
            f"{row.replaced} of {row.scores}" if row.scores else "none was taken",
            f"{row.least_ess:.1f} of {PARTICLES}" if row.scores else "",
            str(len(set(row.origins))),
            f"{mean:.3f}",
            f"{row.log_z:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run every setting, print the table, keep the picture."""
    parser = argparse.ArgumentParser(
        prog="explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--prompt", default='the word "CRAB"')
    parser.add_argument("--reward", default="ocr", help="a spec (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("explain.png"))
    args = parser.parse_args(argv)
    rows = measure(args.model, args.prompt, args.reward, args.guidance_scale, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure(rows).savefig(args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
