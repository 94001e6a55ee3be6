"""Steer a diffusion model towards a reward and save the images.

The target distribution is p(x0 | prompt) exp(λ r(x0, prompt)), from which a Feynman-Kac particle
filter samples inside the pipeline's call, with one population of particles per prompt. Under
`accelerate launch`, the prompts are divided among the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import rewards
from steering import FeynmanKac, tiny
from steering.call import COUNTS_OF_FRAMES
from steering.manifest import versions
from steering.settings import population_sizes, scored_steps
from steering.spread import Spread
from tilt import loading, offloading, quantization, runs, started
from tilt.commands.steer_options import MACHINE, OPTIONS, SAID_ELSEWHERE, Steer
from tilt.processes import Processes, Stopped, is_main, join
from tilt.prompts import Prompt, read
from tilt.wording import one_line

if TYPE_CHECKING:
    from steering import Steered


def open_folder(args: Steer, prompts: Sequence[Prompt], command: Sequence[str]) -> Path:
    """Create the folder with a manifest that can repeat the run, or check the one to resume."""
    if args.resume and args.out is None:
        raise ValueError("resume= needs out=, the folder of the run to resume")
    every = vars(args) | vars(args.filter)
    options = {name: value for name, value in every.items() if name not in SAID_ELSEWHERE}
    manifest = {
        "settings": {name: options[name] for name in options if name not in MACHINE},
        "machine": {name: options[name] for name in options if name in MACHINE},
        "prompts": [
            {key: value for key, value in dataclasses.asdict(prompt).items() if value is not None}
            for prompt in prompts
        ],
        "command": ["tilt", "steer", *command],
        "versions": versions(),
    }
    out = Path(args.out) if args.out else runs.new_folder(Path("out"))
    runs.open_run(out, manifest, resume=args.resume)
    return out


def read_prompts(args: Steer) -> list[Prompt]:
    """Return the prompts of the command line, then those of the file, each with its seed."""
    prompts = [Prompt(text) for text in args.prompts]
    prompts += read(Path(args.prompt_file), images=True) if args.prompt_file else []
    if not prompts:
        raise ValueError("there is no prompt: give one or more, or a prompt_file")
    return [p if p.seed is not None else dataclasses.replace(p, seed=args.seed) for p in prompts]


def call_keywords(args: Steer) -> dict[str, Any]:
    """Return keywords of the pipeline's call; embedded models have their own defaults."""
    if (args.height is None) != (args.width is None):
        raise ValueError("height= and width= must both be set: some pipelines ignore only one")
    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "num_frames": args.num_frames,
    }
    defaults = tiny.call_defaults(args.model) if args.model in tiny.NAMES else {}
    return defaults | {name: value for name, value in given.items() if value is not None}


def check_window(settings: FeynmanKac, args: Steer, call: dict[str, Any]) -> None:
    """Check the window of scored steps and the funnel, before a model is loaded."""
    from steering.particles import needs_scores

    if "num_inference_steps" in call and needs_scores(settings, args.particles):
        scored = scored_steps(call["num_inference_steps"], settings)
        population_sizes(args.particles, len(scored), settings)


def check_spread(settings: FeynmanKac, args: Steer, count: int) -> None:
    """Check that `count` processes can divide the particles, before a model is loaded."""
    if count == 1:
        raise ValueError(
            "spread= divides the particles among processes but there is only one: start more with "
            "accelerate launch --num_processes, or leave it out"
        )
    spread = Spread(True)
    spread.check("particles=", (args.particles,))
    spread.check("funnel=", settings.funnel)


def run(args: Steer, command: Sequence[str]) -> int:
    """Check everything, the cheapest check first; then steer the unfinished prompts."""
    processes = join(args.device)
    prompts, settings, scores = processes.agree(lambda: prepare(args, processes))

    def begin() -> tuple[Path, list[Path]]:
        out = open_folder(args, prompts, command)
        return out, runs.pending(runs.divide(out, prompts, args.prompts_per_call))

    out, pending = processes.told(begin)
    shares = runs.divide(out, prompts, args.prompts_per_call)
    mine = pending if args.spread else pending[processes.index :: processes.count]
    folders = sorted(folder for share in shares for folder in share.batches)
    try:
        work = processes.agree(lambda: ready(args, settings, scores, shares, mine, processes))
        with processes.together() if args.spread else contextlib.nullcontext():
            keep_all(work, len(mine), processes, args.spread)
        processes.finish()
        drawn = []
        if processes.is_main:
            drawn = ([] if pending else runs.drawn(out, folders)) or runs.draw(out, folders)
    except KeyboardInterrupt as cut:
        return interrupted(cut, out, folders, processes)
    for path in drawn:
        print(path)
    return 0


