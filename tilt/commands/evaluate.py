"""Evaluate a fine-tuned model: base, tuned, steered and both, with the same prompts and seeds.

Writes evaluation.md, evaluation.json and grid.png into the folder --out; docs/evaluate.md explains
them. If it is inside the folder of a training run, that run's report.html shows the table, too.
To resume an interrupted evaluation, repeat the command with --resume.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rewards
from finetune import ranges
from finetune.ranges import FLAG, NAME, SEED, TEXT, optional, setting, whole
from rewards.combine import component_names
from rewards.geneval.rules import TASKS
from rewards.images import to_images
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import quoted_text
from rewards.samples import Sample
from rewards.sets import vendi
from steering import tiny
from steering.frames import Frames
from steering.manifest import fingerprint, versions
from tilt import digests, drawing, exit_status, loading, measures, offloading, started
from tilt.commands.score import load, score, texts, versioned
from tilt.framing import scorer
from tilt.measures import Measure
from tilt.options import Options
from tilt.processes import is_main, join
from tilt.prompts import read
from tilt.report import training as page
from tilt.score_table import Table
from tilt.variants import (
    EvaluationPlan,
    Variant,
    draw,
    grid,
    is_finished,
    open_folder,
    pending,
    picture,
    pictures,
    start,
    write,
)
from tilt.wording import counted

# two detector sizes of the OCR engine, since each makes different errors
READERS = {"": "", "_160": ", detector at 160 px"}
READ = (
    "exact=ocr(mode=exact) + exact_160=ocr(mode=exact, limit_side_len=160)"
    " + cer=ocr(mode=cer) + cer_160=ocr(mode=cer, limit_side_len=160)"
)
TITLES = {"rewards": "Rewards", "text": "Text", "tasks": "GenEval's tasks"}
BATCH = 32


@dataclass
class Evaluate(drawing.Drawing):
    """The images to generate, and the rewards that score them."""

    prompts: str = setting(
        "", TEXT, "file of prompts that were not trained on: one per line, or .jsonl"
    )
    lora: str | None = setting(None, optional(NAME), "LoRA weights of the tuned model, if any")
    resume: bool = setting(False, FLAG, "generate and score only what is missing")
    images: int = setting(4, whole(1, 10_000), "images per prompt in every variant")
    reward: str = setting("", TEXT, "reward that scores the images, as in 'ocr + 0*clip'")
    steer: str | None = setting(
        None, optional(NAME), "reward of the steered variants; without it, there are none"
    )
    particles: int = setting(
        0, whole(0, 10_000), "particles per steered image, which is the best of them"
    )
    objects: str = setting(
        "objects",
        NAME,
        "detector for prompts in GenEval's form, as in 'objects(detector=owlv2)'",
    )
    embed: str | None = setting(
        None,
        optional(NAME),
        "reward whose features measure diversity; dino(tiny) for embedded models",
    )
    seed: int = setting(0, SEED, "seed of the images and of the bootstrap")


EXAMPLES = """\
examples:
  tilt evaluate --prompts unseen.txt --out runs/tuned/eval --lora runs/tuned/lora \\
    --reward "ocr + 0*clip(tiny)" --steer ocr --particles 4 --call.guidance-scale 1
"""
OPTIONS = Options("tilt evaluate", Evaluate, __doc__ or "", EXAMPLES)


class Job(NamedTuple):
    """A table of scores for every variant: a reward's scores for the prompts `rows`."""

    name: str
    reward: rewards.WeightedSum
    rows: list[int]


def plan_of(settings: Evaluate) -> EvaluationPlan:
    """Return the plan of the evaluation, with each prompt once."""
    if not settings.prompts or not settings.out or not settings.reward:
        raise ValueError("set prompts=FILE, out=FOLDER and reward=SPEC")
    known: dict[str, tuple[str, ...]] = {}
    for prompt in read(Path(settings.prompts)):
        known.setdefault(prompt.text, prompt.references)
    defaults = tiny.call_defaults(settings.model) if settings.model in tiny.NAMES else {}
    return EvaluationPlan(
        prompts=tuple(known),
        references=tuple(known.values()),
        images=settings.images,
        seed=settings.seed,
        max_batch=settings.max_batch,
        call=drawing.call_of(settings.call, defaults),
    )


