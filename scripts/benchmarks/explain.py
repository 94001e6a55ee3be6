"""What the filter's settings do to one population, as a picture and as a table.

    python -m scripts.bench explain --out docs/explain.png

docs/steering.md explains the picture, which has a row for each setting.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import rewards
from steering import FeynmanKac, Steered, steer, tiny
from steering.weights import normalize

from .. import tables
from ..parser import parser_of

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


def origins(out: Steered) -> list[int]:
    """The starting particle, 0 to k - 1, that each final picture descends from."""
    return out.lineage.origins(PARTICLES).expand(1, -1)[0].tolist()


def figure(runs: dict[str, Steered]) -> Figure:
    """A row for each setting, its pictures from the left."""
    page = Figure(figsize=(9.6, 1.42 * len(runs)), dpi=100, facecolor="white")
    grid = page.subplots(len(runs), PARTICLES, squeeze=False)
    page.subplots_adjust(0.17, 0.03, 0.99, 0.99, wspace=0.08, hspace=0.3)
    for (name, out), axes in zip(runs.items(), grid, strict=True):
        for ax in axes:
            ax.set_axis_off()
        box = axes[0].get_position()
        page.text(0.01, (box.y0 + box.y1) / 2, name, fontsize=9, va="center")
        weights = normalize(out.log_weights)[0].tolist()
        numbers = (out.rewards[0].tolist(), weights, origins(out))
        for ax, image, reward, weight, origin in zip(axes, out.images[0], *numbers, strict=False):
            ax.set_axis_on()
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(color=f"C{origin}", linewidth=3)
            ax.set_xlabel(f"{reward:.3g}, weight {weight:.0%}", fontsize=8, labelpad=3)
    return page


def row(name: str, out: Steered) -> list[str]:
    """The numbers of a run of one prompt."""
    scores = out.lineage.scores
    replaced, ess = "none was taken", ""
    if scores:
        replaced = f"{sum(bool(score.replaced[0]) for score in scores)} of {len(scores)}"
        ess = f"{min(score.ess[0].item() for score in scores):.1f} of {PARTICLES}"
    weights, gained = normalize(out.log_weights)[0].tolist(), out.rewards[0].tolist()
    mean = sum(reward * weight for reward, weight in zip(gained, weights, strict=True))
    ancestors = str(len(set(origins(out))))
    title = name.replace("\n", " ")
    return [title, replaced, ess, ancestors, f"{mean:.3f}", f"{out.log_z[0].item():.2f}"]


def main(argv: list[str] | None = None) -> None:
    """Run every setting from the same noise, save the picture, print the table."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--prompt", default='the word "CRAB"')
    parser.add_argument("--reward", default="ocr", help="a spec (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("explain.png"))
    args = parser.parse_args(argv)
    pipe, reward = tiny.load(args.model), rewards.load(args.reward, imports=True)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = tiny.call_defaults(args.model) | {"preview": tiny.preview()}
    call |= {"num_inference_steps": STEPS, "guidance_scale": 1.0, "progress": False}
    runs = {
        name: steer(pipe, args.prompt, reward, PARTICLES, settings, **call)
        for name, settings in SETTINGS.items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure(runs).savefig(args.out)
    heads = ["", "scores that replaced any", "least ESS", "ancestors left", "weighted reward"]
    print(tables.table([*heads, "log Ẑ"], [row(*run) for run in runs.items()]))
