"""Fine-tune a model on its own samples by Flow-GRPO or DiffusionNFT, into a LoRA.

    python scripts/train_adversarial.py prompts=prompts.txt out=runs/grpo reward=ocr
    python scripts/train_adversarial.py prompts=prompts.txt out=runs/style \
      references=pictures reward="0.5*ocr"
    python scripts/train_adversarial.py prompts=prompts.txt out=runs/alike \
      references=pictures critic_weight=0 reward="ocr + 0.5*dino(mode=hybrid)"

The reward is fixed, or a critic that learns to tell references from samples (Adv-GRPO), or both.
References serve the critic, and whatever in reward= compares with some; each prompt has a fixed
few of them there. With critic_weight=0 there is no critic.

Settings come from a YAML file, if one is named first, and from key=value words. A run that was cut
off goes on from its last checkpoint when the command is repeated with resume=true. What is made in
out= is what train_gdro.py makes.
"""

from __future__ import annotations

from tilt import started

# isort: split
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

import rewards
from finetune import grpo, models, nft, references
from finetune.adversarial import Adversary, likened
from finetune.chains import schedule_of
from finetune.critics import Critic, CriticSettings
from finetune.grpo import Grpo
from finetune.models import encode, encode_negative, family_of, noising_of
from finetune.nft import Nft
from finetune.online import Task
from finetune.ranges import FLAG, KEYWORDS, NAME, TEXT, Range, group, number, one_of, whole
from finetune.state import check_out, finish
from rewards.models.critic import KINDS
from scripts import command, idle, training
from steering import tiny
from steering.manifest import fingerprint
from tilt import loading


@dataclass
class Train(training.Run):
    """A training run."""

    prompts: str = ""
    reward: str = ""
    references: str = ""
    paired: bool = False
    critic_weight: float = 1.0
    critic_kind: str = "features"
    tower: str = "tiny"
    critic_layers: int = 2
    critic_from: str = ""
    negative_prompt: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    method: str = "grpo"
    grpo: Grpo = field(default_factory=Grpo)
    nft: Nft = field(default_factory=Nft)
    critic: CriticSettings = field(default_factory=CriticSettings)

    RANGES: ClassVar[dict[str, Range]] = training.Run.RANGES | {
        "prompts": TEXT,
        "reward": TEXT,
        "references": TEXT,
        "paired": FLAG,
        "critic_weight": number(0),
        "critic_kind": one_of(*KINDS),
        "tower": NAME,
        "critic_layers": whole(1),
        "critic_from": TEXT,
        "negative_prompt": TEXT,
        "call": KEYWORDS,
        "method": one_of("grpo", "nft"),
        "grpo": group(Grpo),
        "nft": group(Nft),
        "critic": group(CriticSettings),
    }

    @property
    def tuned(self) -> Any:
        """The settings of the method that is taken."""
        return getattr(self, self.method)


# what samples take of the pipeline's call; the rest of it is the trainer's own
CALL = ("height", "width", "max_sequence_length", "clip_skip")
CALL += ("original_size", "target_size", "crops_coords_top_left")
METHODS = {"grpo": (grpo.Trainer, "Flow-GRPO"), "nft": (nft.Trainer, "DiffusionNFT")}

NOTES = training.notes("grpo") | {
    "model": "hub id, folder, tiny-sd3 or tiny-sd; by default tiny-sd3",
    "method": "grpo (policy gradients, Flow-GRPO) or nft (regression, DiffusionNFT)",
    "prompts": "a file, one prompt a line, or .jsonl",
    "reward": "what samples are scored by, as in 'ocr + 0*clip'",
    "references": "a folder of pictures, a .json {prompt: [files]} or a data set: for a critic, "
    "and for rewards that compare, as 'ocr + 0.5*dino(mode=hybrid)'",
    "paired": "references belong to prompts, as a preference needs; false: they are of one style",
    "critic_weight": "of the critic's score beside the reward; 0: no critic",
    "critic_kind": "features: a head on a frozen DINO; preference: the last layers of a CLIP",
    "tower": "that DINO, or that CLIP: tiny, a hub id or a folder",
    "critic_layers": "how many layers of a preference's image tower are trained",
    "critic_from": "a folder of a critic to begin with, whose kind and tower it keeps",
    "negative_prompt": "of guidance",
    "call": "keywords of the pipeline's call that say what is drawn, as in call.height=512",
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
    "grpo.guidance_scale": "of sampling, and of what is differentiated; by default none, or what "
    "the pipeline tells a distilled network (FLUX.1-dev)",
    "grpo.clip": "of the ratio, of densities per element",
    "grpo.advantage_clip": "advantages are cut to it",
    "grpo.spread": "what advantages are divided by: the deviation of the group, global, or none",
    "grpo.each_reward": "normalise each reward by itself before adding them",
    "grpo.kl": "weight of the divergence from the reference",
    "nft.noisings": "noised copies of an image in an update, each at a time of its own",
    "nft.guidance_scale": "of sampling; what is trained is the conditional prediction; by default "
    "as grpo.guidance_scale",
    "nft.beta": "how far the good and the bad policy lie from the one that sampled",
    "nft.old_decay": "the one that samples is an average of those before; its highest decay",
    "nft.times": "logit_normal or uniform",
    "nft.shift": "above 1 times lean to noise, where a picture's content is settled",
    "critic.lr": "of the critic's Adam; 5e-6 is usual for a preference",
    "critic.loss": "hinge, bce or pairwise; by default pairwise for a preference, else hinge",
    "critic.patches": "drawn of each picture at each step",
    "critic.patch_weight": "of their loss beside the whole picture's",
    "critic.smoothing": "the share of labels taken to be wrong",
    "critic.r1": "factor of the gradient penalty at the references",
    "critic.spectral": "the largest singular value of a layer; 0: any",
    "critic.replay": "how many older samples of all processes are kept",
    "critic.replay_share": "how many of them are added to a step, as a share of its samples",
    "critic.trigger": "when it learns: always, every_n, when_fooled or acc_below",
    "critic.every": "the n of every_n",
    "critic.below": "the accuracy of acc_below",
}
COMMON = ("steps", "groups", "k", "micro_groups", "updates", "num_inference_steps")
COMMON += ("advantage_clip", "spread", "each_reward", "kl")
NOTES |= training.notes("nft")
NOTES |= {f"nft.{name}": NOTES[f"grpo.{name}"] for name in COMMON}


