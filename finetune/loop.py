"""The training loop: steps with a log, checks, checkpoints and resume, and export of the LoRA.

A trainer has `learner`, `step`, `train_step()`, `state_dict()` and `load_state_dict()`, as those of
`finetune.gdro`, `finetune.grpo` and `finetune.nft` do. The loop writes log.csv, checks.csv, grids/,
best.safetensors, state.pt and lora/ to its folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import checks, lora
from .checks import Watch
from .files import atomic
from .learner import Learner
from .state import FILE, FINISHED, load_state, save_state

__all__ = ["begin", "export", "run", "snapshot"]


def begin(
    trainer: Any,
    out: Path,
    steps: int,
    *,
    resume: bool = False,
    adapter: str | None = None,
    made_of: Mapping[str, str] | None = None,
) -> None:
    """Load the LoRA `adapter` as the starting point, if given, and the checkpoint if `resume`.

    resume: whether to continue from the folder's checkpoint; without it, a folder that has one is
    refused. made_of: digests of
    the model and the data, by name, which must match the checkpoint's; `finetune.state.check_out`
    compares the settings. Raises ValueError as `load_state` does.
    """
    learner: Learner = trainer.learner
    if (out / FILE).exists() and not resume:
        raise ValueError(f"{out} holds a run; pass resume=True, or give another out")
    if adapter:
        part, alpha = learner.model.part, learner.settings.alpha
        learner.start_from(lora.read(Path(adapter), part, learner.weights, alpha))
    if resume:
        load_state(trainer, out, made_of or {}, steps)
    if learner.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for table in ("log.csv", "checks.csv"):
            checks.rewind(out / table, trainer.step)
    learner.accelerator.wait_for_everyone()  # before all read the table of checks


def run(
    trainer: Any,
    out: Path,
    steps: int,
    *,
    watch: Watch | None = None,
    save_every: int = 50,
    log_every: int = 10,
    shown: Sequence[str] = (),
    made_of: Mapping[str, str] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Make the remaining steps, with logs, checks and checkpoints.

    Every process must call this; the main one writes. watch: the checks to make; shown: columns of
    the log for the progress bar; made_of: as for `begin`; after: called with the number of steps
    after every one, before the checkpoint.
    """
    learner: Learner = trainer.learner
    main, recent = learner.accelerator.is_main_process, []
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
            tqdm.write(f"stopped at step {step}: {watch.check.best} no longer increases")
            break
        bar.set_description("training")
        start = time.monotonic()
        recent.append(trainer.train_step() | {"seconds": time.monotonic() - start})
        done = step + 1
        if done % log_every == 0 and main:
            means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
            checks.append(out / "log.csv", {"step": done} | means)
            learner.accelerator.log(means, done)
            bar.set_postfix({k: f"{means[k]:.3g}" for k in shown})
            recent.clear()
        if watch and (done % watch.check.every == 0 or done == steps):
            bar.set_description("check")
            _check(learner, done, watch, out)
        if after:
            after(done)
        if done % save_every == 0 or done == steps:
            save_state(trainer, out, main, made_of or {})


def _check(learner: Learner, step: int, watch: Watch, out: Path) -> None:
    """Check the averaged weights; save the row, the grid, and the weights if they are the best.

    The weights are saved before the row, so that the best row's weights always exist.
    """
    accelerator = learner.accelerator
    with learner.averaged():
        row, grid = watch.look(learner.model.part, learner.bare, accelerator)
    weights = lora.whole(learner.average.weights)
    row = {"step": step} | row
    rows = [*checks.read(out / "checks.csv"), row]
    best = checks.best_row(rows, watch.check.best)  # any error is raised in all processes
    if accelerator.is_main_process:
        if best["step"] == step:
            save_file(lora.copy(weights), out / "best.safetensors")
        checks.append(out / "checks.csv", row)
        (out / "grids").mkdir(exist_ok=True)
        grid.save(out / "grids" / f"{step:06d}.png")
        accelerator.log({name: row[name] for name in row if name != "step"}, step)
        tqdm.write(json.dumps({k: round(v, 4) for k, v in row.items()}), file=sys.stdout)
    accelerator.wait_for_everyone()


def export(trainer: Any, kind: Any, out: Path, best: str = "held_out/reward") -> tuple[Path, int]:
    """Write the LoRA to out/lora; return its file and the step of its weights.

    The weights are those of the best check by the metric `best`, or the last average if there were
    no checks. Every process must call this; the main one writes. kind: the pipeline's class.
    """
    learner: Learner = trainer.learner
    main = learner.accelerator.is_main_process
    step, chosen = trainer.step, learner.average.weights
    rows = checks.read(out / "checks.csv")
    if rows:
        step = int(checks.best_row(rows, best)["step"])
        chosen = _best(out / "best.safetensors")
    if main:
        (out / "lora" / FINISHED).unlink(missing_ok=True)  # written by a run of fewer steps
    return _write(learner, kind, out / "lora", chosen), step


@contextmanager
def snapshot(trainer: Any, kind: Any, out: Path) -> Iterator[Path | None]:
    """Write the average of the LoRA to a folder named by the step, such as out/lora-000100.

    Yields, on the main process, the folder to add files to before it gets that name, and None on
    the others. Every process must call this.
    """
    learner: Learner = trainer.learner
    folder = out / f"lora-{trainer.step:06d}"
    if not learner.accelerator.is_main_process:
        _write(learner, kind, folder, learner.average.weights)
        yield None
        return
    with atomic(folder) as scratch:
        _write(learner, kind, scratch, learner.average.weights)
        yield scratch


def _write(learner: Learner, kind: Any, folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write these weights of the LoRA to a folder, on the main process; return the file."""
    part, main = learner.model.part, learner.accelerator.is_main_process
    with lora.swapped(learner.weights, weights):
        return lora.save(kind, part, learner.bare, folder, main)


def _best(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}, the weights of the best check, cannot be read ({error}); train again with "
            "another out="
        ) from None
