"""Settings, checks and export that the training commands share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs

import rewards
from finetune import config, ranges, zero
from finetune.checks import Check, Watch
from finetune.loop import begin as start
from finetune.loop import export as save
from finetune.loop import run, snapshot
from finetune.ranges import FLAG, NAME, TEXT, one_of, optional, part, setting, whole
from finetune.sharding import follow, from_main, reads_once, shard
from finetune.state import FILE, is_finished
from rewards.catalogue import OutsideError
from rewards.combine import component_names
from rewards.models.critic import CriticReward, FeatureModel, PreferenceModel
from steering.call import PipelineCall, check_frames, frames_of
from steering.frames import Frames
from steering.manifest import fingerprint
from tilt import drawing, hub, loading, model_card, offloading
from tilt.loading import ABOUT_DTYPE, DTYPE
from tilt.processes import PATIENCE, is_main
from tilt.prompts import read_texts
from tilt.quantization import ABOUT_QUANTIZE, QUANTIZE
from tilt.report import training as page

__all__ = [
    "Result",
    "TrainingRun",
    "accelerator_of",
    "begin",
    "check_keywords",
    "check_weights",
    "critic_of",
    "export",
    "finished",
    "loader_of",
    "loop",
    "metrics",
    "pipeline_of",
    "refuse_reading_once",
    "show",
    "watch_of",
    "weighed",
]


@dataclass
class TrainingRun:
    """The settings that every training run has."""

    out: str = setting("", TEXT, "output folder")
    model: str | None = setting(None, optional(NAME), "hub id, folder, tiny-sd3 or tiny-sd")
    lora: str | None = setting(None, optional(NAME), "LoRA to start from, for a further round")
    dtype: str = setting("auto", DTYPE, f"{ABOUT_DTYPE} (the LoRA is float32)")
    quantize: str = setting("none", QUANTIZE, ABOUT_QUANTIZE)
    offload: str = setting(
        "none",
        one_of("none", "group"),
        "group: text encoders and decoder are in the host's memory, from which each layer moves to "
        "the device while it computes, in checks and where samples are decoded",
    )
    save_every: int = setting(50, whole(1), "steps between checkpoints")
    save_lora_every: int = setting(
        0, whole(0), "steps between LoRAs saved as lora-000100/ and so on; 0: none"
    )
    log_every: int = setting(10, whole(1), "steps between lines of the log")
    wandb: bool = setting(False, FLAG, "also log to Weights & Biases")
    push_to_hub: str | None = setting(
        None,
        optional(NAME),
        "also upload lora/ to this repository of the Hugging Face hub, as OWNER/NAME, which is "
        "made private if it is new",
    )
    resume: bool = setting(
        False,
        FLAG,
        "continue from the last checkpoint; steps may be higher, and save_every, log_every, wandb, "
        "save_lora_every, push_to_hub, check.every, check.patience, micro_groups, micro_images, "
        "compile, gradient_checkpointing and offload may differ",
    )
    check: Check = part(Check, "checks while training")

    def __post_init__(self) -> None:
        ranges.check(self)


def accelerator_of(settings: TrainingRun) -> Accelerator:
    """Return an Accelerator with its loggers.

    Raises ValueError if a requested logger is not installed, or if the run's LoRA is to be uploaded
    to a repository that cannot be written.
    """
    loggers: list[Any] = ["tensorboard"]
    if settings.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb=true needs the package: pip install wandb")
        loggers.append("wandb")
    if settings.push_to_hub and is_main():
        hub.check(settings.push_to_hub)
    patience: Any = [InitProcessGroupKwargs(timeout=PATIENCE)]
    accelerator = Accelerator(log_with=loggers, project_dir=settings.out, kwargs_handlers=patience)
    shard(accelerator)
    if settings.quantize != "none" and (accelerator.is_fsdp2 or zero.is_on(accelerator)):
        raise ValueError(
            f"quantize is {settings.quantize!r}, which is not supported with FSDP and DeepSpeed; "
            "run several processes without them, or set quantize=none"
        )
    return accelerator


def loader_of(settings: TrainingRun, name: str) -> Callable[..., Any]:
    """Return a function that loads the pipeline called `name`, without a LoRA, on the CPU.

    It takes modules that replace the stored ones. Weights in 4 bits are on the GPU.
    """
    dtype, quantize = loading.DTYPES[settings.dtype], settings.quantize
    return partial(loading.load_pipeline, name, dtype, quantize=quantize)


def refuse_reading_once(accelerator: Accelerator) -> None:
    """Raise ValueError if FSDP asks that only one process reads the network's weights."""
    if reads_once(accelerator):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, but training on own samples calls the "
            "pipeline before its network is sharded, for which every process needs the weights; "
            "set it to false"
        )


