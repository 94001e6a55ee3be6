"""A critic instead of a fixed reward: a style that is learned, and a reward that is not hacked.

    python -m scripts.bench adversarial --case style
    python -m scripts.bench adversarial --table --grid docs

docs/adversarial.md describes the measurement. Style: the references have the dark blue background.
Hacking: the reward is the size of a JPEG file, which is best for an empty picture; it is trained on
alone, with a critic, and with a preference model (the embedded CLIP) that compares a picture of
each prompt. The distance is the Fréchet distance between the embedded DINO's features of all
pictures and of 200 references that no critic saw. The share in the style is computed from pixels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.images import to_images
from rewards.sets import frechet
from rewards.towers.dino_backbone import view
from tilt.statistics import alarm
from tilt.variants import pictures

from ..parser import parser_of
from ..tables import table
from ..tiny.styles import STYLES, scenes
from ..tiny.world import BACKGROUNDS, TASKS, render, scene
from .tuning import ROOT, prepare, signed, timed, variants

THINGS = [task for task in TASKS if task != "text"]
SHAPES = "objects(mode=share)"
# for each case: the style of the references, and the options of each run
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


def run(case: str, out: Path, images: int) -> None:
    """Make references, train each run of a case and evaluate it."""
    (tune, *_), test = prepare("attributes", out)
    style, runs = CASES[case]
    references, by_prompt = out / style, out / "by-prompt.json"
    references.mkdir(exist_ok=True)
    for i, drawn in enumerate(scenes(style, 200, 0, THINGS)):
        render(drawn).save(references / f"{i:04d}.png")
    by_prompt.write_text(json.dumps(drawn_for(tune.read_text().splitlines(), out / "by-prompt")))
    for name, words in runs.items():
        tuned, config = folder_of(out, case, name), ROOT / "scripts/configs/adversarial_tiny.yaml"
        settings = [f"--config={config}", f"--prompts={tune}", f"--out={tuned}", "--resume", *words]
        if "critic" in name:
            pictures_of = by_prompt if "preference" in name else references
            settings += [f"--references={pictures_of}"]
        timed(out, tuned.name, "train_adversarial.py", settings)
        judged = ["--model=tiny-sd3", "--call.guidance-scale=1.0", f"--prompts={test}", "--resume"]
        judged += [f"--out={tuned / 'eval'}", f"--lora={tuned / 'lora'}", f"--images={images}"]
        timed(out, f"{tuned.name}-eval", "evaluate.py", [*judged, f"--reward={WATCHED}"])


def folder_of(out: Path, case: str, name: str) -> Path:
    """The folder of a run of a case."""
    return out / f"{case}-{name.replace(' ', '-')}"


def drawn_for(prompts: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """{prompt: [file]}: each prompt with a picture that the world draws of it."""
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
    pictures = []
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    return to_images(pictures)


def in_style(images: Tensor, style: str) -> float:
    """The share of pictures whose border is nearer to the style's background than to any other."""
    edge = torch.cat(
        [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2
    )
    grounds = torch.tensor([STYLES[style], *(b for b in BACKGROUNDS if b != STYLES[style])]) / 255
    found = torch.cdist(edge.median(2).values, grounds.float()).argmin(1)
    return float((found == 0).double().mean())


def markdown(out: Path) -> str:
    """A table with a row for each run and for its base, and the result of the alarm."""
    dino, rows = view("tiny", None), []
    for case, (style, runs) in CASES.items():
        others = to_images([render(drawn) for drawn in scenes(style, 200, 1, THINGS)])
        target = dino.tokens(others, 64).cls
        shown: list[tuple[str, Path, str]] = []
        for name in runs:
            folder = folder_of(out, case, name) / "eval"
            if (folder / "evaluation.json").exists():
                shown += [] if shown else [("base", folder, "base")]
                shown.append((name, folder, "tuned"))
        for name, folder, variant in shown:
            images, found = drawn_by(folder / variant), variants(folder)
            distance = float(frechet(dino.tokens(images, 64).cls, target))
            part = f"{in_style(images, style):.2f}" if style in STYLES else ""
            cells = [_cell(found[measure]["variants"][variant]) for measure in MEASURES]
            warned = "" if variant == "base" else _alarm(found, case)
            rows.append([case, name, f"{distance:.3f}", part, *cells, warned])
    return table(["case", "pictures of", "distance", "in style", *MEASURES, "alarm"], rows)


def _cell(found: dict[str, Any]) -> str:
    """The mean and, except for the base itself, the gain over the base."""
    mean, gain = f"{found['mean']['mean']:.3f}", found.get("difference")
    return f"{mean} ({signed(gain)})" if gain else mean


def _alarm(found: dict[str, dict[str, Any]], case: str) -> str:
    """Which of shapes and CLIP fell significantly while the trained reward rose significantly."""
    gains = {}
    for name in ("objects", "clip", "jpeg"):
        base, tuned = (found[name]["variants"][v]["values"] for v in ("base", "tuned"))
        gains[name] = torch.tensor(np.subtract(tuned, base))
    trained = gains["jpeg" if case == "hacking" else "objects"]
    generator = torch.Generator().manual_seed(0)
    raised = [
        name
        for name in ("objects", "clip")
        if not torch.equal(gains[name], trained) and alarm(trained, gains[name], generator).raised
    ]
    return ", ".join(raised) or "silent"


def grid(out: Path, case: str, file: Path, prompts: Sequence[int] = range(0, 60, 5)) -> None:
    """A column for each prompt: the base's picture, then each run's, from the same noise."""
    rows: list[list[Image.Image]] = []
    for name in CASES[case][1]:
        folder = folder_of(out, case, name) / "eval"
        for variant in ("tuned",) if rows else ("base", "tuned"):
            rows.append([pictures(folder / variant, i, 1)[0] for i in prompts])
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(prompts), side * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * side, y * side))
    sheet.save(file)


def main(argv: list[str] | None = None) -> None:
    """Run a case, or print the existing results."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--case", choices=sorted(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/adversarial"))
    parser.add_argument("--images", type=int, default=8, help="pictures of a prompt in tests")
    parser.add_argument("--table", action="store_true", help="print the existing results")
    parser.add_argument("--grid", type=Path, help="a folder for style.png and hacking.png")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.case:
        run(args.case, out, args.images)
    if args.table:
        print(markdown(out))
    for case in CASES if args.grid else ():
        grid(out, case, args.grid / f"{case}.png")