def judge(spec: str, plan: EvaluationPlan, device: torch.device) -> rewards.WeightedSum:
    """Load a reward; raises ValueError if it cannot score every prompt."""
    reward = load(spec, device, plan.prompts)
    if reward.needs_references and not all(plan.references):
        raise ValueError(f"{spec!r} compares with reference images; give some for every prompt")
    return reward


def variants_of(settings: Evaluate, plan: EvaluationPlan, device: torch.device) -> list[Variant]:
    """Return base, tuned if there is a LoRA, and both of them steered if `steer` is set."""
    k, plain, fk = settings.particles, [Variant("base")], drawing.filter_of(settings.filter)
    if bool(settings.steer) != bool(k) or k < 0 or k == 1:
        raise ValueError(
            f"steer is {settings.steer!r} and particles {k}, which must be set together, with two "
            "particles or more; set both or neither"
        )
    if not settings.steer:
        ranges.refuse_idle(settings, ["filter"], "steer= is not set")
    if settings.lora:
        plain.append(Variant("tuned", adapted=True))
    if not settings.steer:
        return plain
    reward = judge(settings.steer, plan, device)
    names = {"base": "steered", "tuned": "both"}
    steered = [
        replace(v, name=names[v.name], reward=reward, particles=k, settings=fk) for v in plain
    ]
    return plain + steered


def jobs_of(settings: Evaluate, plan: EvaluationPlan, device: torch.device) -> list[Job]:
    """Return jobs for the reward, and for OCR and detector on the prompts that they can score."""
    detector = rewards.load(settings.objects, device, imports=True)
    if [type(part.reward) for part in detector.parts] != [ObjectsReward]:
        raise ValueError(f"objects is {settings.objects!r} but must be a single objects(...)")
    jobs = [Job("rewards", judge(settings.reward, plan, device), list(range(len(plan.prompts))))]
    for name, reward in (("text", rewards.load(READ, device)), ("tasks", detector)):
        rows = [i for i, prompt in enumerate(plan.prompts) if _applies(reward, prompt)]
        jobs += [Job(name, reward, rows)] if rows else []
    return jobs


def _applies(reward: rewards.WeightedSum, prompt: str) -> bool:
    try:
        reward.check([prompt])
    except ValueError:
        return False
    return True


def tower_of(settings: Evaluate, device: torch.device) -> Any:
    """Return the network whose image features measure diversity, or None."""
    if settings.embed and settings.images < 2:
        raise ValueError(
            f"embed is {settings.embed!r:.80} but images is 1, and diversity needs two images or "
            "more per prompt; set images=2, or leave embed out"
        )
    spec = settings.embed or ("dino(tiny)" if settings.model in tiny.NAMES else "")
    if not spec or settings.images < 2:
        return None
    reward = rewards.load(spec, device, imports=True).parts[0].reward
    tower = reward if hasattr(reward, "image_features") else getattr(reward, "towers", None)
    if tower is None:
        raise ValueError(f"embed is {spec!r}, which has no features; use dino or clip")
    return tower


