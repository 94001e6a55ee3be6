"""The options of `tilt steer`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence

import rewards
from steering import FeynmanKac, tiny
from steering.arguments import MOST_PARTICLES, MOST_PIXELS, MOST_STEPS
from tilt import loading
from tilt.options import COUNT, NUMBER, SEED, Parser, Whole, check_words, path

__all__ = ["ARGUMENTS", "FIELD_HELP", "MACHINE", "SAID_ELSEWHERE", "parse", "parser"]

ABOUT = """Steer a diffusion model towards a reward and keep the pictures.

The samples come from p(x0 | prompt) exp(λ r(x0, prompt)): a Feynman-Kac particle filter runs inside
the pipeline's own call, one population of particles a prompt. Under `accelerate launch` the prompts
are split over the processes.
"""
EXAMPLES = """\
examples:
  # the embedded model: no GPU, no network
  tilt steer 'the word "ANTS"' --model tiny-sd3 --guidance-scale 1 \\
    --reward ocr --compare

  # several prompts from a file, two rewards
  tilt steer --prompt-file prompts.txt --reward "clip(tiny) + 0.01*jpeg"

  # carry on where an interrupted run stopped
  tilt steer --prompt-file prompts.txt --out out/many --resume

  # the same on every GPU of the machine: each process takes its share of the prompts
  accelerate launch --config_file scripts/configs/gpus.yaml --num_processes 8 \\
    scripts/steer.py --prompt-file prompts.txt --out out/many

  # halve the population twice on the way, k = 8, 4, 2
  tilt steer "two red stars" --model tiny-sd --num-scores 2 --funnel 4,2

  # a model from the hub or from a folder that pipe.save_pretrained() wrote
  tilt steer "a corgi" --model stabilityai/stable-diffusion-3.5-medium \\
    --max-batch 4

a prompt file is text, one prompt a line, or .jsonl, one object a line:
  {"prompt": "a red circle", "seed": 3, "references": ["circle.png"]}
"""

FIELD_HELP = {
    "reward_scale": "λ: a reward higher by 1/λ makes a picture e times as likely",
    "potential": "what a score weighs by: difference, max, sum or immediate",
    "resampler": "multinomial, stratified, systematic, residual or ssp",
    "min_ess": "resample where the effective sample size is below this share of the particles",
    "num_scores": "steps to score on the way, besides the final image",
    "score_from": "first scored step, as a fraction of the steps",
    "score_to": "last scored step, as a fraction of the steps",
    "noise": "noise of each move: DDIM's eta (default: 1), or its share of sigma for flow models "
    "(default: 0.5)",
    "tempering": "how λ grows: none, linear or adaptive",
    "funnel": "particles left after each scored step, one number for each of --num-scores, as in "
    "8,8,8,4,4,4,2,2; empty keeps all",
}
# What may differ between a run and its continuation: it changes speed or memory, not the target.
MACHINE = {"device", "attention", "compile", "max_batch", "spread"}
# What the libraries' sentences call what the options set.
ARGUMENTS = {
    name: "--" + name.replace("_", "-")
    for name in (
        *FIELD_HELP, "particles", "prompts_per_call", "max_batch", "preview_size", "spread", "seed",
        "guidance_interval", "guidance_scale", "negative_prompt", "height", "width", "out",
    )
} | {"num_inference_steps": "--steps"}  # fmt: skip
SAID_ELSEWHERE = {"out", "resume", "prompts", "prompt_file"}  # in the manifest's other entries


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return action.help if unsaid else f"{action.help} (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    """Every option, grouped; the filter's come from the fields of FeynmanKac."""
    p = Parser(
        prog="tilt steer",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_inputs(p)
    group = p.add_argument_group("filter")
    group.add_argument(
        "--particles", type=Whole(1, MOST_PARTICLES), default=8, help="k, particles a prompt"
    )
    for field in dataclasses.fields(FeynmanKac):
        kind = _populations if field.name == "funnel" else type(field.default)
        kind = NUMBER if kind in (float, type(None)) else COUNT if kind is int else kind
        default = "" if field.name == "funnel" else field.default
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, help=FIELD_HELP[field.name])
    _add_machine(p)
    return p