def prepare(args: Steer, processes: Processes) -> tuple[list[Prompt], FeynmanKac, list[Any]]:
    """Check what needs no model, and load the reward and that of the scores on the way, or None.

    args.device, dtype and reward become those of the run.
    """
    prompts = read_prompts(args)
    settings = FeynmanKac(**vars(args.filter))
    check_window(settings, args, call_keywords(args))
    if args.spread:
        check_spread(settings, args, processes.count)
    loading.check_name(args.model)
    quantization.check(args.quantize)
    offloading.check(args.offload, args.quantize)
    device = processes.device if args.device == "auto" else None
    device = device or loading.pick_device(args.device)
    # resolved, since auto could mean something else when the run is resumed on another machine
    args.device = str(device)
    args.dtype = str(loading.pick_dtype(args.dtype, device)).removeprefix("torch.")
    if args.reward is None:
        args.reward = "clip(tiny)" if args.model in tiny.NAMES else "clip"
    args.preview = loading.pick_preview(args.preview, args.model)
    scores: list[Any] = [None, None]
    finished = is_finished(args, prompts)
    for i, spec in enumerate((args.reward, args.on_the_way)):
        if spec is not None and not finished:
            started.say(f"loading {spec}")
            scores[i] = rewards.load(spec, device, imports=True)
            scores[i].check([prompt.text for prompt in prompts])
            check_references(prompts, scores[i])
    return prompts, settings, scores


def check_references(prompts: Sequence[Prompt], reward: rewards.WeightedSum) -> None:
    """Raise ValueError for a prompt without the images that the reward compares with."""
    without = [prompt.text for prompt in prompts if not (prompt.references or prompt.image)]
    if without and reward.needs_references:
        raise ValueError(
            f"{reward} compares with reference images but the prompt {without[0]!r:.80} has none; "
            'write "references": [...], or "image": ... if it edits one, in its line of a .jsonl '
            "file"
        )


def is_finished(args: Steer, prompts: Sequence[Prompt]) -> bool:
    """Return whether a run to resume is complete; that it is the same run is checked later."""
    if not (args.resume and args.out and Path(args.out, "manifest.json").is_file()):
        return False
    return not runs.pending(runs.divide(Path(args.out), prompts, args.prompts_per_call))


def interrupted(
    cut: KeyboardInterrupt, out: Path, folders: Sequence[Path], processes: Processes
) -> int:
    """Print how to resume; returns exit status 130 after Ctrl-C, 1 if a process died."""
    died = isinstance(cut, Stopped)
    # One process prints it for all; a second one, too, if the first may have died.
    if processes.index < (2 if died else 1):
        done = sum(folder.exists() for folder in folders)
        what = "stopped by the launcher, as when another process died" if died else "interrupted"
        print(
            f"tilt steer: {what}; {done} of {len(folders)} are finished and kept: "
            f"repeat the command with --out {out} --resume",
            file=sys.stderr,
        )
    return 1 if died else 130


Work = Generator[tuple[Path, "dict[str, Steered]"], None, None]


def ready(
    args: Steer,
    settings: FeynmanKac,
    scores: Sequence[Any],
    shares: Sequence[runs.Share],
    mine: Sequence[Path],
    processes: Processes,
) -> Work | None:
    """Load the model, check that finished results are of it, and return the remaining work."""
    if not mine and args.model not in tiny.NAMES:  # embedded models load in a second
        return None
    started.say(f"loading {args.model}")
    pipe, preview = load(args)
    done = [folder for share in shares for folder in share.batches if folder.exists()]
    runs.check_weights(done, pipe, preview)
    if not mine:
        return None
    pending = runs.among(shares, mine)
    kinds = kinds_of_call(args, settings, preview)
    reward, scout = scores
    kinds["steered"] |= {"progress": processes.is_main, "on_the_way": scout}
    for call in kinds.values():
        name_frames(pipe, call)
    runs.check_calls(pipe, reward, pending, kinds)
    return runs.steer_pending(pipe, reward, pending, kinds)