def run(settings: Evaluate, line: str) -> None:
    """Check everything and generate this process's images; the main process scores all images."""
    plan, settings = plan_of(settings), loading.resolved(settings)
    frames = Frames(settings.score_frames, settings.video_score)
    out, lora = Path(settings.out).resolve(), digests.of_weights(settings.lora)
    if settings.resume and is_finished(out, plan, asdict(settings), lora):
        if is_main():
            show(Path(settings.out))
        return
    processes = join("auto")
    device = processes.device or loading.pick_device("auto")
    variants, jobs, tower, pipe, preview = processes.agree(lambda: ready(settings, plan, device))
    networks = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    about = asdict(plan) | {
        "model": settings.model,
        "lora": lora,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "weights": {name: fingerprint(part) for name, part in networks.items()},
        "variants": [asdict(replace(v, reward=v.reward and v.reward.spec)) for v in variants],
    }
    if settings.steer:
        about["steer"] = scorer(versioned(settings.steer), frames)
    scorers = {job.name: scorer(versioned(job.reward.spec), frames) for job in jobs}
    scorers |= {"folder": str(out)}
    processes.told(lambda: open_folder(out, about, scorers, settings.resume))
    for variant in variants:
        if settings.lora:
            (pipe.enable_lora if variant.adapted else pipe.disable_lora)()
        folder = out / variant.name
        mine = range(processes.index, len(plan.prompts), processes.count)
        which = [i for i in pending(folder, plan) if i in mine]
        made = start(pipe, variant, plan, which, preview, frames)
        work = draw(folder, plan, which, made)
        for _ in tqdm(work, variant.name, len(which), disable=not processes.is_main):
            pass
    processes.finish()
    if processes.is_main:
        del pipe, networks
        names = [variant.name for variant in variants]
        with_frames = partial(scored, plan=plan, device=device, frames=frames)
        found = {j.name: {n: with_frames(j, out / n) for n in names} for j in jobs}
        sections = {TITLES[j.name]: measures_of(j, found[j.name], plan.prompts) for j in jobs}
        if tower is not None:
            sections["Diversity"] = diversity(tower, out, names, plan, device)
        grid(out, plan, {n: found["rewards"][n]["reward"] for n in names}).save(out / "grid.png")
        report(settings, plan, {t: [m.finite() for m in ms] for t, ms in sections.items()}, line)


def ready(settings: Evaluate, plan: EvaluationPlan, device: torch.device) -> tuple[Any, ...]:
    """Return variants, jobs, network of features, pipeline and preview decoder, all checked."""
    variants = variants_of(settings, plan, device)
    jobs, tower = jobs_of(settings, plan, device), tower_of(settings, device)
    dtype = loading.DTYPES[settings.dtype]
    started.say(f"loading {settings.model}")
    pipe = loading.load_pipeline(settings.model, dtype, settings.lora, settings.quantize)
    pipe = offloading.place(pipe, device, settings.offload)
    pipe.set_progress_bar_config(disable=True)
    preview = loading.load_preview("auto", settings.model, dtype)
    preview = preview and preview.to(device)
    for variant in variants:
        frames = Frames(settings.score_frames, settings.video_score)
        start(pipe, variant, plan, [], preview, frames)
    return variants, jobs, tower, pipe, preview


def scored(
    job: Job, folder: Path, plan: EvaluationPlan, device: torch.device, frames: Frames
) -> dict[str, Tensor]:
    """Score a variant's images, except those on disk; returns {component: (prompts, images)}."""
    samples = [
        Sample(picture(folder, i, j), plan.prompts[i], tuple(map(Path, plan.references[i])))
        for i in job.rows
        for j in range(plan.images)
    ]
    spec = scorer(versioned(job.reward.spec), frames)
    table = Table(folder / f"{job.name}.csv", spec, resume=True)
    size = 1 if samples[0].image.is_dir() else BATCH  # a video has many frames
    rows = [texts(sample, job.reward.wants_references) for sample in samples]
    missing = [samples[i] for i in table.missing(rows)]
    score(job.reward, missing, table, size, device, frames=frames)
    table.finish(rows)
    names = ["reward", *component_names(job.reward.parts)]
    columns = {n: torch.tensor([row[n] for row in table.rows], dtype=torch.float64) for n in names}
    return {name: column.view(len(job.rows), plan.images) for name, column in columns.items()}