def pipeline_of(load: Callable[..., Any], name: str, accelerator: Accelerator) -> Any:
    """Return load(), the pipeline called `name`.

    If FSDP asks for it, only the main process reads the weights of the network.
    """
    if not reads_once(accelerator):
        return load()
    part, network = loading.empty_network(name)
    pipe = load() if accelerator.is_main_process else load(**{part: network})
    follow(getattr(pipe, part), accelerator)
    return pipe


def weighed(network: Any, accelerator: Accelerator) -> str:
    """Return the fingerprint of the network, whose weights the main process has."""
    return from_main(accelerator, lambda: fingerprint(network))


def watch_of(
    settings: TrainingRun,
    trained_on: Sequence[str],
    spec: str,
    call: dict[str, Any],
    load: Callable[..., Any],
    accelerator: Accelerator,
    own: bool = False,
    frames: Frames = Frames(),  # noqa: B008 (frozen)
) -> Watch | None:
    """Return the checks during training, validated beforehand; None if there are none.

    trained_on: all training prompts; spec: the reward that is trained on, "" if unknown;
    load(**components): returns the pipeline with these components; own: whether the user wrote
    `spec`, so that it may import code, and not a file of unknown origin; frames: how videos are
    scored.
    """
    check = settings.check
    if not check.every:
        return None
    drawing.call_of(check.call, {}, "check.call")
    if not check.prompts:
        raise ValueError("check.every needs check.prompts=FILE, a file of prompts to check")
    seen = list(trained_on[: check.train_prompts])
    unseen = read_texts(check.prompts)
    both = sorted(set(unseen) & set(trained_on))
    if both:
        raise ValueError(f"{check.prompts} has training prompts, such as {both[0]!r}")
    if not (check.reward or spec):
        raise ValueError("the rollouts do not say what scored them; set check.reward=")
    own = own or bool(check.reward)
    try:
        found = {"reward": rewards.load(check.reward or spec, accelerator.device, imports=own)}
    except OutsideError as error:
        raise ValueError(
            f"{error.what}, and its name comes only from the files of the rollouts: set "
            f"check.reward={spec!r} if you trust it, or another"
        ) from None
    if check.quality:
        found["quality"] = rewards.load(check.quality, accelerator.device, imports=True)
    for reward in found.values():
        check_weights(reward)
        reward.check([*seen, *unseen])
    place = partial(offloading.place, offload=settings.offload)
    watch = Watch(check, seen, unseen, found, check.call or call, load, place, frames)
    if check.best not in metrics(watch):
        raise ValueError(
            f"check.best is {check.best!r:.80}, which no check reports; there are {metrics(watch)}"
        )
    return watch


def metrics(watch: Watch) -> list[str]:
    """Return the names of all metrics that a check reports, such as "held_out/reward"."""
    parts = component_names(watch.rewards["reward"].parts)
    names = [*(parts if len(parts) > 1 else []), *watch.rewards]
    splits = [split for split, of in (("held_out", watch.unseen), ("train", watch.seen)) if of]
    found = [f"{split}/{name}" for split in splits for name in names]
    return found + ["held_out/corrected"] * ("quality" in watch.rewards)


def check_weights(reward: Any) -> None:
    """Raise ValueError if all weights of a sum are 0, so that all images would score the same."""
    if not any(part.weight for part in reward.parts):
        raise ValueError(f"every weight of {reward.spec} is 0; give one of them another weight")