def run(settings: Train) -> None:
    """Check everything, then train."""
    if not (settings.prompts and settings.out and (settings.reward or settings.references)):
        raise ValueError("set prompts=FILE, out=FOLDER and reward=SPEC, or references=, or both")
    idle.of_adversarial(settings)
    settings = command.resolved(settings)
    name, out, tuned = settings.model or "tiny-sd3", Path(settings.out), settings.tuned
    check_out(settings, ignore=METHODS.keys() - {settings.method})
    check_call(settings)
    prompts = command.prompts_of(settings.prompts)
    made_of = command.made_of(settings, settings.reward, **contents(settings, prompts))
    if training.finished(settings, tuned.steps, made_of):
        training.show(settings)
        return
    defaults = tiny.call_defaults(name) if name in tiny.NAMES else {}
    stated = {k: v for k, v in (defaults | settings.call).items() if k != "guidance_scale"}
    accelerator = training.accelerator_of(settings)
    fixed = rewards.load(settings.reward, accelerator.device, True) if settings.reward else None
    if fixed:
        fixed.check(prompts)
        if not (settings.references and settings.critic_weight):
            training.check_weights(fixed)
    load = partial(loading.load_pipeline, name, loading.DTYPES[settings.dtype])
    watch = training.watch_of(
        settings, prompts, settings.reward, stated, load, accelerator, own=True
    )
    check_references(settings, fixed, watch)
    started.say(f"loading {name}")
    pipe = load()
    guided = guidance_of(settings, pipe)
    if watch and not settings.check.call:
        negative = {"negative_prompt": settings.negative_prompt} if settings.negative_prompt else {}
        watch = replace(watch, call=stated | guided | negative)
    call = stated | guided | {"num_inference_steps": tuned.num_inference_steps}
    training.check_keywords(pipe, watch, prompts, call)
    weighed = made_of | {"model": fingerprint(getattr(pipe, family_of(pipe).network))}
    trainer, score = trainer_of(settings, pipe, prompts, call, fixed, accelerator)
    training.begin(trainer, settings, tuned, weighed)
    training.loop(trainer, tuned.steps, settings, watch, ("reward", "grad_norm"), weighed)
    about = [
        f"{command.counted(len(prompts), 'prompt')}, {tuned.k} images of {tuned.groups} of them an "
        f"epoch, call {json.dumps(call)}",
        f"rewards: `{settings.reward or 'none but the critic'}`",
    ]
    if trainer.samples.dropped:
        counts = f"{trainer.samples.dropped} of {trainer.samples.drawn}"
        about.append(f"{counts} images were left out: their reward is not a finite number")
        if accelerator.is_main_process:
            print(about[-1])
    if settings.references:
        about.append(f"references: {settings.references}")
    if isinstance(score, Adversary):
        if accelerator.is_main_process:
            score.critic.save(out / "critic")
        about.append(f"a critic of {len(score.references)} pictures, in {out / 'critic'}")
    title = METHODS[settings.method][1]
    file = training.export(trainer, type(pipe), settings, about, name, title)
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(file.parent, tuned.steps, made_of)
        print(file)


def contents(settings: Train, prompts: list[str]) -> dict[str, str]:
    """Digests of the files that are this script's own, by setting."""
    found = {"prompts": command.digest_of(prompts)}
    if settings.reward:
        found["reward"] = rewards.identity(settings.reward)
    if settings.references:
        found["references"] = references.digest(settings.references, paired=settings.paired)
    if settings.critic_from:
        found["critic_from"] = command.digest(settings.critic_from) or ""
    return found


