"""The options of `tilt steer`."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

import rewards
from finetune.ranges import (
    FLAG,
    NAME,
    SEED,
    TEXT,
    Range,
    check,
    number,
    optional,
    part,
    setting,
    whole,
)  # fmt: skip
from steering import FeynmanKac, tiny
from steering.arguments import MOST_PARTICLES, MOST_PIXELS, MOST_STEPS
from tilt import loading
from tilt.options import Options

__all__ = ["MACHINE", "OPTIONS", "SAID_ELSEWHERE", "Steer"]

ABOUT = """Steer a diffusion model towards a reward and keep the pictures.

The samples come from p(x0 | prompt) exp(λ r(x0, prompt)): a Feynman-Kac particle filter runs inside
the pipeline's own call, one population of particles a prompt. Under `accelerate launch` the prompts
are split over the processes.
"""
EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network
  tilt steer 'the word "ANTS"' --model tiny-sd3 --guidance-scale 1 --reward ocr --compare

  # several prompts from a file, two rewards
  tilt steer --prompt-file prompts.txt --reward "clip(tiny) + 0.01*jpeg"

  # carry on where an interrupted run stopped
  tilt steer --prompt-file prompts.txt --out out/many --resume

  # the same on every GPU of the machine: each process takes its share of the prompts
  accelerate launch --multi_gpu --num_processes 8 -m tilt steer --prompt-file prompts.txt

  # halve the population twice on the way, k = 8, 4, 2
  tilt steer "two red stars" --model tiny-sd --num-scores 2 --funnel 4,2

  # a model from the hub or from a folder that pipe.save_pretrained() wrote
  tilt steer "a corgi" --model stabilityai/stable-diffusion-3.5-medium --max-batch 4

a prompt file is text, one prompt a line, or .jsonl, one object a line:
  {"prompt": "a red circle", "seed": 3, "references": ["circle.png"]}
"""
# What may differ between a run and its continuation: it changes speed or memory, not the target.
MACHINE = {"device", "attention", "compile", "max_batch", "spread"}
SAID_ELSEWHERE = {
    "out",
    "resume",
    "prompts",
    "prompt_file",
    "filter",
}  # in the manifest's other entries

if TYPE_CHECKING:
    Filter = FeynmanKac
else:  # its fields, which it checks itself when it is made of them
    kinds = typing.get_type_hints(FeynmanKac)
    fields = [
        (f.name, kinds[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(FeynmanKac)
    ]
    Filter = dataclasses.make_dataclass("Filter", fields)


MODEL, CALL, ON = "model and reward", "the pipeline's call (by default its own values)", "machine"
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
    """What to draw, of which model, toward which reward."""

    prompts: list[str] = setting(list, Range("a list of texts", _are_texts), "what to draw")
    prompt_file: str | None = setting(
        None, optional(NAME), "more prompts: .txt or .jsonl, see below"
    )
    out: str | None = setting(None, optional(NAME), "folder; by default out/ and the time of day")
    resume: bool = setting(False, FLAG, "skip what the folder has already finished")
    compare: bool = setting(False, FLAG, "draw plain pictures and best of k at the same seeds too")
    model: str = setting("tiny-sd3", NAME, f"hub id, folder, or {' or '.join(tiny.NAMES)}", MODEL)
    lora: str | None = setting(
        None, optional(NAME), "LoRA weights to load: hub id, folder or file", MODEL
    )
    reward: str | None = setting(
        None,
        optional(TEXT),
        f"{KNOWN}, or a sum such as 'clip + 0.5*ocr(mode=strict)' (default: clip, and clip(tiny) "
        "for an embedded model)",
        MODEL,
    )
    preview: str = setting(
        "auto",
        NAME,
        "an AutoencoderTiny (folder or hub id) that decodes for the scores on the way; tiny, the "
        "embedded one; none; auto: the published one for the model's VAE, if there is one",
        MODEL,
    )
    preview_size: float = setting(
        1.0, number(), "sides of the pictures scored on the way, as a share of the image's", MODEL
    )
    steps: int | None = setting(
        None, optional(whole(1, MOST_STEPS)), f"denoising steps, at most {MOST_STEPS}", CALL
    )
    guidance_scale: float | None = setting(
        None, optional(number()), "classifier-free guidance", CALL
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        Range("two fractions, as in 0,0.6", _is_interval),
        "guide only from the first to the second fraction of the run; steps outside cost half and "
        "make another p",
        CALL,
    )
    negative_prompt: str | None = setting(None, optional(TEXT), "what to keep away from", CALL)
    height: int | None = setting(None, PIXELS, "pixels", CALL)
    width: int | None = setting(None, PIXELS, "pixels", CALL)
    seed: int = setting(0, SEED, "below 2^63; a line of a .jsonl may set its own", CALL)
    particles: int = setting(8, whole(1, MOST_PARTICLES), "k, particles a prompt", "filter")
    filter: Filter = part(Filter, "filter", flat=True)
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps, ...", ON)
    dtype: str = setting("auto", loading.DTYPE, loading.ABOUT_DTYPE, ON)
    attention: str = setting(
        "auto",
        NAME,
        "auto or sdpa: PyTorch's own; or xformers, or another backend of diffusers",
        ON,
    )
    compile: bool = setting(
        False, FLAG, "torch.compile the networks: slow at the first step, faster then", ON
    )
    max_batch: Any = setting(
        "auto",
        Range("auto, or a whole number, 1 or more", _is_batch),
        "rows that the network evaluates at once; auto: all, and fewer where memory runs out",
        ON,
    )
    spread: bool = setting(
        False,
        FLAG,
        "under accelerate launch: one prompt's particles over all processes, not the prompts",
        ON,
    )
    prompts_per_call: int = setting(1, whole(1), "prompts in one batch", ON)

    def __post_init__(self) -> None:
        check(self)


OPTIONS = Options("tilt steer", Steer, ABOUT, EXAMPLES, positional="prompts")
