"""The options of `tilt steer`."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

import rewards
from finetune.ranges import (
    FLAG,
    NAME,
    SCORE_FRAMES,
    SEED,
    TEXT,
    VIDEO_SCORE,
    Range,
    check,
    number,
    optional,
    part,
    setting,
    whole,
)  # fmt: skip
from steering import FeynmanKac, tiny
from steering.arguments import MOST_FRAMES, MOST_PARTICLES, MOST_PIXELS, MOST_STEPS
from tilt import loading
from tilt.framing import ABOUT_FRAMES, ABOUT_SCORE
from tilt.offloading import ABOUT_OFFLOAD, OFFLOAD
from tilt.options import Options
from tilt.quantization import ABOUT_QUANTIZE, QUANTIZE

__all__ = ["MACHINE", "OPTIONS", "SAID_ELSEWHERE", "Steer"]

ABOUT = """Steer a diffusion model towards a reward and save the images.

The target distribution is p(x0 | prompt) exp(λ r(x0, prompt)), from which a Feynman-Kac particle
filter samples inside the pipeline's call, with one population of particles per prompt. Under
`accelerate launch`, the prompts are divided among the processes.
"""
EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network
  tilt steer 'the word "ANTS"' --model tiny-sd3 --guidance-scale 1 --reward ocr --compare

  # several prompts from a file, two rewards
  tilt steer --prompt-file prompts.txt --reward "clip(tiny) + 0.01*jpeg"

  # resume an interrupted run
  tilt steer --prompt-file prompts.txt --out out/many --resume

  # use all GPUs of the machine; each process gets a share of the prompts
  accelerate launch --multi_gpu --num_processes 8 -m tilt steer --prompt-file prompts.txt

  # halve the population twice: k = 8, 4, 2
  tilt steer "two red stars" --model tiny-sd --num-scores 2 --funnel 4,2

  # a model from the hub or from a folder that pipe.save_pretrained() wrote
  tilt steer "a corgi" --model stabilityai/stable-diffusion-3.5-medium --max-batch 4

a prompt file is text with one prompt per line, or .jsonl with one object per line:
  {"prompt": "a red circle", "seed": 3, "references": ["circle.png"]}
"image" names the image that the pipeline edits, which is also the reference where none is given:
  {"prompt": "make the hat red", "image": "hat.png"}
"""
# Settings that may change when a run is resumed: they affect speed or memory, not the target.
MACHINE = {"device", "attention", "compile", "max_batch", "spread", "offload"}
SAID_ELSEWHERE = {
    "out",
    "resume",
    "prompts",
    "prompt_file",
    "filter",
}  # recorded in other entries of the manifest

if TYPE_CHECKING:
    Filter = FeynmanKac
else:  # only its fields, since FeynmanKac checks them when it is created from them
    kinds = typing.get_type_hints(FeynmanKac)
    fields = [
        (f.name, kinds[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(FeynmanKac)
    ]
    Filter = dataclasses.make_dataclass("Filter", fields)


MODEL, CALL, ON = "model and reward", "the pipeline's call (defaults are the pipeline's)", "machine"
PIXELS = optional(whole(1, MOST_PIXELS))
KNOWN = ", ".join(rewards.available())


def _is_interval(value: Any) -> bool:
    return len(value) == 2 and 0 <= value[0] <= value[1] <= 1


def _is_batch(value: Any) -> bool:
    return value == "auto" or whole(1).allows(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


@dataclasses.dataclass
class Steer:
    """The prompts, the model, the reward and the filter of a run."""

    prompts: list[str] = setting(list, Range("a list of texts", _are_texts), "text prompts")
    prompt_file: str | None = setting(
        None, optional(NAME), "more prompts: .txt or .jsonl, see below"
    )
    out: str | None = setting(None, optional(NAME), "output folder; by default out/DATE-TIME")
    resume: bool = setting(False, FLAG, "skip prompts that are finished in the folder")
    compare: bool = setting(False, FLAG, "also generate plain images and best of k, at equal seeds")
    model: str = setting("tiny-sd3", NAME, f"hub id, folder, or {' or '.join(tiny.NAMES)}", MODEL)
    lora: str | None = setting(
        None, optional(NAME), "LoRA weights to load: hub id, folder or file", MODEL
    )
    reward: str | None = setting(
        None,
        optional(TEXT),
        f"{KNOWN}, or a sum such as 'clip + 0.5*ocr(mode=strict)' (default: clip, or clip(tiny) "
        "for an embedded model)",
        MODEL,
    )
    on_the_way: str | None = setting(
        None,
        optional(TEXT),
        "a reward for the intermediate scores alone, such as a cheaper one; the final images are "
        "weighed by --reward",
        MODEL,
    )
    preview: str = setting(
        "auto",
        NAME,
        "AutoencoderTiny (folder or hub id) that decodes images for intermediate scores; tiny: the "
        "embedded one; none; auto: the published one for the model's VAE, if there is one",
        MODEL,
    )
    preview_size: float = setting(
        1.0, number(), "sides of images in intermediate scores, relative to the final ones", MODEL
    )
    score_frames: Any = setting("all", SCORE_FRAMES, ABOUT_FRAMES, MODEL)
    video_score: str = setting("mean", VIDEO_SCORE, ABOUT_SCORE, MODEL)
    steps: int | None = setting(None, optional(whole(1, MOST_STEPS)), "denoising steps", CALL)
    guidance_scale: float | None = setting(
        None, optional(number()), "classifier-free guidance scale", CALL
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        Range("two fractions, as in 0,0.6", _is_interval),
        "use guidance only between these fractions of the run; other steps cost half, and the "
        "model's distribution changes",
        CALL,
    )
    negative_prompt: str | None = setting(None, optional(TEXT), "negative prompt of guidance", CALL)
    height: int | None = setting(None, PIXELS, "image height in pixels", CALL)
    width: int | None = setting(None, PIXELS, "image width in pixels", CALL)
    num_frames: int | None = setting(
        None, optional(whole(1, MOST_FRAMES)), "frames per video, for a model of videos", CALL
    )
    seed: int = setting(0, SEED, "seed; a line of a .jsonl file may set its own", CALL)
    particles: int = setting(8, whole(1, MOST_PARTICLES), "k, particles per prompt", "filter")
    filter: Filter = part(Filter, "filter", flat=True)
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps, ...", ON)
    dtype: str = setting("auto", loading.DTYPE, loading.ABOUT_DTYPE, ON)
    quantize: str = setting("none", QUANTIZE, ABOUT_QUANTIZE, ON)
    offload: str = setting("none", OFFLOAD, ABOUT_OFFLOAD, ON)
    attention: str = setting(
        "auto",
        NAME,
        "auto or sdpa (PyTorch's), xformers, or another attention backend of diffusers",
        ON,
    )
    compile: bool = setting(
        False, FLAG, "torch.compile the networks: a slow first step, faster later ones", ON
    )
    max_batch: Any = setting(
        "auto",
        Range("auto, or a whole number, 1 or more", _is_batch),
        "maximum batch of one network call (guidance takes two rows per image); auto: all, fewer "
        "when out of memory",
        ON,
    )
    spread: bool = setting(
        False,
        FLAG,
        "under accelerate launch, divide each prompt's particles, not the prompts",
        ON,
    )
    prompts_per_call: int = setting(1, whole(1), "prompts per call of the pipeline", ON)

    def __post_init__(self) -> None:
        check(self)


OPTIONS = Options("tilt steer", Steer, ABOUT, EXAMPLES, positional="prompts")
