"""Train a critic on stored rollouts and reference images: offline adversarial training.

Rounds of this training need no stochastic sampler. A share of the prompts is held out, and the
critic's accuracy on their samples is logged. Unpaired references have no prompt, so none is held
out, and this accuracy does not show whether the critic has memorized them.

It uses one process. To resume an interrupted run from its last checkpoint, repeat the command with
--resume. The folder --out gets critic.json and critic.safetensors (loaded by `critic(out)`),
log.csv, settings.yaml and state.pt (for --resume).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from finetune import checks, config, references
from finetune.critics import Critic, CriticSettings, accuracy
from finetune.learner import draws
from finetune.ranges import (
    FLAG,
    NAME,
    SEED,
    TEXT,
    TEXTS,
    check,
    number,
    one_of,
    part,
    setting,
    whole,
)
from finetune.references import References
from finetune.shards import Rollouts
from finetune.state import (
    FILE,
    FINISHED,
    check_out,
    finish,
    is_finished,
    load_state,
    save_state,
)
from rewards.images import to_images
from rewards.models.critic import KINDS
from tilt import exit_status, idle_settings, started, training
from tilt.loading import pick_device
from tilt.options import Options

Sample = tuple[str, bytes]  # a prompt and a PNG


@dataclass
class TrainCritic:
    """The settings of a critic's training."""

    rollouts: list[str] = setting(
        list,
        TEXTS,
        "folders of `tilt rollout`; give earlier ones, too, to keep their samples",
    )
    references: str = setting("", TEXT, "folder of images, .json {prompt: [files]} or a data set")
    out: str = setting("", TEXT, "output folder")
    paired: bool = setting(
        False,
        FLAG,
        "references belong to prompts, as a preference critic requires; else they share a style",
    )
    kind: str = setting(
        "features",
        one_of(*KINDS),
        "features: a head on a frozen DINO; preference: the last layers of a CLIP",
    )
    tower: str = setting("tiny", NAME, "DINO or CLIP of the critic: tiny, a hub id or a folder")
    critic_from: str = setting(
        "", TEXT, "folder of an initial critic, which determines kind and tower"
    )
    held_out: float = setting(
        0.1, number(0, 1, "[)"), "fraction of prompts that are not trained on; 0: none"
    )
    steps: int = setting(300, whole(1), "number of updates")
    batch: int = setting(16, whole(1), "samples per step, each with a reference")
    seed: int = setting(0, SEED, "seed of all random numbers")
    save_every: int = setting(50, whole(1), "steps between checkpoints")
    log_every: int = setting(50, whole(1), "steps between lines of the log")
    resume: bool = setting(
        False,
        FLAG,
        "continue from the last checkpoint; steps may be higher, save_every, log_every may differ",
    )
    critic: CriticSettings = part(CriticSettings, "critic")

    def __post_init__(self) -> None:
        check(self)


EXAMPLES = """\
examples:
  tilt train critic --rollouts runs/a --references pictures --out runs/critic
  tilt score runs/a --reward "objects + 0.1*critic(runs/critic)"
  tilt train gdro --rollouts runs/a --out runs/tuned
  tilt rollout --prompts prompts.txt --out runs/b --lora runs/tuned/lora
  tilt train critic --rollouts runs/a runs/b --references pictures \\
    --out runs/critic2 --critic-from runs/critic
"""
OPTIONS = Options("tilt train critic", TrainCritic, __doc__ or "", EXAMPLES)


def run(settings: TrainCritic) -> None:
    """Check everything, then train."""
    if not (settings.rollouts and settings.references and settings.out):
        raise ValueError("set rollouts=FOLDER, references=PICTURES and out=FOLDER")
    idle_settings.check_critic(settings, "kind")
    out = Path(settings.out)
    check_out(settings)
    samples, size = read_samples(settings.rollouts)
    seen, unseen = split(samples, settings.held_out, settings.seed)
    made_of = {
        "rollouts": digest(samples),
        "references": references.digest(settings.references, paired=settings.paired),
    }
    s, begun = settings, (out / FILE).exists()
    if s.resume and begun and is_finished(out, s.steps, made_of):
        show(out, bool(unseen))
        return
    source, device = s.out if begun else s.critic_from, pick_device("auto")
    started.say(f"loading the critic, with its tower {s.tower}")
    model = training.critic_of(source, s.kind, s.tower, s.paired, s.seed, device)
    critic = Critic(model, settings.critic)
    likes = references.load_references(s.references, size, paired=s.paired)
    likes.check([prompt for prompt, _ in samples])
    if s.resume:
        load_state(critic, out, made_of, s.steps)
    config.write(s, out / "settings.yaml")
    checks.rewind(out / "log.csv", critic.step)
    (out / FINISHED).unlink(missing_ok=True)  # may be of fewer steps
    loop(critic, likes, seen, unseen, s, made_of)
    finish(out, s.steps, made_of)
    show(out, bool(unseen))


