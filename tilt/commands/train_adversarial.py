"""Fine-tune a LoRA on the model's own samples with Flow-GRPO, DiffusionNFT or AWM.

The reward is fixed, or a critic that learns to distinguish references from samples (Adv-GRPO), or
both. References are used by the critic, and by rewards in --reward that compare with references,
which get a fixed few of them for each prompt. With --critic-weight 0 there is no critic.

To resume an interrupted run from its last checkpoint, repeat the command with --resume. The folder
--out gets the same files as with `tilt train gdro`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rewards
from finetune import grpo, nft, references
from finetune.adversarial import Adversary, likened
from finetune.awm import Awm
from finetune.chains import schedule_of
from finetune.critics import Critic, CriticSettings
from finetune.decoding import decoder_of
from finetune.grpo import Grpo
from finetune.network import Model, part_of
from finetune.nft import Nft
from finetune.noising import noising_of
from finetune.online import Samples, Task, check_guidance
from finetune.ranges import FLAG, KEYWORDS, NAME, TEXT, number, one_of, part, setting, whole
from finetune.recording import Recorder
from finetune.state import check_out, finish
from rewards.models.critic import KINDS
from steering import tiny
from steering.call import refuse_videos
from steering.manifest import fingerprint
from tilt import digests, exit_status, idle_settings, loading, offloading, started, training
from tilt.conditioning import check_call, conditioning_of, recorder_of
from tilt.options import Options
from tilt.prompts import read_texts
from tilt.wording import counted


@dataclass
class TrainAdversarial(training.TrainingRun):
    """The settings of an online training."""

    prompts: str = setting("", TEXT, "file of prompts: one per line, or .jsonl")
    reward: str = setting("", TEXT, "reward that scores the samples, as in 'ocr + 0*clip'")
    references: str = setting(
        "",
        TEXT,
        "folder of images, .json {prompt: [files]} or a data set, for the critic and for rewards "
        "that compare with references, such as 'ocr + 0.5*dino(mode=hybrid)'",
    )
    paired: bool = setting(
        False,
        FLAG,
        "references belong to prompts, as a preference critic requires; else they share a style",
    )
    critic_weight: float = setting(
        1.0, number(0), "weight of the critic's score, added to the reward; 0: no critic"
    )
    critic_kind: str = setting(
        "features",
        one_of(*KINDS),
        "features: a head on a frozen DINO; preference: the last layers of a CLIP",
    )
    tower: str = setting("tiny", NAME, "DINO or CLIP of the critic: tiny, a hub id or a folder")
    critic_layers: int = setting(
        2, whole(1), "number of trained layers of a preference critic's image tower"
    )
    critic_from: str = setting(
        "", TEXT, "folder of an initial critic, which determines kind and tower"
    )
    negative_prompt: str = setting("", TEXT, "negative prompt of guidance")
    call: dict[str, Any] = setting(
        dict,
        KEYWORDS,
        "keywords of the pipeline's call for sampling, as in --call.height 512",
    )
    method: str = setting(
        "grpo",
        one_of("grpo", "nft", "awm"),
        "grpo (policy gradients, Flow-GRPO), nft (regression, DiffusionNFT) or awm (advantage "
        "weighted matching)",
    )
    grpo: Grpo = part(Grpo, "Flow-GRPO")
    nft: Nft = part(Nft, "DiffusionNFT")
    awm: Awm = part(Awm, "advantage weighted matching")
    critic: CriticSettings = part(CriticSettings, "critic")

    @property
    def tuned(self) -> Any:
        """The settings of the chosen method."""
        return getattr(self, self.method)


EXAMPLES = """\
examples:
  tilt train adversarial --prompts prompts.txt --out runs/grpo --reward ocr
  tilt train adversarial --prompts prompts.txt --out runs/style \\
    --references pictures --reward "0.5*ocr"
  tilt train adversarial --prompts prompts.txt --out runs/alike \\
    --references pictures --critic-weight 0 --reward "ocr + 0.5*dino(mode=hybrid)"
