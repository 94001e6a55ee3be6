"""What training scripts share: settings, the loop with log, checks and checkpoints, the export."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import rewards
from finetune import checks, config, lora, ranges
from finetune.checks import Check, Watch
from finetune.learner import Learner
from finetune.ranges import FLAG, NAME, TEXT, one_of, optional, part, setting, whole
from finetune.sharding import shard
from finetune.state import FILE, FINISHED, is_finished, load_state, save_state
from rewards.catalogue import OutsideError
from rewards.combine import component_names
from rewards.models.critic import CriticReward, FeatureModel, PreferenceModel
from steering.call import PipelineCall
from tilt import command, model_card
from tilt.loading import DTYPES
from tilt.processes import is_main
from tilt.report import training as page

__all__ = [
    "Run",
    "accelerator_of",
    "begin",
    "check_keywords",
    "check_weights",
    "critic_of",
    "export",
    "finished",
    "loop",
    "metrics",
    "show",
    "watch_of",
]


@dataclass
class Run:
    """The settings that every training run has."""

    out: str = setting("", TEXT, "the folder to make")
    model: str | None = setting(None, optional(NAME), "hub id, folder, tiny-sd3 or tiny-sd")
    lora: str | None = setting(None, optional(NAME), "a LoRA to go on from: another round")
    dtype: str = setting(
        "auto",
        one_of("auto", *DTYPES),
        "type of the frozen network; auto is float32 on a CPU, else a half type",
    )
    save_every: int = setting(50, whole(1), "steps between checkpoints")
    log_every: int = setting(10, whole(1), "steps between lines of the log")
    wandb: bool = setting(False, FLAG, "log to Weights & Biases too")
    resume: bool = setting(
        False,
        FLAG,
        "carry on from the last checkpoint, and further if steps is higher; save_every, log_every, "
        "wandb, check.every, check.patience, micro_groups, compile and gradient_checkpointing may "
        "differ, too",
    )
    check: Check = part(Check, "checks while training")

    def __post_init__(self) -> None:
        ranges.check(self)


def accelerator_of(settings: Run) -> Accelerator:
    """With its loggers; ValueError where one is asked for that is not installed."""
    loggers: list[Any] = ["tensorboard"]
    if settings.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb=true needs the package: pip install wandb")
        loggers.append("wandb")
    accelerator = Accelerator(log_with=loggers, project_dir=settings.out)
    shard(accelerator)
    return accelerator


def watch_of(
    settings: Run,
    trained_on: Sequence[str],
    spec: str,
    call: dict[str, Any],
    load: Callable[..., Any],
    accelerator: Accelerator,
    own: bool = False,
) -> Watch | None:
    """What to look at while training, checked beforehand; None if nothing.

    trained_on: all prompts that are; spec: the reward that is trained on, "" if it is not known;
    load(**components): the pipeline, around a component; own: whether the user wrote `spec`, and
    not a file of somebody's, so that it may import code.
    """
    check = settings.check
    if not check.every:
        return None
    command.call_of(check.call, {}, "check.call")
    if not check.prompts:
        raise ValueError("check.every needs check.prompts=FILE, prompts to look at")
    seen = list(trained_on[: check.train_prompts])
    unseen = command.prompts_of(check.prompts)
    both = sorted(set(unseen) & set(trained_on))
    if both:
        raise ValueError(f"{check.prompts} has prompts that are trained on, as {both[0]!r}")
    if not (check.reward or spec):
        raise ValueError("the rollouts do not say what scored them; set check.reward=")
    own = own or bool(check.reward)
    try:
        found = {"reward": rewards.load(check.reward or spec, accelerator.device, imports=own)}
    except OutsideError as error:
        raise ValueError(
            f"{error.what}, and only the files of the rollouts say that it scored them: set "
            f"check.reward={spec!r} if you trust it, or another"
        ) from None
    if check.quality:
        found["quality"] = rewards.load(check.quality, accelerator.device, imports=True)
    for reward in found.values():
        check_weights(reward)
        reward.check([*seen, *unseen])
    watch = Watch(check, seen, unseen, found, check.call or call, load)
    if check.best not in metrics(watch):
        raise ValueError(
            f"check.best is {check.best!r:.80}, which no check tells; there are {metrics(watch)}"
        )
    return watch


def metrics(watch: Watch) -> list[str]:
    """What every check will tell, as "held_out/reward"."""
    parts = component_names(watch.rewards["reward"].parts)
    names = [*(parts if len(parts) > 1 else []), *watch.rewards]
    splits = [split for split, of in (("held_out", watch.unseen), ("train", watch.seen)) if of]
    found = [f"{split}/{name}" for split in splits for name in names]
    return found + ["held_out/corrected"] * ("quality" in watch.rewards)


def check_weights(reward: Any) -> None:
    """ValueError for a sum whose weights are all 0: every picture would score alike."""
    if not any(part.weight for part in reward.parts):
        raise ValueError(f"every weight of {reward.spec} is 0; give one of them another weight")


def check_keywords(pipe: Any, watch: Watch | None, prompts: Sequence[str], call: Any) -> None:
    """ValueError for keywords of checks, or of samples, that the pipeline's call does not take."""
    PipelineCall.check(pipe, prompts, call)
    if watch:
        PipelineCall.check(pipe, [*watch.seen, *watch.unseen], watch.call)


