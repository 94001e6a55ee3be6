"""Fine-tune a model on scored rollouts by offline GDRO, into a LoRA that diffusers loads.

    accelerate launch scripts/train_gdro.py rollouts=runs/words out=runs/tuned gdro.steps=200
    accelerate launch scripts/train_gdro.py configs/words.yaml gdro.lr=5e-5
    accelerate launch scripts/train_gdro.py rollouts=runs/words out=runs/tuned \\
      check.every=50 check.prompts=unseen.txt check.patience=3

The rollouts come from scripts/rollout.py, their rewards from scripts/score.py. Settings come from a
YAML file, if one is named first, and from key=value words. A run that was cut off goes on from
its last checkpoint when the command is repeated with resume=true.

Made in out=: lora/ (the best checked, else the last, with a model card), log.csv, checks.csv,
grids/, tensorboard/, settings.yaml, state.pt (for resume=true).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rewards
from finetune import card, checks, config, lora
from finetune.checks import Check, Watch
from finetune.data import load_data
from finetune.gdro import Gdro, Trainer, load_state, save_state
from finetune.models import family_of, noising_of
from finetune.rollouts import Rollouts
from scripts.rollout import settings_of
from steering import loading
from steering.prompts import read


@dataclass
class Train:
    """A training run."""

    rollouts: str = ""
    out: str = ""
    model: str | None = None
    lora: str | None = None
    dtype: str = "auto"
    save_every: int = 50
    log_every: int = 10
    wandb: bool = False
    resume: bool = False
    gdro: Gdro = field(default_factory=Gdro)
    check: Check = field(default_factory=Check)


NOTES = {
    "rollouts": "the scored run of scripts/rollout.py",
    "out": "the folder to make",
    "model": "by default that of the rollouts",
    "lora": "a LoRA to go on from, which the rollouts come from: another round",
    "dtype": "of the frozen network; auto: float32 on a CPU, else a half type",
    "save_every": "steps between checkpoints",
    "log_every": "steps between lines of the log",
    "wandb": "log to Weights & Biases too",
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
    "gdro.shift": "above 1 times lean to noise, where a picture's content is settled",
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
    "gdro.refresh": "steps between moves of the reference to the present weights; 0: never",
    "gdro.eight_bit": "AdamW of bitsandbytes",
    "gdro.gradient_checkpointing": "less memory, a third more time",
    "gdro.compile": "torch.compile the network",
    "gdro.seed": "of everything",
    "check.every": "steps between checks: pictures are drawn and scored; 0: never",
    "check.prompts": "a file of prompts that the rollouts do not have",
    "check.train_prompts": "how many of the rollouts' prompts are checked too",
    "check.images": "pictures of a prompt",
    "check.reward": "what scores them; by default what scored the rollouts",
    "check.quality": "a reward from 1 to 5, for the corrected score r (q - 3) + 0.2",
    "check.best": "the metric whose best check gives lora/",
    "check.patience": "stop after so many checks without a new best; 0: never",
    "check.seed": "of the checks' noise",
    "check.call": "keywords of the pipeline's call; by default those of the rollouts",
}


def run(settings: Train) -> None:
    """Check everything, then train."""
    if not settings.rollouts or not settings.out:
        raise ValueError("set rollouts=FOLDER and out=FOLDER")
    made, out, gdro = Rollouts(Path(settings.rollouts)), Path(settings.out), settings.gdro
    if (out / "state.pt").exists() and not settings.resume:
        raise ValueError(f"{out} holds a run; add resume=true, or give another out=")
    data = load_data(made, gdro.reward, gdro.reward_norm, gdro.k)
    accelerator = Accelerator(log_with=trackers(settings.wandb), project_dir=out)
    name = settings.model or made.manifest["model"]
    if not name:
        raise ValueError("the rollouts do not say their model; set model=")
    dtype = loading.pick_dtype(settings.dtype, accelerator.device)
    watch = watch_of(settings, made, partial(loading.load_pipeline, name, dtype), accelerator)
    pipe = loading.load_pipeline(name, dtype)
    family = family_of(pipe)
    network, noising, kind = getattr(pipe, family.network), noising_of(pipe), type(pipe)
    del pipe  # neither decoder nor text encoder stays in memory
    network.to(accelerator.device)
    trainer = Trainer(network, family, noising, data, gdro, accelerator)
    if settings.lora:
        found = lora.read(Path(settings.lora), family.network, trainer.weights, gdro.alpha)
        trainer.start_from(found)
    if settings.resume:
        load_state(trainer, out)
    if accelerator.is_main_process:
        config.write(settings, out / "settings.yaml")
        for table in ("log.csv", "checks.csv"):
            checks.rewind(out / table, trainer.step)
        print(f"{len(data.groups)} prompts; {data.dropped} left out, whose rewards are all equal")
    accelerator.init_trackers("tensorboard", flat(settings))
    train(trainer, settings, out, watch)
    accelerator.end_training()
    if accelerator.is_main_process:
        about = about_of(name, kind, made, settings, out)
        print(export(trainer, kind, about, out, bool(watch)))


def trackers(wandb: bool) -> list[Any]:
    """The loggers of accelerate; ValueError where one is asked for that is not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb=true needs the package: pip install wandb")
    return ["tensorboard", "wandb"] if wandb else ["tensorboard"]


