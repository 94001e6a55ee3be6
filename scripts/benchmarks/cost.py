"""Seconds of k steered particles over seconds of k plain samples, in pairs inside one run.

    python -m scripts.bench cost --model tiny-sd3 --particles 8 --pairs 9
    python -m scripts.bench cost --model sd15 sdxl sd35m --device cuda --dtype bfloat16

The plain run is the pipeline's own call for one prompt and k images with the same chain. The
steered run scores `--num-scores` times in mid-run, through the preview decoder or the pipeline's
own, and once at the end. The next column is what the ratio would be if all but decoding and scoring
were free. sd15, sdxl and sd35m are networks of that size with random weights.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import rewards
from steering import FeynmanKac, generators, steer, tiny
from steering.schedulers import stochastic
from tilt import loading

from ..parser import parser_of
from ..tables import head, line, span
from .machine import about, peak
from .networks import MODELS
from .sized import sized
from .timing import ratios

PROMPT = "a red circle left of a blue star"


class Case(NamedTuple):
    """k particles of one prompt, scored `num_scores` times in mid-run.

    preview: the decoder of those scores; None is the pipeline's own. call: keywords of its call.
    """

    pipe: Any
    call: dict[str, Any]
    reward: Any
    k: int
    preview: Any
    num_scores: int


def subject(
    model: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], Any]:
    """A pipeline, the keywords of its call and its preview decoder: embedded, or of that size."""
    if model in MODELS:
        return sized(model, device, dtype)
    pipe = tiny.load(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, tiny.call_defaults(model), tiny.preview().to(device, dtype)


def measure(case: Case, pairs: int) -> list[float]:
    """The ratios steered/plain of alternating pairs."""
    call = case.call | {"preview": case.preview, "progress": False}
    settings = FeynmanKac(num_scores=case.num_scores)

    def steered() -> object:
        return steer(case.pipe, [PROMPT], case.reward, case.k, settings, **call)

    return ratios(steered, plain(case.pipe, case.call, case.k), pairs)


def least(case: Case, pairs: int) -> list[float]:
    """The lower bound of `measure`: 1 + decoding and scoring alone / plain.

    That is `num_scores` predictions decoded and scored in mid-run, and a score at the end.
    """
    own, decoder = plain(case.pipe, case.call, case.k), case.preview or case.pipe.vae
    latents = own(output_type="latent")[0].to(decoder.dtype)
    prompts = [PROMPT] * case.k

    @torch.no_grad()
    def scored() -> None:
        images = latents
        for _ in range(case.num_scores):
            images = decoder.decode(latents, return_dict=False)[0]
            case.reward((images / 2 + 0.5).clamp(0, 1).float(), prompts)
        case.reward((images / 2 + 0.5).clamp(0, 1).float(), prompts)

    return [1 + ratio for ratio in ratios(scored, own, pairs)]


def plain(pipe: Any, call: dict[str, Any], k: int) -> Callable[..., Any]:
    """The pipeline's own call for k images with the chain that is steered."""
    own, tensors = copy.copy(pipe), {n: v for n, v in call.items() if torch.is_tensor(v)}
    rows = {name: value.repeat(k, *[1] * (value.ndim - 1)) for name, value in tensors.items()}
    prompt = {} if rows else {"prompt": PROMPT, "num_images_per_prompt": k}

    def run(**more: Any) -> Any:
        draws = generators(0, [PROMPT], k)
        vars(own)["scheduler"] = stochastic(pipe.scheduler, FeynmanKac().noise, draws)
        return own(generator=draws, **prompt, **call | rows | more)

    return run


def main(argv: list[str] | None = None) -> None:
    """Print one Markdown row for each case."""
    parser = parser_of(__doc__, __name__)
    add = parser.add_argument
    add("--model", nargs="+", choices=(*tiny.NAMES, *MODELS), default=list(tiny.NAMES))
    add("--particles", type=int, default=8)
    add("--pairs", type=int, default=9)
    add("--num-scores", type=int, nargs="+", default=[4, 8])
    add("--steps", type=int, nargs="+", help="by default the model's own")
    add("--reward", default="clip(tiny)", help="clip(source=random:0) has the size of ViT-B/32")
    add("--decoder", nargs="+", choices=("preview", "full"), default=["preview", "full"])
    add("--device", default="cpu")
    add("--dtype", choices=loading.DTYPES, default="float32")
    args = parser.parse_args(argv)
    device, dtype = loading.pick_device(args.device), loading.DTYPES[args.dtype]
    print(about(device, dtype) + f", {args.reward}, {args.pairs} pairs\n")
    figures = ("steered / plain: median [min, max]", "decoding and scoring alone", "peak GB")
    print(head("model", "k", "steps", "scores", "decoder", *figures))
    reward = rewards.load(args.reward, device, imports=True)
    for model in args.model:
        pipe, call, decoder = subject(model, device, dtype)
        counts = args.steps or [call["num_inference_steps"]]
        for steps, scores, kind in itertools.product(counts, args.num_scores, args.decoder):
            preview = decoder if kind == "preview" else None
            timed = call | {"num_inference_steps": steps}
            case = Case(pipe, timed, reward, args.particles, preview, scores)
            with peak(device) as most:
                found = span(measure(case, args.pairs))
            floor, held = span(least(case, args.pairs)), f"{most.gigabytes:.2f}"
            print(line(model, case.k, steps, scores, kind, found, floor, held), flush=True)