def trainer_of(
    settings: Train,
    pipe: Any,
    prompts: list[str],
    call: dict[str, Any],
    fixed: Any,
    accelerator: Any,
) -> tuple[Any, Any]:
    """The trainer of the method that is taken, and what scores its samples.

    The pipeline loses its text encoders, whose work is done here; of the rest the decoder goes to
    the device here, the network as the trainer prepares it.
    """
    family, device = family_of(pipe), accelerator.device
    given, empty, encoded = conditioning_of(settings, pipe, prompts, call, device)
    schedule = schedule_of(pipe, noising_of(pipe), prompts[0], encoded, **call)
    pipe.vae.to(device)
    with torch.no_grad():  # a picture's size
        height, width = models.decode(
            pipe, torch.zeros(1, *schedule.shape, device=device), call
        ).shape[2:]
    score, weights = reward_of(settings, fixed, prompts, (height, width), accelerator)
    decode = torch.no_grad()(lambda latents: _eight_bits(models.decode(pipe, latents, call)))
    task = Task(schedule, prompts, given, decode, score, weights, empty)
    network, kind = getattr(pipe, family.network), METHODS[settings.method][0]
    return kind(network, family, task, settings.tuned, accelerator), score


def conditioning_of(
    settings: Train, pipe: Any, prompts: list[str], call: dict[str, Any], device: torch.device
) -> tuple[models.Conditioning, models.Conditioning | None, Any]:
    """That of all prompts, on the CPU, of the negative one, and the encoders' output for one.

    The encoders are on the device for this alone, before the network is, and then gone.
    """
    encoders = [name for name in pipe.components if name.startswith("text_encoder")]
    for name in encoders:
        if getattr(pipe, name) is not None:
            getattr(pipe, name).to(device)
    call = call | {"device": device}
    parts = [encode(pipe, prompts[i : i + 16], **call) for i in range(0, len(prompts), 16)]
    given = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    guided = call.get("guidance_scale", 1.0) > 1 and "guidance" not in given
    if settings.negative_prompt and not guided:
        raise ValueError(
            f"negative_prompt is {settings.negative_prompt!r} but serves nothing without "
            f"guidance; set {settings.method}.guidance_scale above 1, or leave it out"
        )
    empty = encode_negative(pipe, settings.negative_prompt, **call) if guided else None
    with torch.no_grad():
        encoded = models.encoded(pipe, prompts[:1], call)
    for part in pipe.components:
        if part.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, part, None)
    return given, empty, encoded


def check_call(settings: Train) -> None:
    """ValueError for keywords of the pipeline's call that samples would not follow."""
    own = {name: f"{settings.method}.{name}" for name in ("guidance_scale", "num_inference_steps")}
    own |= {"negative_prompt": "negative_prompt"}
    for name in settings.call:
        if name in own:
            raise ValueError(f"call.{name} says nothing to training; set {own[name]}= instead")
        if name not in CALL:
            raise ValueError(f"call.{name} says nothing to training, which takes {list(CALL)}")


def guidance_of(settings: Train, pipe: Any) -> dict[str, float]:
    """What the call is told of guidance: as set, else none, or a distilled network's own."""
    scale = settings.tuned.guidance_scale
    if scale is None and models.distilled(pipe):
        return {}
    return {"guidance_scale": 1.0 if scale is None else scale}


def check_references(settings: Train, fixed: Any, watch: Any) -> None:
    """ValueError where references are missing, or would serve nothing."""
    compares = fixed is not None and fixed.wants_references
    if compares and not settings.references:
        raise ValueError(
            f"the reward {settings.reward} compares with references; set references=, or say "
            "wants_references = False in a reward of your own"
        )
    learns = bool(settings.references and settings.critic_weight)
    if settings.references and not (compares or learns):
        raise ValueError(
            f"references={settings.references} serve nothing: critic_weight is 0, and reward= "
            "compares with none; leave them out"
        )
    if watch and any(reward.wants_references for reward in watch.rewards.values()):
        raise ValueError(
            "checks have no references to compare with; set check.reward=, and check.quality= if "
            "it is wanted, to rewards that need none"
        )


def reward_of(
    settings: Train, fixed: Any, prompts: list[str], size: tuple[int, int], accelerator: Any
) -> tuple[Any, dict[str, float]]:
    """What scores samples, and the weight of each component."""
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
        raise ValueError("reward= has a 'critic' beside the one that learns; name it, old=critic()")
    critic = Critic(model, settings.critic, accelerator)
    found = Adversary(critic, likes, settings.critic_weight, judge, seed, rank)
    return found, weights | {"critic": settings.critic_weight}


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    """As they will be saved, and as references are: a critic could learn the difference."""
    return (images * 255).round() / 255


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status as `command.finish`."""
    words = sys.argv[1:] if argv is None else argv
    settings = partial(command.settings_of, words, Train, NOTES, __doc__)
    return command.finish(
        "train_adversarial.py", settings, run, "the last checkpoint is kept", "state.pt"
    )


if __name__ == "__main__":
    sys.exit(started.run(main))
