"""Fine-tune a model on scored rollouts by offline GDRO, into a LoRA that diffusers loads.

    accelerate launch scripts/train_gdro.py rollouts=runs/words out=runs/tuned gdro.steps=200
    accelerate launch scripts/train_gdro.py configs/words.yaml gdro.lr=5e-5

The rollouts come from scripts/rollout.py, their rewards from scripts/score.py. Settings come from a
YAML file, if one is named first, and from key=value words. A run that was cut off goes on from
its last checkpoint when the command is repeated with resume=true.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from finetune import config, lora
from finetune.gdro import Gdro, Trainer, load_data, load_state, save_state
from finetune.models import family_of, noising_of
from finetune.rollouts import Rollouts
from scripts.rollout import settings_of
from steering import loading


@dataclass
class Train:
    """A training run."""

    rollouts: str = ""
    out: str = ""
    model: str | None = None
    dtype: str = "auto"
    save_every: int = 50
    log_every: int = 10
    resume: bool = False
    gdro: Gdro = field(default_factory=Gdro)


NOTES = {
    "rollouts": "the scored run of scripts/rollout.py",
    "out": "the folder to make",
    "model": "by default that of the rollouts",
    "dtype": "of the frozen network; auto: float32 on a CPU, else a half type",
    "save_every": "steps between checkpoints",
    "log_every": "steps between lines of the log",
    "resume": "carry on from the last checkpoint",
    "gdro.steps": "updates",
    "gdro.groups": "prompts of an update, over all processes",
    "gdro.k": "images of a group",
    "gdro.micro_groups": "groups that a process evaluates at once",
    "gdro.beta": "β: less lets the model move further",
    "gdro.temperature": "τ: β τ sets how strongly the reward tilts",
    "gdro.form": "full, top1 or rank",
    "gdro.hold_best": "γ: weight of the error on the best image",
    "gdro.weight": "of each timestep's score: constant or elbo",
    "gdro.times": "logit_normal or uniform",
    "gdro.shared_noise": "one noise for a group; false shrinks what is learned",
    "gdro.reward": "the rewards' column",
    "gdro.reward_norm": "none, minmax, rank, group_std or global_std",
    "gdro.rank": "of the LoRA",
    "gdro.alpha": "of the LoRA; its scale is alpha/rank",
    "gdro.targets": "layers to adapt; by default the family's attention",
    "gdro.lr": "learning rate",
    "gdro.warmup": "steps of a rising rate",
    "gdro.weight_decay": "of AdamW",
    "gdro.max_grad_norm": "longer gradients are cut to it",
    "gdro.ema": "the average's highest decay",
    "gdro.eight_bit": "AdamW of bitsandbytes",
    "gdro.gradient_checkpointing": "less memory, a third more time",
    "gdro.compile": "torch.compile the network",
    "gdro.seed": "of everything",
}


def run(settings: Train) -> None:
    """Check everything, then train."""
    if not settings.rollouts or not settings.out:
        raise ValueError("set rollouts=FOLDER and out=FOLDER")
    made, out = Rollouts(Path(settings.rollouts)), Path(settings.out)
    if (out / "state.pt").exists() and not settings.resume:
        raise ValueError(f"{out} holds a run; add resume=true, or give another out=")
    data = load_data(made, settings.gdro)
    accelerator = Accelerator()
    dtype = loading.pick_dtype(settings.dtype, accelerator.device)
    name = settings.model or made.manifest["model"]
    if not name:
        raise ValueError("the rollouts do not say their model; set model=")
    pipe = loading.load_pipeline(name, dtype)
    family = family_of(pipe)
    network, noising, kind = getattr(pipe, family.network), noising_of(pipe), type(pipe)
    del pipe  # neither decoder nor text encoder stays in memory
    network.to(accelerator.device)
    trainer = Trainer(network, family, noising, data, settings.gdro, accelerator)
    if settings.resume:
        load_state(trainer, out)
    if accelerator.is_main_process:
        config.write(settings, out / "settings.yaml")
        print(f"{len(data.groups)} prompts; {data.dropped} left out, whose rewards are all equal")
    train(trainer, settings, out)
    if accelerator.is_main_process:
        with trainer.average.applied(trainer.weights):
            print(lora.save(kind, family.network, network, out / "lora"))


def train(trainer: Trainer, settings: Train, out: Path) -> None:
    """Take the remaining steps; a line of log.csv and of TensorBoard each log_every."""
    from torch.utils.tensorboard import SummaryWriter

    main = trainer.accelerator.is_main_process
    writer = SummaryWriter(str(out / "tensorboard")) if main else None
    recent: list[dict[str, float]] = []
    steps = range(trainer.step, settings.gdro.steps)
    for step in tqdm(steps, initial=trainer.step, total=settings.gdro.steps, disable=not main):
        recent.append(trainer.train_step())
        if (step + 1) % settings.log_every == 0 and writer:
            means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            _append(out / "log.csv", {"step": step + 1} | means)
            for key, value in means.items():
                writer.add_scalar(key, value, step + 1)
            recent.clear()
        if ((step + 1) % settings.save_every == 0 or step + 1 == settings.gdro.steps) and main:
            save_state(trainer, out)
    if writer:
        writer.close()


def _append(file: Path, row: dict[str, Any]) -> None:
    fresh = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    tqdm.write(json.dumps({k: round(float(v), 4) for k, v in row.items()}), file=sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        run(settings_of(words, Train, NOTES, __doc__))
    except ValueError as error:
        print(f"train_gdro.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "train_gdro.py: interrupted; the last checkpoint is kept: repeat with resume=true",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
