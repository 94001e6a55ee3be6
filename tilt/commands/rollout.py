"""Generate the images or videos for fine-tuning: several per prompt, plain or steered.

Several processes divide the shards. To resume an interrupted run, repeat the command with --resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rewards
from finetune import ranges
from finetune.following import newest
from finetune.ranges import NAME, optional, setting, whole
from finetune.rollouts import Plan, check, generate, is_complete, open_run
from finetune.shards import NOTE
from steering import tiny
from steering.adapters import load_lora, unload_lora
from tilt import digests, drawing, exit_status, loading, offloading, started
from tilt.options import Options
from tilt.processes import is_main, join
from tilt.prompts import read


@dataclass
class Rollout(drawing.Drawing):
    """The images to generate for each prompt."""

    images: int = setting(16, whole(0, 10_000), "plain images per prompt")
    steered: int = setting(
        0, whole(0, 10_000), "images per prompt from the particle filter, steered by --reward"
    )
    reward: str | None = setting(None, optional(NAME), "reward for --steered, as 'clip + 0.5*ocr'")
    prompts_per_shard: int = setting(4, whole(1), "prompts per file")
    follow: str | None = setting(
        None,
        optional(NAME),
        "folder of a training run; each shard is drawn by its last lora-000100/ or the like",
    )


EXAMPLES = """\
examples:
  tilt rollout --prompts prompts.txt --out runs/words --images 12
  tilt score runs/words --reward "ocr(mode=strict)"
"""
OPTIONS = Options("tilt rollout", Rollout, __doc__ or "", EXAMPLES)


def plan_of(settings: Rollout) -> Plan:
    """Return the plan of the run, with each prompt once."""
    if not settings.prompts or not settings.out:
        raise ValueError("set prompts=FILE and out=FOLDER")
    if bool(settings.steered) != bool(settings.reward):
        raise ValueError("steered= and reward= belong together; set both or neither")
    if settings.follow and settings.lora:
        raise ValueError("lora= and follow= both name the LoRA that draws; leave one out")
    if not settings.steered:
        idle = ["filter", "score_frames", "video_score"]
        ranges.refuse_idle(settings, idle, "steered is 0")
    known: dict[str, tuple[str, ...]] = {}
    for prompt in read(Path(settings.prompts)):
        known.setdefault(prompt.text, prompt.references)
    defaults = tiny.call_defaults(settings.model) if settings.model in tiny.NAMES else {}
    return Plan(
        prompts=tuple(known),
        references=tuple(known.values()) if any(known.values()) else (),
        images=settings.images,
        steered=settings.steered,
        settings=drawing.filter_of(settings.filter),
        seed=settings.seed,
        prompts_per_shard=settings.prompts_per_shard,
        max_batch=settings.max_batch,
        call=drawing.call_of(settings.call, defaults),
        score_frames=settings.score_frames,
        video_score=settings.video_score,
    )


def run(settings: Rollout) -> None:
    """Check everything, then generate this process's shards."""
    plan, settings = plan_of(settings), loading.resolved(settings)
    out, lora = Path(settings.out), digests.of_weights(settings.lora)
    noted = len(list(out.glob(f"*/{NOTE}"))) == len(plan.shards()) or not settings.follow
    asked = settings.model, lora, settings.quantize
    if settings.resume and noted and is_complete(out, plan, settings.reward, *asked):
        started.say("the run is already complete")
        if is_main():
            print(out)
        return
    processes = join("auto")
    pipe, reward, preview = processes.agree(lambda: ready(settings, plan, processes.device))
    again = settings.resume
    processes.told(lambda: open_run(out, pipe, plan, settings.reward, again, *asked))
    with tqdm(unit="image", disable=not processes.is_main) as bar:

        def drawn(done: float, total: int) -> None:
            bar.total, bar.n = total, int(done)
            bar.refresh()

        rank, world = processes.index, processes.count
        follow, offload = settings.follow, settings.offload
        renewed = partial(renew, pipe, Path(follow), offload) if follow else None
        for _ in generate(out, pipe, plan, reward, rank, world, preview, drawn, renewed):
            pass
    processes.finish()
    if processes.is_main:
        print(out)


def renew(pipe: Any, run: Path, offload: str = "none") -> dict[str, Any]:
    """Load the last LoRA that a training run saved, and return its step and its digest."""
    step, folder = newest(run)
    if folder:
        with offloading.apart(pipe, offload):
            unload_lora(pipe)
            load_lora(pipe, str(folder))
    return {"step": step, "lora": digests.of_weights(str(folder)) if folder else None}


def ready(settings: Rollout, plan: Plan, device: torch.device | None) -> tuple[Any, Any, Any]:
    """Return the pipeline, the reward and the preview decoder, checked with the plan."""
    device = device or loading.pick_device("auto")
    loading.check_trainable(settings.model)
    started.say(f"loading {settings.model}")
    reward = rewards.load(settings.reward, device, True) if settings.reward else None
    if reward:
        reward.check(plan.prompts)
    dtype = loading.DTYPES[settings.dtype]
    pipe = loading.load_pipeline(settings.model, dtype, settings.lora, settings.quantize)
    pipe = offloading.place(pipe, device, settings.offload)
    pipe.set_progress_bar_config(disable=True)
    preview = loading.load_preview("auto", settings.model, dtype)
    preview = preview and preview.to(device)
    check(pipe, plan, reward, preview)
    return pipe, reward, preview


def main(argv: Sequence[str]) -> int:
    """Return the exit status of `exit_status.of_run`."""
    return exit_status.of_run(OPTIONS, argv, run, "finished shards are kept", "*/shard.json")
