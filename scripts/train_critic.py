"""Fit a critic on stored rollouts, against reference pictures: adversarial training, offline.

    python scripts/train_critic.py rollouts=runs/a references=pictures out=runs/critic
    python scripts/score.py runs/a --reward "objects + 0.1*critic(runs/critic)"
    python scripts/train_gdro.py rollouts=runs/a out=runs/tuned
    python scripts/rollout.py prompts=prompts.txt out=runs/b lora=runs/tuned/lora
    python scripts/train_critic.py "rollouts=[runs/a,runs/b]" references=pictures \\
      out=runs/critic2 critic_from=runs/critic

Rounds of these need no stochastic sampler. A share of the prompts is not trained on, and the
critic's accuracy on their samples is logged. Unpaired references have no prompt and are all
trained on, so that it does not tell whether a critic knows them by heart.

Settings come from a YAML file, if one is named first, and from key=value words. A run that was cut
off goes on from its last checkpoint when the command is repeated with resume=true. One process.

Made in out=: critic.json and critic.safetensors (what `critic(out)` scores with), log.csv,
settings.yaml, state.pt (for resume=true).
"""

from __future__ import annotations

from tilt import started

# isort: split
import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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
    Range,
    check,
    group,
    number,
    one_of,
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
from scripts import command, idle, train_adversarial, training
from tilt.loading import pick_device

Sample = tuple[str, bytes]  # a prompt and a PNG


def _are_folders(value: Any) -> bool:
    return TEXT.allows(value) or (TEXTS.allows(value) and bool(value))


@dataclass
class Train:
    """A fit of a critic."""

    rollouts: Any = ""
    references: str = ""
    out: str = ""
    paired: bool = False
    kind: str = "features"
    tower: str = "tiny"
    critic_from: str = ""
    held_out: float = 0.1
    steps: int = 300
    batch: int = 16
    seed: int = 0
    save_every: int = 50
    log_every: int = 50
    resume: bool = False
    critic: CriticSettings = field(default_factory=CriticSettings)

    RANGES: ClassVar[dict[str, Range]] = {
        "rollouts": Range("a folder, or a list of folders", _are_folders),
        "references": TEXT,
        "out": TEXT,
        "paired": FLAG,
        "kind": one_of(*KINDS),
        "tower": NAME,
        "critic_from": TEXT,
        "held_out": number(0, 1, "[)"),
        "steps": whole(1),
        "batch": whole(1),
        "seed": SEED,
        "save_every": whole(1),
        "log_every": whole(1),
        "resume": FLAG,
        "critic": group(CriticSettings),
    }

    def __post_init__(self) -> None:
        check(self, self.RANGES)


SHARED = ("out", "paired", "tower", "critic_from", "save_every", "log_every")
THEIRS = train_adversarial.NOTES
NOTES = {k: note for k, note in THEIRS.items() if k in SHARED or k.startswith("critic.")} | {
    "rollouts": "a run of scripts/rollout.py, or several, [a,b], that older samples stay in",
    "references": "a folder of pictures, a .json {prompt: [files]} or a data set",
    "kind": THEIRS["critic_kind"],
    "held_out": "the share of prompts that are not trained on; 0: none",
    "steps": "updates",
    "batch": "samples of a step, with a reference each",
    "seed": "of everything",
    "resume": "carry on from the last checkpoint, further if steps= is higher; save_every and "
    "log_every may differ, too",
}


def run(settings: Train) -> None:
    """Check everything, then train."""
    if not (settings.rollouts and settings.references and settings.out):
        raise ValueError("set rollouts=FOLDER, references=PICTURES and out=FOLDER")
    idle.of_critic(settings, "kind")
    out = Path(settings.out)
    check_out(settings)
    given = settings.rollouts if isinstance(settings.rollouts, list) else [settings.rollouts]
    samples, size = read_samples([str(folder) for folder in given])
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
    (out / FINISHED).unlink(missing_ok=True)  # of fewer steps
    loop(critic, likes, seen, unseen, s, made_of)
    finish(out, s.steps, made_of)
    show(out, bool(unseen))


def show(out: Path, held_out: bool) -> None:
    """Print how right the critic was in the end."""
    for row in checks.read(out / "log.csv")[-1:]:
        told = f"held-out accuracy {row['held_out_accuracy']:.3f}, " if held_out else ""
        print(f"{told}training accuracy {row['accuracy']:.3f}: {out}")


def read_samples(folders: Sequence[str]) -> tuple[list[Sample], tuple[int, int]]:
    """All samples of the runs, and their (h, w); ValueError if they have several."""
    samples: list[Sample] = []
    sizes: dict[str, tuple[int, int]] = {}
    for folder in folders:
        for shard in Rollouts(Path(folder)).shards:
            rows = shard.table(["prompt", "image"])
            samples += [(row["prompt"], row["image"]["bytes"]) for row in rows]
        with Image.open(io.BytesIO(samples[-1][1])) as picture:
            sizes[folder] = picture.height, picture.width
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rollouts must be of one size (h, w) but are {sizes}; leave some out")
    return samples, sizes[folders[0]]


def digest(samples: Sequence[Sample]) -> str:
    """What tells these samples from others, in any order."""
    every = sorted(hashlib.sha256(f"{p}\n".encode() + png).hexdigest() for p, png in samples)
    return hashlib.sha256("".join(every).encode()).hexdigest()


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of the prompts that are trained on, and of those that are not.

    A prompt's place depends on the seed and its text, so that it mostly stays in another round.
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
    s: Train,
    made_of: Mapping[str, str],
) -> None:
    """Take the remaining steps, logging and saving on the way."""
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
    """A reference for each sample, the samples, (n, 3, h, w) each, and their prompts."""
    prompts = [prompt for prompt, _ in samples]
    fake = to_images([Image.open(io.BytesIO(png)) for _, png in samples])
    return references.draw(prompts, generator), fake, prompts


@torch.no_grad()
def look(
    critic: Critic, references: References, samples: list[Sample], s: Train
) -> dict[str, float]:
    """What the critic thinks of samples that it is not trained on, beside the same references."""
    generator, reward, scores = draws(s.seed, 0, "held out"), critic.reward, []
    for i in range(0, len(samples), s.batch):
        real, fake, prompts = beside(samples[i : i + s.batch], references, generator)
        scores.append(torch.stack([reward(real, prompts), reward(fake, prompts)]))
    real, fake = torch.cat(scores, 1)
    right = accuracy(real, fake, paired=reward.paired)
    return {"held_out_accuracy": float(right), "held_out_margin": float((real - fake).mean())}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status as `command.finish`."""
    words = sys.argv[1:] if argv is None else argv
    settings = partial(command.settings_of, words, Train, NOTES, __doc__)
    return command.finish(
        "train_critic.py", settings, run, "the last checkpoint is kept", "state.pt"
    )


if __name__ == "__main__":
    sys.exit(started.run(main))