def flat(settings: Train) -> dict[str, Any]:
    """The settings as the loggers want them: one level of plain values."""
    inner = {f"gdro.{key}": value for key, value in vars(settings.gdro).items()}
    return {
        key: value if isinstance(value, int | float) else str(value) for key, value in inner.items()
    }


def watch_of(settings: Train, made: Rollouts, load: Any, accelerator: Accelerator) -> Watch | None:
    """What to look at while training, checked beforehand; None if nothing."""
    check = settings.check
    if not check.every:
        return None
    if not check.prompts:
        raise ValueError("check.every needs check.prompts=FILE, prompts to look at")
    plan = made.manifest["plan"]
    seen = plan["prompts"][: check.train_prompts]
    unseen = list(dict.fromkeys(prompt.text for prompt in read(Path(check.prompts))))
    both = sorted(set(unseen) & set(plan["prompts"]))
    if both:
        raise ValueError(f"{check.prompts} has prompts that are trained on, as {both[0]!r}")
    spec = check.reward or made.shards[0].scored_by(settings.gdro.reward)
    if not spec:
        raise ValueError("the rollouts do not say what scored them; set check.reward=")
    found = {"reward": rewards.load(spec, accelerator.device)}
    if check.quality:
        found["quality"] = rewards.load(check.quality, accelerator.device)
    for reward in found.values():
        reward.check([*seen, *unseen])
    return Watch(check, seen, unseen, found, check.call or plan["call"], load)


def train(trainer: Trainer, settings: Train, out: Path, watch: Watch | None) -> None:
    """Take the remaining steps, logging, checking and saving on the way."""
    main, steps = trainer.accelerator.is_main_process, settings.gdro.steps
    recent: list[dict[str, float]] = []
    if watch and trainer.step == 0:
        checked(trainer, watch, out)
    bar = tqdm(range(trainer.step, steps), initial=trainer.step, total=steps, disable=not main)
    for step in bar:
        if watch and checks.is_over(checks.read(out / "checks.csv"), watch.check):
            tqdm.write(f"stopped at step {step}: {watch.check.best} has not risen any more")
            break
        recent.append(trainer.train_step())
        if (step + 1) % settings.log_every == 0 and main:
            means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            checks.append(out / "log.csv", {"step": step + 1} | means)
            trainer.accelerator.log(means, step + 1)
            bar.set_postfix({k: f"{means[k]:.3g}" for k in ("loss", "accuracy", "drift")})
            recent.clear()
        if watch and ((step + 1) % watch.check.every == 0 or step + 1 == steps):
            checked(trainer, watch, out)
        if ((step + 1) % settings.save_every == 0 or step + 1 == steps) and main:
            save_state(trainer, out)


def checked(trainer: Trainer, watch: Watch, out: Path) -> None:
    """Look at the averaged weights; keep the row, the pictures, and the weights if they are best.

    The weights are kept before the row, so that the best row's weights are always there.
    """
    part, accelerator = trainer.family.network, trainer.accelerator
    with lora.swapped(trainer.weights, trainer.average.weights):
        row, grid = watch.look(part, trainer.bare, accelerator)
    if accelerator.is_main_process:
        row = {"step": trainer.step} | row
        rows = [*checks.read(out / "checks.csv"), row]
        if checks.best_row(rows, watch.check.best)["step"] == trainer.step:
            save_file(lora.copy(trainer.average.weights), out / "best.safetensors")
        checks.append(out / "checks.csv", row)
        (out / "grids").mkdir(exist_ok=True)
        grid.save(out / "grids" / f"{trainer.step:06d}.png")
        accelerator.log({name: row[name] for name in row if name != "step"}, trainer.step)
        tqdm.write(json.dumps({k: round(v, 4) for k, v in row.items()}), file=sys.stdout)
    accelerator.wait_for_everyone()


def about_of(name: str, kind: type, made: Rollouts, settings: Train, out: Path) -> card.About:
    """What the model card says."""
    plan, rows = made.manifest["plan"], checks.read(out / "checks.csv")
    data = [
        f"{len(plan['prompts'])} prompts, {plan['images']} plain and {plan['steered']} steered "
        f"images each, seed {plan['seed']}, call {json.dumps(plan['call'])}",
        f"the base's weights have the fingerprint {made.manifest['weights']}",
        f"rewards: the column {settings.gdro.reward!r}, scored by "
        f"`{made.shards[0].scored_by(settings.gdro.reward) or 'an unnamed reward'}`",
    ]
    step = settings.gdro.steps
    if rows:
        step = int(checks.best_row(rows, settings.check.best)["step"])
    text = (out / "settings.yaml").read_text(encoding="utf-8")
    return card.About(name, kind.__name__, text, data, step)


def export(trainer: Trainer, kind: type, about: card.About, out: Path, best: bool) -> Path:
    """Write lora/ with its card: the best of the checks, else the last average."""
    chosen = load_file(out / "best.safetensors") if best else trainer.average.weights
    with lora.swapped(trainer.weights, chosen):
        file = lora.save(kind, trainer.family.network, trainer.bare, out / "lora")
    card.write(out / "lora", about, out)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what was refused, in one sentence; 1 if it broke; 130 on Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        run(settings_of(words, Train, NOTES, __doc__))
    except ValueError as error:
        print(f"train_gdro.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"train_gdro.py: {error}; the last checkpoint is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "train_gdro.py: interrupted; the last checkpoint is kept: repeat with resume=true",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
