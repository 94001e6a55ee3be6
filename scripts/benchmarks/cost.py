"""Seconds of k steered particles over seconds of k plain samples, in pairs inside one run.

    python -m scripts.bench cost --model tiny-sd3 --particles 8 --pairs 9
    python -m scripts.bench cost --model sd15 sdxl sd35m --device cuda --dtype bfloat16

The plain run is the pipeline's own call for one prompt and k images with the same chain; the
steered one scores `--num-scores` times in mid-run, through the preview decoder or the pipeline's
own, and once at the end. Machines are shared and their speed drifts, so the two alternate and the
figure is the ratio pair by pair. Beside it stands what it would be if all but decoding and scoring
were free. sd15, sdxl and sd35m are networks of that size with random weights.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import rewards
from steering import FeynmanKac, generators, steer, tiny
from steering.schedulers import stochastic
from tilt import loading

from .machine import about, peak
from .networks import MODELS
from .sized import DTYPES, sized

PROMPT = "a red circle left of a blue star"


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call, until the device has finished."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(first: Callable[[], object], second: Callable[[], object], pairs: int) -> list[float]:
    """Seconds of `first` over those of `second`, of alternating pairs, after a warm-up of each."""
    second()
    first()
    found = []
    for pair in range(pairs):
        # Which comes first changes, so that a drift in speed favours neither.
        order = (second, first) if pair % 2 == 0 else (first, second)
        a, b = map(seconds, order)
        found.append(b / a if pair % 2 == 0 else a / b)
    return found


def subject(
    model: str, device: torch.device, dtype: torch.dtype, side: int | None = None
) -> tuple[Any, dict[str, Any], Any]:
    """A pipeline, the keywords of its call and its preview decoder: embedded, or of that size."""
    if model in MODELS:
        return sized(model, device, dtype, side)
    pipe = tiny.load(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, tiny.call_defaults(model), tiny.preview().to(device, dtype)


def measure(
    pipe: Any,
    keywords: dict[str, Any],
    reward: Any,
    k: int,
    pairs: int,
    preview: Any,
    num_scores: int,
) -> list[float]:
    """The ratios steered/plain of alternating pairs."""
    settings = FeynmanKac(num_scores=num_scores)

    def steered() -> object:
        return steer(
            *(pipe, [PROMPT], reward, k, settings),
            preview=preview,
            progress=False,
            **keywords,
        )

    return ratios(steered, plain(pipe, keywords, k), pairs)


def least(
    pipe: Any,
    keywords: dict[str, Any],
    reward: Any,
    k: int,
    pairs: int,
    preview: Any,
    num_scores: int,
) -> list[float]:
    """What no filter can go below: 1 + decoding and scoring alone / plain, of alternating pairs.

    That is `num_scores` predictions decoded and scored in mid-run, and a score at the end.
    """
    own, decoder = plain(pipe, keywords, k), preview or pipe.vae
    latents = own(output_type="latent")[0].to(decoder.dtype)
    prompts = [PROMPT] * k

    @torch.no_grad()
    def looked() -> None:
        images = latents
        for _ in range(num_scores):
            images = decoder.decode(latents, return_dict=False)[0]
            reward((images / 2 + 0.5).clamp(0, 1).float(), prompts)
        reward((images / 2 + 0.5).clamp(0, 1).float(), prompts)

    return [1 + ratio for ratio in ratios(looked, own, pairs)]


def plain(pipe: Any, keywords: dict[str, Any], k: int) -> Callable[..., Any]:
    """The pipeline's own call for k images with the chain that is steered."""
    own = copy.copy(pipe)
    rows = {n: v.repeat(k, *[1] * (v.ndim - 1)) for n, v in keywords.items() if _is_tensor(v)}
    prompt = {} if rows else {"prompt": PROMPT, "num_images_per_prompt": k}

    def run(**more: Any) -> Any:
        draws = generators(0, [PROMPT], k)
        vars(own)["scheduler"] = stochastic(pipe.scheduler, FeynmanKac().noise, draws)
        return own(generator=draws, **prompt, **keywords | rows | more)

    return run


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print one Markdown row for each case."""
    parser = argparse.ArgumentParser(
        prog="cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=(*tiny.NAMES, *MODELS), default=list(tiny.NAMES))
    add("--particles", type=int, default=8)
    add("--pairs", type=int, default=9)
    add("--num-scores", type=int, nargs="+", default=[4, 8])
    add("--steps", type=int, nargs="+", help="by default the model's own")
    add("--reward", default="clip(tiny)", help="clip(source=random:0) has the size of ViT-B/32")
    add("--decoder", nargs="+", choices=("preview", "full"), default=["preview", "full"])
    add("--device", default="cpu")
    add("--dtype", choices=sorted(DTYPES), default="float32")
    add("--side", type=int, help="pixels; by default the model's own")
    args = parser.parse_args(argv)
    device = loading.pick_device(args.device)
    print(about(device, DTYPES[args.dtype]) + f", {args.reward}, {args.pairs} pairs\n")
    head = ["model", "k", "steps", "scores", "decoder", "steered / plain: median [min, max]"]
    head += ["decoding and scoring alone", "peak GB"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    reward = rewards.load(args.reward, device, imports=True)
    for model in args.model:
        pipe, keywords, decoder = subject(model, device, DTYPES[args.dtype], args.side)
        counts = args.steps or [keywords["num_inference_steps"]]
        for steps, count, kind in itertools.product(counts, args.num_scores, args.decoder):
            call = keywords | {"num_inference_steps": steps}
            preview = decoder if kind == "preview" else None
            given = (pipe, call, reward, args.particles, args.pairs, preview, count)
            with peak(device) as most:
                found = measure(*given)
            print(
                f"| {model} | {args.particles} | {steps} | {count} | {kind} | {_span(found)} |"
                f" {_span(least(*given))} | {most.gigabytes:.2f} |",
                flush=True,
            )


def _span(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