def load(args: Steer) -> tuple[Any, Any]:
    """Return the pipeline and its preview decoder (or None), on the device."""
    dtype = loading.DTYPES[args.dtype]
    pipe = loading.load_pipeline(args.model, dtype, args.lora, args.quantize)
    pipe = offloading.place(pipe, args.device, args.offload)
    preview = loading.load_preview(args.preview, args.model, dtype)
    preview = None if preview is None else preview.to(args.device)
    loading.set_attention(pipe, args.attention)
    loading.tune(pipe, args.compile, preview)
    pipe.set_progress_bar_config(disable=True)  # steer_each() shows a bar over all prompts
    return pipe, preview


def kinds_of_call(args: Steer, settings: FeynmanKac, preview: Any) -> dict[str, dict[str, Any]]:
    """Return keywords of steer_each() for "steered", and with --compare for "plain"."""
    call = {
        "particles": args.particles,
        "preview": preview,
        "preview_size": args.preview_size,
        "score_frames": args.score_frames,
        "video_score": args.video_score,
        "max_batch": args.max_batch,
        "guidance_interval": args.guidance_interval,
        "prompts_per_call": args.prompts_per_call,
        "spread": args.spread,
        **call_keywords(args),
    }
    kinds = {"steered": call | {"settings": settings}}
    if args.compare:
        # Without resampling, particles are independent plain samples: particle 0 is the baseline
        # "plain", and the one with the highest reward is the best of k.
        plain = dataclasses.replace(settings, min_ess=0.0, funnel=())
        kinds["plain"] = call | {"settings": plain, "progress": False}
    return kinds


def name_frames(pipe: Any, call: dict[str, Any]) -> None:
    """Rename num_frames as the pipeline's own call names it (SanaVideo: frames)."""
    known = inspect.signature(type(pipe).__call__).parameters
    own = next((name for name in COUNTS_OF_FRAMES if name in known), "num_frames")
    if "num_frames" in call:
        call[own] = call.pop("num_frames")


def keep_all(work: Work | None, total: int, processes: Processes, spread: bool) -> None:
    """Save each result when it is finished, and print its rewards and the remaining time."""
    if work is None:
        return
    began = time.monotonic()
    who = f"process {processes.index}: " if processes.count > 1 and not spread else ""
    # closing ends the progress bar before an error is printed
    with contextlib.closing(work), logging_redirect_tqdm():
        for done, (folder, results) in enumerate(work, 1):
            if spread and not processes.is_main:  # it has the same results
                continue
            runs.keep(folder, results)
            left = (time.monotonic() - began) / done * (total - done)
            said = f"{who}{done}/{total}, {_duration(left)} left: {_summary(results)}  {folder}"
            tqdm.write(said + "\n", end="")  # one write, so that lines of two processes do not mix


def _summary(results: dict[str, Steered]) -> str:
    """Return a summary of the rewards, each a mean over the batch's prompts."""
    best = results["steered"].rewards.amax(1).mean().item()
    if "plain" not in results:
        return f"best reward {best:.3g}"
    plain = results["plain"].rewards
    k, first = plain.shape[1], plain[:, 0].mean().item()
    return f"plain {first:.3g}, best of {k} {plain.amax(1).mean().item():.3g}, steered {best:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit status 0, 2 for refused input, or 130 after Ctrl-C.

    1 if another process of the run died, or if memory ran out.
    """
    command = sys.argv[1:] if argv is None else argv
    args = None
    try:
        args = OPTIONS.read(command)
        return run(args, command)
    except ValueError as error:
        if args or is_main():  # all processes have the same command line
            said = OPTIONS.in_words(one_line(error)).replace("num_inference_steps", "--steps")
            print(f"tilt steer: {said}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(
            "tilt steer: out of memory; finished results are kept: lower --particles, --max-batch, "
            "--prompts-per-call or the size, or repeat the command with --out and --resume",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as cut:
        died = isinstance(cut, Stopped)
        if is_main():
            why = "another process ended" if died else "interrupted"
            print(f"tilt steer: {why} before it began", file=sys.stderr)
        return 1 if died else 130