"""
OPTIONS = Options("tilt train adversarial", TrainAdversarial, __doc__ or "", EXAMPLES)


METHODS = {
    "grpo": (grpo.GrpoTrainer, "Flow-GRPO"),
    "nft": (nft.NftTrainer, "DiffusionNFT"),
    "awm": (nft.NftTrainer, "AWM"),
}


def run(settings: TrainAdversarial) -> None:
    """Check everything, then train."""
    if not (settings.prompts and settings.out and (settings.reward or settings.references)):
        raise ValueError("set prompts=FILE, out=FOLDER and reward=SPEC, or references=, or both")
    idle_settings.check_adversarial(settings)
    settings = loading.resolved(settings)
    name, out, tuned = settings.model or "tiny-sd3", Path(settings.out), settings.tuned
    check_out(settings, ignore=METHODS.keys() - {settings.method})
    check_call(settings)
    prompts = read_texts(settings.prompts)
    made_of = digests.of_run(settings, settings.reward, **contents(settings, prompts))
    if training.finished(settings, tuned.steps, made_of):
        training.show(settings)
        return
    defaults = tiny.call_defaults(name) if name in tiny.NAMES else {}
    stated = {k: v for k, v in (defaults | settings.call).items() if k != "guidance_scale"}
    accelerator = training.accelerator_of(settings)
    training.refuse_reading_once(accelerator)
    fixed = rewards.load(settings.reward, accelerator.device, True) if settings.reward else None
    if fixed:
        fixed.check(prompts)
        if not (settings.references and settings.critic_weight):
            training.check_weights(fixed)
    load = training.loader_of(settings, name)
    watch = training.watch_of(
        settings, prompts, settings.reward, stated, load, accelerator, own=True
    )
    check_references(settings, fixed, watch)
    if kind := loading.check_trainable(name):
        refuse_videos(kind, stated)
    started.say(f"loading {name}")
    pipe = load()
    if settings.method == "grpo":
        grpo.check_flow(settings.grpo, noising_of(pipe))
    steps = {"num_inference_steps": tuned.num_inference_steps}
    training.check_keywords(pipe, watch, prompts, stated | steps)
    recorder = recorder_of(settings, pipe, stated | steps, accelerator.device)
    if watch and not settings.check.call:
        watch = replace(watch, call=recorder.call | stated)
    weighed = made_of | {"model": fingerprint(getattr(pipe, part_of(pipe)))}
    trainer, score = trainer_of(settings, pipe, recorder, prompts, fixed, accelerator)
    training.begin(trainer, settings, tuned, weighed)
    title = METHODS[settings.method][1]
    about = partial(made_from, settings, prompts, recorder.call, trainer.samples, score)
    result = training.Result(type(pipe), name, title, about)
    training.loop(trainer, tuned.steps, settings, watch, ("reward", "grad_norm"), weighed, result)
    if accelerator.is_main_process and isinstance(score, Adversary):
        score.critic.save(out / "critic")
    training.export(trainer, settings, result)
    accelerator.end_training()
    if accelerator.is_main_process:
        if trainer.samples.dropped:
            print(dropped(trainer.samples))
        finish(out / "lora", tuned.steps, made_of)
        training.show(settings)


def dropped(samples: Samples) -> str:
    """Return the number of images that were left out, in words."""
    counts = f"{samples.dropped} of {samples.drawn}"
    return f"{counts} images were left out: their reward is not a finite number"


def made_from(
    settings: TrainAdversarial,
    prompts: list[str],
    call: dict[str, Any],
    samples: Samples,
    score: Any,
) -> list[str]:
    """Return the model card's lines about the training data."""
    tuned = settings.tuned
    about = [
        f"{counted(len(prompts), 'prompt')}; {tuned.k} images for each of {tuned.groups} prompts "
        f"per epoch; call {json.dumps(call)}",
        f"rewards: `{settings.reward or 'only the critic'}`",
    ]
    about += [dropped(samples)] if samples.dropped else []
    about += [f"references: {settings.references}"] if settings.references else []
    if isinstance(score, Adversary):
        folder = Path(settings.out) / "critic"
        about.append(f"a critic trained on {len(score.references)} references, in {folder}")
    return about


def contents(settings: TrainAdversarial, prompts: list[str]) -> dict[str, str]:
    """Return digests of this command's input files, by setting."""
    found = {"prompts": digests.of_texts(prompts)}
    if settings.reward:
        found["reward"] = rewards.identity(settings.reward)
    if settings.references:
        found["references"] = references.digest(settings.references, paired=settings.paired)
    if settings.critic_from:
        found["critic_from"] = digests.of_weights(settings.critic_from) or ""
    return found


