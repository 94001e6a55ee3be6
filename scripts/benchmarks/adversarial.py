"""A critic instead of a fixed reward: a style that is taken on, and a reward that is not hacked.

    python -m scripts.bench adversarial --case style
    python -m scripts.bench adversarial --case hacking
    python -m scripts.bench adversarial --table --grid docs

tiny-sd3, one process. Style: 200 references whose background is the dark blue one alone, one
picture of four in the base; the shapes that the prompt asks for should survive. Hacking: the reward
is a small JPEG file, which an empty picture has; the same run with a critic of 200 pictures of the
world beside it, and with a preference model (the embedded CLIP) that compares a picture of each
prompt. Unseen prompts, drawn by the stock sampler at 20 steps; 95 % bootstrap intervals over
prompts. The distance is Fréchet's between the embedded DINO's features of all pictures and of 200
other references, which no critic saw; a critic sees the same features, the share of borders in the
style is of pixels alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.images import to_images
from rewards.sets import frechet
from rewards.towers.dino_backbone import view
from tilt.statistics import alarm
from tilt.variants import pictures

from ..tiny.styles import STYLES, scenes
from ..tiny.world import BACKGROUNDS, TASKS, render, scene
from .tuning import ROOT, command, prepare, timed

THINGS = [task for task in TASKS if task != "text"]
SHAPES = "objects(mode=share)"
# of each case: the references' style, the reward that is looked at, and each run's settings
STYLE = {"with a critic": [f"--reward={SHAPES}"]}
PREFERENCE = ["--critic-kind=preference", "--paired", "--critic.lr=5e-6", "--critic-weight=2"]
HACKING = {
    "reward alone": ["--reward=jpeg", "--critic-weight=1"],  # there is no critic to weigh
    "with a critic": ["--reward=jpeg"],
    "with a preference critic": ["--reward=jpeg", "--grpo.each-reward", *PREFERENCE],
}
CASES = {"style": ("night", STYLE), "hacking": ("plain", HACKING)}
WATCHED = f"{SHAPES} + 0*clip(tiny) + 0*jpeg"
MEASURES = ("mean of 6 tasks", "objects", "clip", "jpeg")


def run(case: str, out: Path, images: int, changes: Sequence[str]) -> None:
    """Make references, train each run of a case and evaluate it."""
    (tune, *_), test = prepare("attributes", out)
    style, runs = CASES[case]
    references = out / style
    references.mkdir(exist_ok=True)
    for i, drawn in enumerate(scenes(style, 200, 0, THINGS)):
        render(drawn).save(references / f"{i:04d}.png")
    by_prompt = out / "by-prompt.json"
    by_prompt.write_text(json.dumps(drawn_for(tune.read_text().splitlines(), out / "by-prompt")))
    for name, words in runs.items():
        tuned = out / f"{case}-{name.replace(' ', '-')}"
        settings = [
            f"--config={ROOT / 'scripts/configs/adversarial_tiny.yaml'}",
            f"--prompts={tune}",
        ]
        settings += [f"--out={tuned}", "--resume", *words, *(f"--{change}" for change in changes)]
        if "critic" in name:
            pictures_of = by_prompt if "preference" in name else references
            settings += [f"--references={pictures_of}"]
        timed(out, tuned.name, command("train_adversarial.py", settings, 1))
        judged = ["--model=tiny-sd3", "--call.guidance-scale=1.0", f"--prompts={test}", "--resume"]
        judged += [f"--out={tuned / 'eval'}", f"--lora={tuned / 'lora'}", f"--images={images}"]
        line = command("evaluate.py", [*judged, f"--reward={WATCHED}"], 1)
        timed(out, f"{tuned.name}-eval", line)


def drawn_for(prompts: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """A picture of each prompt, as the world draws it, by prompt."""
    rng, left, found = np.random.default_rng(0), set(prompts), {}
    folder.mkdir(exist_ok=True)
    while left:
        drawn = scene(rng, str(rng.choice(THINGS)))
        if drawn.prompt not in left:
            continue
        left.remove(drawn.prompt)
        file = folder / f"{prompts.index(drawn.prompt):04d}.png"
        render(drawn).save(file)
        found[drawn.prompt] = [str(file)]
    return found


def drawn_by(folder: Path) -> Tensor:
    """All pictures of a variant, (n, 3, h, w)."""
    prompts = 1 + max(int(file.name[:4]) for file in folder.glob("*.png"))
    count = len(list(folder.glob("0000-*.png")))
    return to_images([image for i in range(prompts) for image in pictures(folder, i, count)])


def in_style(images: Tensor, style: str) -> float:
    """The share of pictures whose border is nearer to the style's background than to any other."""
    edge = torch.cat(
        [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2
    )
    grounds = torch.tensor([STYLES[style], *(b for b in BACKGROUNDS if b != STYLES[style])]) / 255
    found = torch.cdist(edge.median(2).values, grounds.float()).argmin(1)
    return float((found == 0).double().mean())


def markdown(out: Path) -> str:
    """A line a run and its base, and what the alarm says."""
    dino = view("tiny", None)
    lines = ["| case | pictures of | distance | in style | " + " | ".join(MEASURES) + " | alarm |"]
    lines.append("|" + "---|" * (5 + len(MEASURES)))
    for case, (style, runs) in CASES.items():
        others = to_images([render(drawn) for drawn in scenes(style, 200, 1, THINGS)])
        target = dino.tokens(others, 64).cls
        shown: list[tuple[str, Path, str]] = []
        for name in runs:
            folder = out / f"{case}-{name.replace(' ', '-')}" / "eval"
            if (folder / "evaluation.json").exists():
                shown += [] if shown else [("base", folder, "base")]
                shown.append((name, folder, "tuned"))
        for name, folder, variant in shown:
            images = drawn_by(folder / variant)
            cells = [case, name, f"{float(frechet(dino.tokens(images, 64).cls, target)):.3f}"]
            cells.append(f"{in_style(images, style):.2f}" if style in STYLES else "")
            cells += [_cell(_measures(folder)[m], variant) for m in MEASURES]
            cells.append("" if variant == "base" else _alarm(folder, case))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measures(folder: Path) -> dict[str, dict]:
    sections = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["sections"]
    return {m["name"]: m["variants"] for section in sections.values() for m in section}


def _cell(variants: dict, name: str) -> str:
    value, gain = variants[name]["mean"]["mean"], variants[name].get("difference")
    if name == "base" or not gain:
        return f"{value:.3f}"
    return f"{value:.3f} ({gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])"


def _alarm(folder: Path, case: str) -> str:
    """Whether the trained reward rose while shapes or CLIP fell, each for certain."""
    found = _measures(folder)
    gains = {
        name: torch.tensor(np.subtract(v["tuned"]["values"], v["base"]["values"]))
        for name, v in found.items()
        if name in ("objects", "clip", "jpeg")
    }
    trained = gains["jpeg" if case == "hacking" else "objects"]
    generator = torch.Generator().manual_seed(0)
    raised = [
        name
        for name in ("objects", "clip")
        if not torch.equal(gains[name], trained) and alarm(trained, gains[name], generator).raised
    ]
    return ", ".join(raised) or "silent"


def grid(out: Path, case: str, file: Path, prompts: Sequence[int] = range(0, 60, 5)) -> None:
    """A column a prompt: the base's picture, then each run's, at the same noise."""
    rows: list[list[Image.Image]] = []
    for name in CASES[case][1]:
        folder = out / f"{case}-{name.replace(' ', '-')}" / "eval"
        for variant in ("tuned",) if rows else ("base", "tuned"):
            rows.append([pictures(folder / variant, i, 1)[0] for i in prompts])
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(prompts), side * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * side, y * side))
    sheet.save(file)


def main(argv: list[str] | None = None) -> None:
    """Run a case, or print what there is."""
    parser = argparse.ArgumentParser(
        prog="adversarial",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=sorted(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/adversarial"))
    parser.add_argument("--images", type=int, default=8, help="pictures of a prompt in tests")
    parser.add_argument(
        "--changes", nargs="*", default=[], help="name=value of the command's options"
    )
    parser.add_argument("--table", action="store_true", help="print what there is")
    parser.add_argument("--grid", type=Path, help="a folder for style.png and hacking.png")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if args.case:
        run(args.case, args.out, args.images, args.changes)
    if args.table:
        print(markdown(args.out))
    for case in CASES if args.grid else ():
        grid(args.out, case, args.grid / f"{case}.png")
