"""Variants of a model: the images that each generates from the same prompts and noise, on disk.

A variant is a folder of images; `0003-01.png` is the second image of prompt 3. A video is a folder,
`0003-01`, with the PNG frames in `video` and an animation, `video.webp`. Image j of a prompt
starts from the same noise in every plain variant, and as particle 0 in every steered one.
Legend: m images per prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from finetune.files import atomic, write
from finetune.folder import ELSEWHERE, begun, refuse_changes
from finetune.ranges import KEYWORDS, PROMPTS, REFERENCES, SEED, Range, check, optional, whole
from finetune.rollouts import PLAIN, nothing
from steering import FeynmanKac
from steering.call import check_frames
from steering.frames import Frames
from steering.outputs import save
from steering.pipeline import steer_each
from tilt.framing import frames_in
from tilt.report.grid import Cell, Row, cell_side, fitted
from tilt.report.grid import grid as painted

__all__ = [
    "EvaluationPlan",
    "Variant",
    "draw",
    "grid",
    "is_finished",
    "open_folder",
    "pending",
    "picture",
    "pictures",
    "start",
]

ROWS, EACH = 16, 3  # numbers of prompts, and of images per variant, in the grid


@dataclass(frozen=True)
class EvaluationPlan:
    """The request to every variant: `images` images per prompt, and the pipeline call's keywords.

    references: the files of each prompt's reference images, () without any.
    """

    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    images: int
    seed: int
    max_batch: int | None = None
    call: dict[str, Any] = field(default_factory=dict)

    RANGES: ClassVar[dict[str, Range]] = {
        "prompts": PROMPTS,
        "references": REFERENCES,
        "images": whole(1, 10_000),
        "seed": SEED,
        "max_batch": optional(whole(1)),
        "call": KEYWORDS,
    }

    def __post_init__(self) -> None:
        check(self, self.RANGES)
        if len(self.references) != len(self.prompts):
            raise ValueError(
                f"references has {len(self.references)} entries for {len(self.prompts)} prompts; "
                "give one for each"
            )


@dataclass(frozen=True)
class Variant:
    """A way to generate images: with or without the LoRA, plain or steered.

    reward: the reward that steers, or None. A steered image is the one with the highest reward of
    its own run of `particles` particles, so it costs as much as that many plain ones.
    """

    name: str
    adapted: bool = False
    reward: Any = None
    particles: int = 1
    settings: FeynmanKac = PLAIN


def start(
    pipe: Any,
    variant: Variant,
    plan: EvaluationPlan,
    which: Sequence[int],
    preview: Any = None,
    frames: Frames = Frames(),  # noqa: B008 (frozen)
) -> Iterator[list[Any]]:
    """Return an iterator that generates the m images or videos of each of the prompts `which`.

    frames: how the variant's reward scores videos. Raises ValueError for invalid arguments at once,
    before iteration.
    """
    check_frames(frames, type(pipe), plan.call)
    m, references = plan.images, None
    if getattr(variant.reward, "wants_references", False) and any(plan.references):
        opened = [[Image.open(name).convert("RGB") for name in names] for names in plan.references]
        references = [found for found in opened for _ in range(m)]
    steered = steer_each(
        pipe,
        [prompt for prompt in plan.prompts for _ in range(m)],
        variant.reward or nothing,
        variant.particles,
        variant.settings,
        seed=plan.seed,
        preview=preview if variant.reward else None,
        max_batch=plan.max_batch,
        prompts_per_call=m,
        progress=False,
        references=references,
        only=[i * m + j for i in which for j in range(m)],
        **({"score_frames": frames.which, "video_score": frames.score} if variant.reward else {}),
        **plan.call,
    )
    return (out.best for out in steered)


def picture(folder: Path, prompt: int, number: int) -> Path:
    """Return the file of one image of a variant, or the folder of its video."""
    file = folder / f"{prompt:04d}-{number:02d}.png"
    return file if file.exists() else file.with_suffix("")


def pictures(folder: Path, prompt: int, count: int) -> list[Image.Image]:
    """Open the first `count` images of a prompt, RGB; ValueError names a damaged one.

    Of videos, these are the middle frames.
    """
    found = []
    for number in range(count):
        file = picture(folder, prompt, number)
        frames = frames_in(file) or [file]
        try:
            with Image.open(frames[(len(frames) - 1) // 2]) as image:
                found.append(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it and resume") from None
    return found


def pending(folder: Path, plan: EvaluationPlan) -> list[int]:
    """Return the indices of the prompts with missing images."""
    every = range(len(plan.prompts)), range(plan.images)
    return [i for i in every[0] if not all(picture(folder, i, j).exists() for j in every[1])]


def draw(
    folder: Path, plan: EvaluationPlan, which: Sequence[int], made: Iterator[list[Any]]
) -> Iterator[int]:
    """Write what `start` made of the prompts `which`; yields each index when it is written.

    Images are written atomically, with their prompts in the metadata as those of `tilt steer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, images in zip(which, made, strict=True):
        for j, image in enumerate(images):
            about = {"prompt": plan.prompts[i], "seed": plan.seed, "occurrence": j}
            _keep(folder / f"{i:04d}-{j:02d}", image, json.dumps(about, ensure_ascii=False))
        yield i


def _keep(place: Path, output: Image.Image | list[Image.Image], about: str) -> None:
    if isinstance(output, list):
        with atomic(place) as scratch:
            scratch.mkdir()
            save(scratch, "video", output, about)
        return
    text = PngInfo()
    text.add_itxt("parameters", about)
    with atomic(place.with_suffix(".png")) as scratch:
        output.save(scratch, "PNG", pnginfo=text)


def open_folder(out: Path, about: dict[str, Any], scorers: dict[str, str], resume: bool) -> None:
    """Create the folder, or check that it is of this request; deletes scores of other rewards."""
    file, about = out / "manifest.json", json.loads(json.dumps(about))
    was = _manifest_of(file)
    if begun(out, file.name, kind="evaluation", resume=resume):
        scored_by, old = was["scorers"], {"quantize": "none"} | was["pictures"]
        for name in ("dtype", "lora"):  # older evaluations lack them
            old.setdefault(name, about.get(name))
        refuse_changes(out, {name: old.get(name) for name in about}, about)
        if scored_by != scorers:
            for table in out.glob("*/*.csv*"):
                table.unlink()
    write(file, json.dumps({"pictures": about, "scorers": scorers}, indent=1, ensure_ascii=False))


def _manifest_of(file: Path) -> dict[str, Any]:
    """Return the manifest of an evaluation, {} without one; ValueError for that of another run."""
    try:
        was = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if was and not (isinstance(was["pictures"], dict) and isinstance(was["scorers"], dict)):
            raise TypeError
        return was
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged, or is not of an evaluation; {ELSEWHERE}") from None


def is_finished(
    out: Path, plan: EvaluationPlan, settings: dict[str, Any], lora: str | None
) -> bool:
    """Return whether `out` contains this evaluation, complete, without loading any model.

    settings: the request, as in evaluation.json; lora: a digest of the LoRA's weights. The weights
    of the base model are not compared.
    """
    free = {"resume": True, "offload": "none"}  # what may differ
    since = {"score_frames": "all", "video_score": "mean"}  # which older evaluations lack
    try:
        drawn = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["pictures"]
        found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        variants = [out / variant["name"] for variant in drawn["variants"]]
        was = [since | found["settings"] | free, found["lora"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    asked: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    same = was == [json.loads(json.dumps(settings | free)), lora]
    same = same and all(drawn.get(name) == value for name, value in asked.items())
    reported = all((out / name).exists() for name in ("evaluation.md", "grid.png"))
    return same and reported and not any(pending(folder, plan) for folder in variants)


def grid(folder: Path, plan: EvaluationPlan, scores: Mapping[str, Tensor]) -> Image.Image:
    """Draw a grid with a row for each of the first prompts and a block for each variant.

    scores: {variant: (prompts, m)}, shown below the images, of which only the first are drawn.
    """
    (first,) = pictures(folder / next(iter(scores)), 0, 1)
    side = cell_side([first.size])
    each = min(EACH, plan.images)

    def block(name: str, i: int) -> list[Cell]:
        shown = zip(pictures(folder / name, i, each), scores[name][i, :each].tolist(), strict=True)
        # resized at once, since the images of all prompts may not fit in memory
        return [Cell(fitted(image, side), f"{score:.3g}") for image, score in shown]

    rows = [
        Row(prompt, [block(name, i) for name in scores])
        for i, prompt in enumerate(plan.prompts[:ROWS])
    ]
    return painted([[name] for name in scores], rows, side)