def critic_of(
    source: str, kind: str, tower: str, paired: bool, seed: int, device: Any, layers: int = 2
) -> CriticReward:
    """The critic of a folder, or else an untrained one of a kind; ValueError unless it fits."""
    found: Any = source
    if not source and kind == "preference":
        found = PreferenceModel(tower, layers=layers)
    elif not source:
        found = FeatureModel(tower, seed=seed)
    critic = CriticReward(found, device=device)
    own = critic.model.settings | {"kind": critic.model.kind}
    for name, asked, default in (
        ("kind", kind, "features"),
        ("tower", tower, "tiny"),
        ("layers", layers, 2),
    ):
        if source and asked not in (default, own.get(name)):
            raise ValueError(
                f"the critic {source} keeps its own kind, tower and layers, of which {name} is "
                f"{own.get(name, 'none')}, not {asked}; leave that out, or begin with another"
            )
    if critic.paired and not paired:
        raise ValueError(
            "a preference critic compares pictures of one prompt; set paired=true, with a .json or "
            "a table of references by prompt"
        )
    return critic


def begin(trainer: Any, settings: Run, method: Any, made_of: Mapping[str, str]) -> None:
    """Go on from a checkpoint or a LoRA, save the settings, start the loggers.

    made_of: digests of what is trained, and on what, by name.
    """
    learner: Learner = trainer.learner
    out, main = Path(settings.out), learner.accelerator.is_main_process
    if settings.lora:
        part, alpha = learner.family.network, learner.settings.alpha
        learner.start_from(lora.read(Path(settings.lora), part, learner.weights, alpha))
    if settings.resume:
        load_state(trainer, out, made_of, method.steps)
    if main:
        config.write(settings, out / "settings.yaml")
        for table in ("log.csv", "checks.csv"):
            checks.rewind(out / table, trainer.step)
    plain = {k: v if isinstance(v, int | float) else str(v) for k, v in asdict(method).items()}
    learner.accelerator.init_trackers("tensorboard", plain)
    learner.accelerator.wait_for_everyone()  # all read the table of checks next