def _add_inputs(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", nargs="*", default=[], metavar="PROMPT", help="what to draw")
    p.add_argument("--prompt-file", type=path, help="more prompts: .txt or .jsonl, see below")
    p.add_argument("--out", type=path, help="folder; by default out/ and the time of day")
    p.add_argument("--resume", action="store_true", help="skip what --out has already finished")
    p.add_argument("--compare", action="store_true", help="plain and best of k at the same seeds")
    group = p.add_argument_group("model and reward")
    names = " or ".join(tiny.NAMES)
    group.add_argument("--model", default="tiny-sd3", help=f"hub id, folder, or {names}")
    group.add_argument("--lora", help="LoRA weights to load: hub id, folder or file")
    known = ", ".join(rewards.available())
    spec = f"{known}, or a sum such as 'clip + 0.5*ocr(mode=strict)'"
    group.add_argument(
        "--reward", help=f"{spec} (default: clip, or clip(tiny) for an embedded model)"
    )
    group.add_argument(
        "--preview",
        default="auto",
        help="an AutoencoderTiny (folder or hub id) that decodes for the scores on the way; tiny, "
        "the embedded one; none; auto: the published one for the model's VAE, if there is one",
    )
    group.add_argument(
        "--preview-size",
        type=NUMBER,
        default=1.0,
        help="sides of the pictures scored on the way, as a share of the image's",
    )
    group = p.add_argument_group("the pipeline's call (by default its own values)")
    group.add_argument(
        "--steps", type=Whole(1, MOST_STEPS), help=f"denoising steps, at most {MOST_STEPS}"
    )
    group.add_argument("--guidance-scale", type=NUMBER, help="classifier-free guidance")
    group.add_argument(
        "--guidance-interval",
        type=_interval,
        default=(0.0, 1.0),
        metavar="A,B",
        help="guide only from A to B of the run; steps outside cost half and make another p",
    )
    group.add_argument("--negative-prompt", help="what to keep away from")
    group.add_argument("--height", type=Whole(1, MOST_PIXELS), help="pixels")
    group.add_argument("--width", type=Whole(1, MOST_PIXELS), help="pixels")
    group.add_argument(
        "--seed", type=SEED, default=0, help="below 2^63; a line of a .jsonl may set its own"
    )


def _add_machine(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    dtype = "of the networks; auto: float32 on a CPU, else a half type"
    add("--dtype", default="auto", choices=["auto", *loading.DTYPES], help=dtype)
    attention = "auto or sdpa: PyTorch's own; or xformers, or another backend of diffusers"
    add("--attention", default="auto", help=attention)
    compiled = "torch.compile the networks: slow at the first step, faster then"
    add("--compile", action="store_true", help=compiled)
    rows = "rows that the network evaluates at once; auto: all, and fewer where memory runs out"
    add("--max-batch", type=_rows, default="auto", help=rows)
    spread = "under accelerate launch: one prompt's particles over all processes, not the prompts"
    add("--spread", action="store_true", help=spread)
    add("--prompts-per-call", type=COUNT, default=1, help="prompts in one batch")


def _rows(text: str) -> int | str:
    return text if text == "auto" else COUNT(text)


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: pass two fractions, as in 0,0.6") from None
    return low, high


def _populations(text: str) -> tuple[int, ...]:
    return tuple(COUNT(part.strip()) for part in text.split(",") if part.strip())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ValueError, with the nearest name, for a flag that does not exist."""
    check_words(sys.argv[1:] if argv is None else argv)
    p = parser()
    args, unknown = p.parse_known_intermixed_args(argv)
    for flag in unknown:
        near = difflib.get_close_matches(flag.partition("=")[0], p._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise ValueError(f"there is no option {flag:.80}: {hint}")
    return args
