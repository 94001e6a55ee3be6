"""Fine-tune a LoRA, which diffusers can load, on scored rollouts with offline GDRO.

The rollouts come from `tilt rollout`, their rewards from `tilt score`. To resume an interrupted run
from its last checkpoint, repeat the command with --resume.

The folder --out gets lora/ (the weights of the best check, else the last, with a model card),
log.csv, checks.csv, grids/, tensorboard/, settings.yaml and state.pt (for --resume).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import Data, check_fits, load_data
from finetune.following import Following, wait
from finetune.gdro import Gdro, GdroTrainer
from finetune.learnability import little_in_rollouts
from finetune.network import Model
from finetune.ranges import NAME, TEXTS, optional, part, setting, whole
from finetune.shards import Rollouts, Shard, check_alike, digest
from finetune.state import check_out, finish
from steering.frames import Frames
from tilt import digests, exit_status, idle_settings, loading, started, training
from tilt.options import Options
from tilt.processes import is_main
from tilt.wording import counted


@dataclass
class TrainGdro(training.TrainingRun):
    """The settings of an offline training."""

    lora: str | None = setting(
        None, optional(NAME), "LoRA to continue, which made the rollouts, for a further round"
    )
    model: str | None = setting(
        None, optional(NAME), "hub id or folder; by default the model of the rollouts"
    )
    rollouts: list[str] = setting(
        list, TEXTS, "folders of `tilt rollout`, scored by `tilt score` with one reward"
    )
    follow: int = setting(
        0,
        whole(0),
        "steps between looks for shards that other jobs draw and score meanwhile; 0: all are there",
    )
    gdro: Gdro = part(Gdro, "GDRO")


EXAMPLES = """\
examples:
  tilt train gdro --rollouts runs/words --out runs/tuned --gdro.steps 200
  tilt train gdro --config gdro.yaml --rollouts runs/words --out runs/tuned
  tilt train gdro --rollouts runs/words --out runs/tuned \\
    --check.every 50 --check.prompts unseen.txt --check.patience 3
"""
OPTIONS = Options("tilt train gdro", TrainGdro, __doc__ or "", EXAMPLES)


def run(settings: TrainGdro) -> None:
    """Check everything, then train."""
    if not settings.rollouts or not settings.out:
        raise ValueError("set rollouts=FOLDER and out=FOLDER")
    idle_settings.check_gdro(settings)
    settings = loading.resolved(settings)
    check_out(settings)
    runs, gdro = rollouts_of(settings), settings.gdro
    prompts, call = prompts_of(runs), runs[0].manifest["plan"]["call"]
    spec = runs[0].shards[0].scored_by(gdro.reward)
    drawn = runs[0].weights() if settings.follow else digest(runs, gdro.reward)
    made_of = digests.of_run(settings, spec, rollouts=drawn)
    if training.finished(settings, gdro.steps, made_of):
        training.show(settings)
        return
    data = load_data(runs, gdro.reward, gdro.reward_norm, gdro.k)
    for made in runs:
        if is_main() and (little := little_in_rollouts(made, gdro.reward)):
            print(f"{gdro.reward!r} of {made.folder}: {little}", flush=True)
    accelerator = training.accelerator_of(settings)
    name = settings.model or runs[0].manifest["model"]
    if not name:
        raise ValueError("the rollouts do not record their model; set model=")
    load = training.loader_of(settings, name)
    known = [run.shards[0].frames().get(gdro.reward) for run in runs]
    frames = next((found for found in known if found), Frames())
    watch = training.watch_of(settings, prompts, spec, call, load, accelerator, frames=frames)
    loading.check_trainable(name)
    started.say(f"loading {name}")
    pipe = training.pipeline_of(load, name, accelerator)
    model, kind = Model(pipe), type(pipe)
    network = getattr(pipe, model.part)
    check_fits(data, network, runs[0].manifest["pipeline"], kind.__name__)
    training.check_keywords(pipe, watch, prompts, call)
    del pipe  # neither decoder nor text encoder stays in memory
    weighed = made_of | {"model": training.weighed(network, accelerator)}
    trainer: Any = GdroTrainer(network, model, data, gdro, accelerator)
    if settings.follow:
        trainer = Following(trainer, runs[0], settings.follow)
    training.begin(trainer, settings, gdro, weighed)
    if accelerator.is_main_process:
        count = counted(len(data.groups), "prompt")
        print(f"{count}; {data.dropped} left out, because their rewards are all equal")
        for line in unscored(data):
            print(line)
    about = [*map(described, runs), rewarded(runs[0].shards[0], gdro.reward), *unscored(data)]
    result = training.Result(kind, name, "offline GDRO", lambda: about)
    shown = ("loss", "accuracy", "drift")
    training.loop(trainer, gdro.steps, settings, watch, shown, weighed, result)
    training.export(trainer, settings, result)
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(Path(settings.out) / "lora", gdro.steps, made_of)
        training.show(settings)


def rollouts_of(settings: TrainGdro) -> list[Rollouts]:
    """Return the rollouts; ValueError if they cannot be trained on together."""
    if settings.follow:
        if settings.rollouts[1:]:
            raise ValueError("follow= needs one folder of rollouts; give one rollouts=")
        started.say("waiting for the first shard that is scored")
        return [wait(Path(settings.rollouts[0]), settings.gdro.reward)]
    runs = [Rollouts(Path(folder)) for folder in settings.rollouts]
    check_alike(runs, named=bool(settings.model))
    calls = [run.manifest["plan"]["call"] for run in runs]
    if settings.check.every and not settings.check.call and any(c != calls[0] for c in calls):
        raise ValueError(
            f"the rollouts were drawn with different keywords, {calls}; set those of the checks by "
            "check.call=..., or check.every=0"
        )
    return runs


def prompts_of(runs: Sequence[Rollouts]) -> list[str]:
    """Return the prompts of all rollouts, each once."""
    return list(dict.fromkeys(p for run in runs for p in run.manifest["plan"]["prompts"]))


def described(run: Rollouts) -> str:
    """Return the model card's line about rollouts."""
    plan, steered = run.manifest["plan"], ""
    if plan["steered"] and run.shards[0].num_frames():
        steered = f", steered by {Frames(plan['score_frames'], plan['video_score'])}"
    return (
        f"{counted(len(plan['prompts']), 'prompt')}, {plan['images']} plain and "
        f"{plan['steered']} steered images each{steered}, seed {plan['seed']}, "
        f"call {json.dumps(plan['call'])}; fingerprint of the network that generated them: "
        f"{run.manifest['weights']}"
    )


def rewarded(shard: Shard, column: str) -> str:
    """Return the model card's line about the rewards."""
    spec, frames = shard.scored_by(column) or "an unnamed reward", shard.frames().get(column)
    of_videos = f", which scores {frames} of a video" if frames else ""
    return f"rewards: the column {column!r}, scored by `{spec}`{of_videos}"


def unscored(data: Data) -> list[str]:
    """Return a line about images without a score, if there are any."""
    count = counted(data.unscored, "image")
    return [f"{count} left out: their reward is not a finite number"] * bool(data.unscored)


def main(argv: Sequence[str]) -> int:
    """Return the exit status of `exit_status.of_run`."""
    return exit_status.of_run(OPTIONS, argv, run, "the last checkpoint is kept", "state.pt")