def measures_of(
    job: Job, found: dict[str, dict[str, Tensor]], prompts: Sequence[str]
) -> list[Measure]:
    """Return the measures of a job's scores, {variant: {component: (prompts, images)}}."""
    own, names = [prompts[i] for i in job.rows], list(found["base"])
    columns = {n: {variant: scores[n] for variant, scores in found.items()} for n in names}
    if job.name == "text":
        letters = [len("".join("".join(quoted_text(prompt)).split())) for prompt in own]
        return measures.of_text(columns, READERS, job.rows, letters)
    if job.name == "tasks":
        (detector,) = job.reward.parts
        tags = [detector.reward.entry(prompt).tag for prompt in own]
        return measures.of_tasks(columns[detector.name], job.rows, tags, TASKS)
    # with one component of weight 1, the total is redundant
    alone = [part.weight for part in job.reward.parts if part.weight] == [1]
    return [Measure(name, columns[name], job.rows) for name in names[alone:]]


@torch.no_grad()
def diversity(
    tower: Any, out: Path, names: Sequence[str], plan: EvaluationPlan, device: torch.device
) -> list[Measure]:
    """Measure how much the images of one prompt differ in the tower's features."""
    distances, vendis = {}, {}
    for name in names:
        sets = (pictures(out / name, i, plan.images) for i in range(len(plan.prompts)))
        x = torch.stack([tower.image_features(to_images(each, device)).cpu() for each in sets])
        distances[name] = measures.spread(x)[:, None]
        vendis[name] = torch.stack([vendi(features) for features in x])[:, None]
    rows = list(range(len(plan.prompts)))
    return [Measure("cosine distance", distances, rows), Measure("Vendi score", vendis, rows)]


def report(
    settings: Evaluate, plan: EvaluationPlan, sections: dict[str, list[Measure]], line: str
) -> None:
    """Write the tables as evaluation.md and all numbers as evaluation.json."""
    out, seed = Path(settings.out), settings.seed
    tables = [f"## {t}\n\n{measures.markdown(ms, seed)}" for t, ms in sections.items()]
    used = {k: v for k, v in asdict(settings).items() if k != "resume" and v not in ("", None, {})}
    about = [
        f"# Evaluation of {settings.model}{f' with {settings.lora}' if settings.lora else ''}",
        f"{counted(len(plan.prompts), 'prompt')}, "
        f"{counted(plan.images, 'image')} per prompt in every variant, paired by their noise. "
        "Figures are means over prompts with 95 % percentile bootstrap intervals over prompts; "
        "wins are images better than the base's image from the same noise, ties counting ½."
        + f" A steered image is the best of {settings.particles} particles."
        * bool(settings.steer),
        f"    {line}",
    ]
    if picture(out / "base", 0, 0).is_dir():
        frames = Frames(settings.score_frames, settings.video_score)
        about.append(
            f"Each is a video, such as base/0000-00/video.webp, whose score is {frames}. The grid "
            "shows the middle frames, and diversity is measured on them."
        )
    end = [
        "![the first prompts](grid.png)",
        "Settings: " + ", ".join(f"`{k}={v}`" for k, v in used.items()),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()),
    ]
    write(out / "evaluation.md", "\n\n".join([*about, *tables, *end]))
    every = {
        "command": line,
        "settings": asdict(settings),
        "lora": digests.of_weights(settings.lora),
        "versions": versions(),
        "prompts": plan.prompts,
        "sections": {t: [measures.numbers(m, seed) for m in ms] for t, ms in sections.items()},
    }
    write(out / "evaluation.json", json.dumps(every, indent=1, ensure_ascii=False))
    show(out)


def show(out: Path) -> None:
    """Print the tables and the paths of the written files."""
    made = [out / "grid.png"]
    if (out.parent / "log.csv").exists():  # inside a training run, whose report shows it too
        made.append(page.write(out.parent))
    print((out / "evaluation.md").read_text(encoding="utf-8"), *made, sep="\n")


def main(argv: Sequence[str]) -> int:
    """Return the exit status of `exit_status.of_run`."""
    work = partial(run, line=shlex.join(["tilt", "evaluate", *argv]))
    return exit_status.of_run(OPTIONS, argv, work, "finished images are kept", "*/[0-9]*")