def check_keywords(pipe: Any, watch: Watch | None, prompts: Sequence[str], call: Any) -> None:
    """Raise ValueError for keywords of checks or samples that the pipeline does not take."""
    PipelineCall.check(pipe, prompts, call)
    if watch:
        PipelineCall.check(pipe, [*watch.seen, *watch.unseen], watch.call)
        if frames_of(type(pipe), watch.call)[1] != 1:  # the rule of videos says nothing of images
            check_frames(watch.frames, type(pipe), watch.call)


def critic_of(
    source: str, kind: str, tower: str, paired: bool, seed: int, device: Any, layers: int = 2
) -> CriticReward:
    """Load the critic of a folder, or make an untrained one; ValueError if it does not fit."""
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
                f"the critic {source} has a fixed kind, tower and layers, of which {name} is "
                f"{own.get(name, 'none')}, not {asked}; leave that out, or start from another"
            )
    if critic.paired and not paired:
        raise ValueError(
            "a preference critic compares images of one prompt; set paired=true, with a .json or "
            "a table of references by prompt"
        )
    return critic


def begin(trainer: Any, settings: TrainingRun, method: Any, made_of: Mapping[str, str]) -> None:
    """Start from a checkpoint or a LoRA, save the settings, and start the loggers.

    made_of: digests of the model and the data, by name.
    """
    out, accelerator = Path(settings.out), trainer.learner.accelerator
    given = {"resume": settings.resume, "adapter": settings.lora, "made_of": made_of}
    start(trainer, out, method.steps, **given)
    if accelerator.is_main_process:
        config.write(settings, out / "settings.yaml")
    plain = {k: v if isinstance(v, int | float) else str(v) for k, v in asdict(method).items()}
    accelerator.init_trackers("tensorboard", plain)


def loop(
    trainer: Any,
    steps: int,
    settings: TrainingRun,
    watch: Watch | None,
    shown: Sequence[str],
    made_of: Mapping[str, str],
    result: Result,
) -> None:
    """Make the remaining steps; the other arguments are those of `finetune.loop.run`."""
    out, every = Path(settings.out), settings.save_lora_every

    def after(step: int) -> None:
        if every and step % every == 0:
            with snapshot(trainer, result.kind, out) as folder:
                if folder:
                    _write_card(folder, settings, result, step)

    run(
        trainer,
        out,
        steps,
        watch=watch,
        save_every=settings.save_every,
        log_every=settings.log_every,
        shown=shown,
        made_of=made_of,
        after=after,
    )


def finished(settings: TrainingRun, steps: int, made_of: Mapping[str, str]) -> bool:
    """Return whether this run's LoRA of `steps` steps exists, without loading its model.

    made_of: as in `begin`. The checkpoint must exist too, since it confirms the settings.
    """
    out = Path(settings.out)
    return settings.resume and (out / FILE).exists() and is_finished(out / "lora", steps, made_of)


def show(settings: TrainingRun) -> None:
    """Print the path of the finished LoRA, on the main process, after its upload if asked for."""
    if is_main():
        folder = Path(settings.out) / "lora"
        print(next(folder.glob("*.safetensors")))
        if settings.push_to_hub:
            print(hub.upload(folder, settings.push_to_hub))


@dataclass(frozen=True)
class Result:
    """What the model card of a LoRA says of its run.

    kind: the pipeline's class; base, method: for the title; about: returns lines about the data.
    """

    kind: Any
    base: str
    method: str
    about: Callable[[], Sequence[str]]


def export(trainer: Any, settings: TrainingRun, result: Result) -> Path:
    """Write lora/ with its card, and the report; return the weights' file.

    Every process must call this; the main one writes.
    """
    out, accelerator = Path(settings.out), trainer.learner.accelerator
    file, step = save(trainer, result.kind, out, settings.check.best)
    if accelerator.is_main_process:
        _write_card(out / "lora", settings, result, step)
        if (out / "log.csv").exists():
            page.write(out)
    accelerator.wait_for_everyone()
    return file


def _write_card(folder: Path, settings: TrainingRun, result: Result, step: int) -> None:
    out = Path(settings.out)
    text = (out / "settings.yaml").read_text(encoding="utf-8")
    kind, about = result.kind.__name__, result.about()
    card = model_card.About(result.base, kind, result.method, text, about, step)
    model_card.write(folder, card, out)
