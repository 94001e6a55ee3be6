"""Checkpoints of a training run: written atomically and read without unpickling."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config
from .files import atomic
from .folder import ELSEWHERE, begun, flat, refuse_changes

__all__ = ["FILE", "FINISHED", "check_out", "finish", "is_finished", "load_state", "save_state"]

FILE, RECORD, FINISHED = "state.pt", "settings.yaml", "finished.json"
# Settings that may change when a run is resumed: its length, its reports, and what affects only
# memory and speed.
MAY_CHANGE = {
    "out", "resume", "steps", "save_every", "log_every", "save_lora_every", "wandb", "push_to_hub",
    "check.every", "check.patience", "micro_groups", "micro_images",
    "gradient_checkpointing", "compile", "offload",
}  # fmt: skip


def check_out(settings: Any, ignore: Collection[str] = ()) -> None:
    """Check before any work that the folder `settings.out` is new, or holds this run to resume.

    ignore: groups of settings that are not used. Raises ValueError for a folder with other files,
    for a run without `resume`, and for a setting that would change the run, by name.
    """
    out = Path(settings.out)
    if not begun(out, RECORD, FILE, kind="training run", resume=settings.resume):
        return
    try:
        before = dict(flat(asdict(config.read(type(settings), out / RECORD))))
    except ValueError as error:
        raise ValueError(f"{out} cannot be continued ({error}); {ELSEWHERE}") from None
    unused = set(ignore)
    if before.get("check.every") == 0:  # nothing was checked yet
        unused |= {"check"}
    may_change = MAY_CHANGE
    if before.get("dtype") == "auto":  # a run that did not record which type it was
        may_change = MAY_CHANGE | {"dtype"}

    def bound(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that must not change."""
        parts = {name: name.partition(".") for name in settings}
        return {
            name: settings[name]
            for name, (group, _, own) in parts.items()
            if not (name in may_change or own in MAY_CHANGE or group in unused)
        }

    refuse_changes(out, bound(before), bound(dict(flat(asdict(settings)))), _alike)


def _alike(before: Any, now: Any) -> bool:
    """Return whether two values are equal, or two paths of the same file, or lists of such."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(map(_alike, before, now))
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).absolute().resolve() == Path(now).absolute().resolve()
    return before == now


def save_state(
    trainer: Any, folder: Path, main: bool = True, made_of: Mapping[str, str] | None = None
) -> None:
    """Write `trainer.state_dict()` atomically, so that a full disk leaves the previous one intact.

    main: whether this process writes; all processes must call this. made_of: digests of the model
    and the data, by name, which `load_state` compares.
    """
    state = trainer.state_dict()
    if not main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic(folder / FILE) as scratch:
            torch.save(state | {"made_of": dict(made_of or {})}, scratch)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        said = getattr(error, "strerror", None) or "the disk may be full"
        kept = "; the one written before it is kept" if (folder / FILE).exists() else ""
        raise ValueError(
            f"the state of step {trainer.step} cannot be written to {folder} ({said}){kept}"
        ) from error


def load_state(
    trainer: Any,
    folder: Path,
    made_of: Mapping[str, str] | None = None,
    steps: int | None = None,
) -> bool:
    """Load the state from `folder` if there is one, without unpickling; return whether there is.

    Raises ValueError if the file is damaged or does not fit the trainer, if the run began with
    other digests than `made_of`, and if it has taken more than `steps` steps.
    """
    file = folder / FILE
    if not file.exists():
        return False
    unfit = f"give another out=, or delete {file} to begin anew"
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, whose messages give unsafe advice
        kind = type(error).__name__
        raise ValueError(f"{file} is damaged, or is no checkpoint ({kind}); {unfit}") from None
    if not isinstance(state, dict) or not all(map(_is_finite, state.values())):
        raise ValueError(f"{file} holds no checkpoint, or one that is not finite; {unfit}")
    was = state.pop("made_of", {})
    for name, digest in (made_of or {}).items():
        if was.get(name, digest) != digest:
            raise ValueError(
                f"{folder} was begun when {name}= stood for other contents under the same name; "
                "restore those, or give another out="
            )
    try:
        trainer.load_state_dict(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{file} does not fit this run ({said:.200}); {unfit}") from None
    if steps is not None and trainer.step > steps:
        raise ValueError(
            f"{folder} has taken {trainer.step} steps already, more than steps={steps}; set steps "
            "to that or more, or give another out="
        )
    return True


def is_finished(folder: Path, steps: int, made_of: Mapping[str, str]) -> bool:
    """Return whether `finish` recorded the weights in `folder` with these arguments."""
    try:
        was = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return was == {"steps": steps, "made_of": dict(made_of)} and any(folder.glob("*.safetensors"))


def finish(folder: Path, steps: int, made_of: Mapping[str, str]) -> None:
    """Record that the weights in `folder` are complete, after `steps` steps on these data."""
    text = json.dumps({"steps": steps, "made_of": dict(made_of)}, indent=1)
    (folder / FINISHED).write_text(text + "\n", encoding="utf-8")


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
