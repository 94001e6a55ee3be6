"""Fine-tune a model on its own samples by policy gradients (Flow-GRPO), into a LoRA.

    accelerate launch scripts/train_adversarial.py prompts=prompts.txt out=runs/grpo reward=ocr
    accelerate launch scripts/train_adversarial.py CONFIG.yaml prompts=... out=...

Settings come from a YAML file, if one is named first, and from key=value words. A run that was cut
off goes on from its last checkpoint when the command is repeated with resume=true. What is made in
out= is what train_gdro.py makes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rewards
from finetune import models
from finetune.chains import schedule_of
from finetune.grpo import Grpo, Trainer
from finetune.models import encode, encode_negative, family_of, noising_of
from scripts import training
from scripts.rollout import settings_of
from steering import loading, tiny
from steering.prompts import read


@dataclass
class Train(training.Run):
    """A training run."""

    prompts: str = ""
    reward: str = ""
    negative_prompt: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    grpo: Grpo = field(default_factory=Grpo)


NOTES = training.notes("grpo") | {
    "prompts": "a file, one prompt a line, or .jsonl",
    "reward": "what samples are scored by, as in 'ocr + 0*clip'",
    "negative_prompt": "of guidance",
    "call": "keywords of the pipeline's call, as in call.height=512",
    "grpo.steps": "epochs: sample, score, update",
    "grpo.groups": "prompts of an epoch, over all processes",
    "grpo.k": "images of a prompt",
    "grpo.micro_groups": "groups that a process evaluates at once",
    "grpo.updates": "moves of the optimiser on the same samples",
    "grpo.num_inference_steps": "steps of the sampler",
    "grpo.window_start": "the first step that draws noise and is learned from",
    "grpo.window_size": "how many do",
    "grpo.window_moves": "slide it on by a step an epoch (MixGRPO)",
    "grpo.noise": "of those steps: DDIM's eta, or the share of a flow's noise that is drawn afresh",
    "grpo.share_start": "a group's images branch off from one start, at the window",
    "grpo.guidance_scale": "of sampling, and of what is differentiated",
    "grpo.clip": "of the ratio, of densities per element",
    "grpo.advantage_clip": "advantages are cut to it",
    "grpo.spread": "what advantages are divided by: the deviation of the group, global, or none",
    "grpo.each_reward": "normalise each reward by itself before adding them",
    "grpo.kl": "weight of the divergence from the reference",
}


def run(settings: Train) -> None:
    """Check everything, then train."""
    if not (settings.prompts and settings.out and settings.reward):
        raise ValueError("set prompts=FILE, out=FOLDER and reward=SPEC")
    name, out, grpo = settings.model or "tiny-sd3", Path(settings.out), settings.grpo
    if (out / "state.pt").exists() and not settings.resume:
        raise ValueError(f"{out} holds a run; add resume=true, or give another out=")
    prompts = list(dict.fromkeys(prompt.text for prompt in read(Path(settings.prompts))))
    defaults = tiny.call_defaults(name) if name in tiny.NAMES else {}
    stated = defaults | settings.call | {"guidance_scale": grpo.guidance_scale}
    call = stated | {"num_inference_steps": grpo.num_inference_steps}
    accelerator = training.accelerator_of(settings)
    reward = rewards.load(settings.reward, accelerator.device)
    reward.check(prompts)
    dtype = loading.pick_dtype(settings.dtype, accelerator.device)
    load = partial(loading.load_pipeline, name, dtype)
    watch = training.watch_of(settings, prompts, reward.spec, stated, load, accelerator)
    pipe = load().to(accelerator.device)
    family = family_of(pipe)
    schedule = schedule_of(pipe, noising_of(pipe), prompts[0], **call)
    given = _encoded(pipe, prompts, call)
    guided = grpo.guidance_scale > 1 and "guidance" not in given
    empty = encode_negative(pipe, settings.negative_prompt, **call) if guided else None
    for part in pipe.components:
        if part.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, part, None)  # prompts are encoded; images still have to be decoded
    trainer = Trainer(
        getattr(pipe, family.network),
        family,
        schedule,
        prompts,
        given,
        torch.no_grad()(lambda latents: models.decode(pipe, latents, call)),
        lambda images, texts: reward.evaluate(images, texts),
        grpo,
        accelerator,
        {part.name: part.weight for part in reward.parts},
        empty,
    )
    training.begin(trainer, settings, grpo)
    training.loop(trainer, grpo.steps, settings, watch, ("reward", "grad_norm"))
    accelerator.end_training()
    if accelerator.is_main_process:
        about = [
            f"{len(prompts)} prompts, {grpo.k} images of {grpo.groups} of them an epoch, "
            f"call {json.dumps(call)}",
            f"rewards: `{reward.spec}`",
        ]
        print(training.export(trainer, type(pipe), settings, about, name))


def _encoded(pipe: Any, prompts: list[str], call: dict[str, Any]) -> models.Conditioning:
    parts = [encode(pipe, prompts[i : i + 16], **call) for i in range(0, len(prompts), 16)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status as `training.finish`."""
    words = sys.argv[1:] if argv is None else argv
    work = partial(settings_of, words, Train, NOTES, __doc__)
    return training.finish("train_adversarial.py", lambda: run(work()))


if __name__ == "__main__":
    sys.exit(main())