def loop(
    trainer: Any,
    steps: int,
    settings: Run,
    watch: Watch | None,
    shown: Sequence[str],
    made_of: Mapping[str, str],
) -> None:
    """Take the remaining steps, logging, checking and saving on the way.

    trainer has `learner`, `step`, `train_step()` and `state_dict()`; shown: on the progress bar;
    made_of: as in `begin`.
    """
    learner: Learner = trainer.learner
    out, main = Path(settings.out), learner.accelerator.is_main_process
    recent: list[dict[str, float]] = []
    bar = tqdm(range(trainer.step, steps), initial=trainer.step, total=steps, disable=not main)
    if watch and main:
        prompts = {"held_out": list(watch.unseen), "trained_on": list(watch.seen)}
        text = json.dumps(prompts, indent=1, ensure_ascii=False)
        (out / "checks.json").write_text(text + "\n", encoding="utf-8")
    if watch and trainer.step == 0:
        bar.set_description("first check")
        _check(learner, 0, watch, out)
    for step in bar:
        if watch and checks.is_over(checks.read(out / "checks.csv"), watch.check):
            tqdm.write(f"stopped at step {step}: {watch.check.best} has not risen any more")
            break
        bar.set_description("training")
        start = time.monotonic()
        recent.append(trainer.train_step() | {"seconds": time.monotonic() - start})
        done = step + 1
        if done % settings.log_every == 0 and main:
            means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            checks.append(out / "log.csv", {"step": done} | means)
            learner.accelerator.log(means, done)
            bar.set_postfix({k: f"{means[k]:.3g}" for k in shown})
            recent.clear()
        if watch and (done % watch.check.every == 0 or done == steps):
            bar.set_description("check")
            _check(learner, done, watch, out)
        if done % settings.save_every == 0 or done == steps:
            save_state(trainer, out, main, made_of)


def _check(learner: Learner, step: int, watch: Watch, out: Path) -> None:
    """Look at the averaged weights; keep the row, the pictures, and the weights if they are best.

    The weights are kept before the row, so that the best row's weights are always there.
    """
    accelerator = learner.accelerator
    with learner.averaged():
        row, grid = watch.look(learner.family.network, learner.bare, accelerator)
    weights = lora.whole(learner.average.weights)
    row = {"step": step} | row
    rows = [*checks.read(out / "checks.csv"), row]
    best = checks.best_row(rows, watch.check.best)  # an error, where there is one, in all processes
    if accelerator.is_main_process:
        if best["step"] == step:
            save_file(lora.copy(weights), out / "best.safetensors")
        checks.append(out / "checks.csv", row)
        (out / "grids").mkdir(exist_ok=True)
        grid.save(out / "grids" / f"{step:06d}.png")
        accelerator.log({name: row[name] for name in row if name != "step"}, step)
        tqdm.write(json.dumps({k: round(v, 4) for k, v in row.items()}), file=sys.stdout)
    accelerator.wait_for_everyone()


def finished(settings: Run, steps: int, made_of: Mapping[str, str]) -> bool:
    """Whether the LoRA of so many steps of this very run is there, told without its model.

    made_of: as in `begin`. Without a state nothing says that it was made with these settings.
    """
    out = Path(settings.out)
    return settings.resume and (out / FILE).exists() and is_finished(out / "lora", steps, made_of)


def show(settings: Run) -> None:
    """Print the LoRA that `finished` has found."""
    if is_main():
        print(next((Path(settings.out) / "lora").glob("*.safetensors")))


def export(
    trainer: Any, kind: Any, settings: Run, about: Sequence[str], base: str, method: str
) -> Path:
    """Write lora/ with its card: the best of the checks, else the last average; the weights' file.

    Every process has to call it; the main one writes. kind: the pipeline's class; about: lines on
    the data; base, method: for the card's title.
    """
    learner: Learner = trainer.learner
    part, main = learner.family.network, learner.accelerator.is_main_process
    out, step, chosen = Path(settings.out), trainer.step, learner.average.weights
    rows = checks.read(out / "checks.csv")
    if rows:
        step = int(checks.best_row(rows, settings.check.best)["step"])
        chosen = _best(out / "best.safetensors")
    if main:
        (out / "lora" / FINISHED).unlink(missing_ok=True)  # of fewer steps
    with lora.swapped(learner.weights, chosen):
        file = lora.save(kind, part, learner.bare, out / "lora", main)
    if main:
        _card(out, kind, base, method, about, step)
        if (out / "log.csv").exists():
            page.write(out)
    learner.accelerator.wait_for_everyone()
    return file


def _best(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}, the weights of the best check, cannot be read ({error}); train once more, "
            "into another out="
        ) from None


def _card(out: Path, kind: Any, base: str, method: str, about: Sequence[str], step: int) -> None:
    text = (out / "settings.yaml").read_text(encoding="utf-8")
    model_card.write(
        out / "lora", model_card.About(base, kind.__name__, method, text, about, step), out
    )