def trainer_of(
    settings: TrainAdversarial,
    pipe: Any,
    recorder: Recorder,
    prompts: list[str],
    fixed: Any,
    accelerator: Any,
) -> tuple[Any, Any]:
    """Return the trainer of the chosen method, and the function that scores its samples.

    What can be refused is refused before anything is written. The text encoders are used here and
    then removed from the pipeline. The network is moved to the device when the trainer prepares it.
    The conditioning is on disk.
    """
    model, device, tuned = Model(pipe), accelerator.device, settings.tuned
    first = recorder.record(prompts[:1]).to("cpu")
    check_guidance(tuned.guidance_scale, first.form)
    schedule = schedule_of(model, first)
    if settings.method == "grpo":
        grpo.check_window(tuned, schedule)
    offloading.place_part(pipe.vae, device, settings.offload)
    decode = decoder_of(model, pipe, first)
    height, width = decode(torch.zeros(1, *schedule.shape, device=device)).shape[2:]
    score, weights = reward_of(settings, fixed, prompts, (height, width), accelerator)
    folder = Path(settings.out) / ".conditioning"
    given, plain = conditioning_of(folder / "given", recorder, prompts, accelerator), None
    if recorder.guided and settings.method != "grpo":  # whose loss is of the network alone
        unguided = Recorder(pipe, recorder.call)
        plain = conditioning_of(folder / "plain", unguided, prompts, accelerator)
    for name in pipe.components:
        if name.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, name, None)
    eight_bits = lambda latents: _eight_bits(decode(latents))  # noqa: E731
    task = Task(schedule, prompts, given, eight_bits, score, weights, plain)
    network, kind = getattr(pipe, model.part), METHODS[settings.method][0]
    return kind(network, model, task, tuned, accelerator), score


def check_references(settings: TrainAdversarial, fixed: Any, watch: Any) -> None:
    """Raise ValueError if references are missing or would have no effect."""
    compares = fixed is not None and fixed.wants_references
    if compares and not settings.references:
        raise ValueError(
            f"the reward {settings.reward} compares with references; set references=, or set "
            "wants_references = False in your own reward"
        )
    learns = bool(settings.references and settings.critic_weight)
    if settings.references and not (compares or learns):
        raise ValueError(
            f"references={settings.references} has no effect: critic_weight is 0, and reward= "
            "does not compare with references; leave it out"
        )
    if watch and any(reward.wants_references for reward in watch.rewards.values()):
        raise ValueError(
            "checks have no references to compare with; set check.reward=, and check.quality= if "
            "used, to rewards without references"
        )


def reward_of(
    settings: TrainAdversarial,
    fixed: Any,
    prompts: list[str],
    size: tuple[int, int],
    accelerator: Any,
) -> tuple[Any, dict[str, float]]:
    """Return the function that scores samples, and the weight of each component."""
    weights = {part.name: part.weight for part in fixed.parts} if fixed else {}
    if not settings.references:
        return fixed.evaluate, weights
    s, device = settings, accelerator.device
    model = None
    if s.critic_weight:
        model = training.critic_of(
            s.critic_from,
            s.critic_kind,
            s.tower,
            s.paired,
            s.tuned.seed,
            device,
            s.critic_layers,
        )
    likes = references.load_references(settings.references, size, paired=settings.paired)
    likes.check(prompts)
    rank, seed = accelerator.process_index, settings.tuned.seed
    judge = fixed.evaluate if fixed else None
    if fixed and fixed.wants_references:
        judge = likened(fixed, likes, seed)
    if model is None:
        return judge, weights
    if "critic" in weights:
        raise ValueError("reward= has a 'critic' besides the trained one; name it, old=critic(...)")
    critic = Critic(model, settings.critic, accelerator)
    found = Adversary(critic, likes, settings.critic_weight, judge, seed, rank)
    return found, weights | {"critic": settings.critic_weight}


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits, as references are, since a critic could learn the difference."""
    return (images * 255).round() / 255


def main(argv: Sequence[str]) -> int:
    """Return the exit status of `exit_status.of_run`."""
    return exit_status.of_run(OPTIONS, argv, run, "the last checkpoint is kept", "state.pt")