def show(out: Path, held_out: bool) -> None:
    """Print the critic's final accuracy."""
    for row in checks.read(out / "log.csv")[-1:]:
        told = f"held-out accuracy {row['held_out_accuracy']:.3f}, " if held_out else ""
        print(f"{told}training accuracy {row['accuracy']:.3f}: {out}")


def read_samples(folders: Sequence[str]) -> tuple[list[Sample], tuple[int, int]]:
    """Return all samples of the runs, and their (h, w); ValueError if their sizes differ."""
    samples: list[Sample] = []
    sizes: dict[str, tuple[int, int]] = {}
    for folder in folders:
        for shard in Rollouts(Path(folder)).shards:
            if shard.num_frames():
                raise ValueError(
                    f"{folder} holds videos; a critic learns from images: leave it out"
                )
            rows = shard.table(["prompt", "image"])
            samples += [(row["prompt"], row["image"]["bytes"]) for row in rows]
        with Image.open(io.BytesIO(samples[-1][1])) as picture:
            sizes[folder] = picture.height, picture.width
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rollouts must have one size (h, w) but have {sizes}; leave some out")
    return samples, sizes[folders[0]]


def digest(samples: Sequence[Sample]) -> str:
    """Return a digest of the samples, which does not depend on their order."""
    every = sorted(hashlib.sha256(f"{p}\n".encode() + png).hexdigest() for p, png in samples)
    return hashlib.sha256("".join(every).encode()).hexdigest()


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return samples of the prompts that are trained on, and of held-out prompts.

    The choice depends on the seed and the prompt's text, so it is mostly the same in later rounds.
    """
    prompts = {prompt for prompt, _ in samples}
    order = sorted(prompts, key=lambda p: draws(seed, 0, f"held out {p}").initial_seed())
    count = max(1, round(share * len(order))) if share else 0
    if count == len(order):
        raise ValueError(
            f"held_out={share} leaves none of {len(order)} prompts to train on; set held_out=0, "
            "or give rollouts of more prompts"
        )
    left_out = set(order[:count])
    return [s for s in samples if s[0] not in left_out], [s for s in samples if s[0] in left_out]


def loop(
    critic: Critic,
    references: References,
    seen: list[Sample],
    unseen: list[Sample],
    s: TrainCritic,
    made_of: Mapping[str, str],
) -> None:
    """Take the remaining steps, with logging and checkpoints."""
    out = Path(s.out)
    recent: list[dict[str, float]] = []
    for step in tqdm(range(critic.step, s.steps), initial=critic.step, total=s.steps):
        generator = draws(s.seed, step, "samples")
        rows = torch.randperm(len(seen), generator=generator)[: s.batch].tolist()
        real, fake, prompts = beside([seen[row] for row in rows], references, generator)
        recent.append(critic.train_step(real, fake, prompts, generator))
        done = step + 1
        if done % s.log_every == 0 or done == s.steps:
            means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            held_out = look(critic, references, unseen, s) if unseen else {}
            checks.append(out / "log.csv", {"step": done} | means | held_out)
            recent.clear()
        if done % s.save_every == 0 or done == s.steps:
            critic.save(out)
            save_state(critic, out, made_of=made_of)


def beside(samples: Sequence[Sample], references: References, generator: torch.Generator) -> Any:
    """Return references and samples, each (n, 3, h, w), and their prompts."""
    prompts = [prompt for prompt, _ in samples]
    fake = to_images([Image.open(io.BytesIO(png)) for _, png in samples])
    return references.draw(prompts, generator), fake, prompts


@torch.no_grad()
def look(
    critic: Critic, references: References, samples: list[Sample], s: TrainCritic
) -> dict[str, float]:
    """Return the critic's accuracy and margin on held-out samples, with fixed references."""
    generator, reward, scores = draws(s.seed, 0, "held out"), critic.reward, []
    for i in range(0, len(samples), s.batch):
        real, fake, prompts = beside(samples[i : i + s.batch], references, generator)
        scores.append(torch.stack([reward(real, prompts), reward(fake, prompts)]))
    real, fake = torch.cat(scores, 1)
    right = accuracy(real, fake, paired=reward.paired)
    return {"held_out_accuracy": float(right), "held_out_margin": float((real - fake).mean())}


def main(argv: Sequence[str]) -> int:
    """Return the exit status of `exit_status.of_run`."""
    return exit_status.of_run(OPTIONS, argv, run, "the last checkpoint is kept", "state.pt")
