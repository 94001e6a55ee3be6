"""The state of a run that is carried on: written whole, read without unpickling, never mixed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config
from .files import atomic
from .folder import begun, refuse_changes

__all__ = ["FILE", "FINISHED", "check_out", "finish", "is_finished", "load_state", "save_state"]

FILE, RECORD, FINISHED = "state.pt", "settings.yaml", "finished.json"
# What may differ between a run and its continuation: how far it goes, what is told of it, and what
# changes memory and speed alone.
MAY_CHANGE = {
    "out", "resume", "steps", "save_every", "log_every", "wandb", "check.every", "check.patience",
    "micro_groups", "gradient_checkpointing", "compile",
}  # fmt: skip


def check_out(settings: Any, ignore: Collection[str] = ()) -> None:
    """Check the folder `settings.out` before any work: it is fresh, or holds this very run.

    ignore: groups of settings that are not used. Raises ValueError for a folder of something else,
    for a run that is not to be resumed, and for a setting that would change it, by name.
    """
    out = Path(settings.out)
    if not begun(out, RECORD, FILE, kind="training run", resume=settings.resume):
        return
    try:
        before = dict(_flat(asdict(config.read(type(settings), out / RECORD))))
    except ValueError as error:
        raise ValueError(f"{out} cannot be continued ({error}); give another out=") from None
    free = MAY_CHANGE | set(ignore)
    if before.get("check.every") == 0:  # nothing was checked yet
        free |= {"check"}
    if before.get("dtype") == "auto":  # a run that did not record which type it was
        free |= {"dtype"}

    def bound(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that may not change."""
        parts = {name: name.partition(".") for name in settings}
        return {
            name: settings[name]
            for name, (head, _, tail) in parts.items()
            if not free & {name, head, tail}
        }

    refuse_changes(out, bound(before), bound(dict(_flat(asdict(settings)))), _alike)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _alike(before: Any, now: Any) -> bool:
    """Equal, or two names of one file."""
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).absolute().resolve() == Path(now).absolute().resolve()
    return before == now


def save_state(
    trainer: Any, folder: Path, main: bool = True, made_of: Mapping[str, str] | None = None
) -> None:
    """Write `trainer.state_dict()` whole or not at all: a full disk leaves the last good one.

    main: of several processes, which all have to call it, the one that writes. made_of: digests of
    what is trained on, by name, which `load_state` compares.
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
    """Carry on from a state if there is one; read without unpickling: tensors and plain data.

    Raises ValueError for a file that is damaged or of something else, where the run was begun on
    other data than `made_of` says, and for one that has gone beyond `steps`.
    """
    file = folder / FILE
    if not file.exists():
        return False
    unfit = f"give another out=, or delete {file} to begin anew"
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and with advice that must not be followed
        kind = type(error).__name__
        raise ValueError(f"{file} is damaged, or no state of a run ({kind}); {unfit}") from None
    if not isinstance(state, dict) or not all(map(_is_finite, state.values())):
        raise ValueError(f"{file} holds no state of a run, or one that is not finite; {unfit}")
    was = state.pop("made_of", {})
    for name, digest in (made_of or {}).items():
        if was.get(name, digest) != digest:
            raise ValueError(
                f"{folder} was begun when {name}= held something else under the same name; bring "
                "that back, or give another out="
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
    """Whether the weights in `folder` are those that `finish` spoke of, told without any model.

    steps, made_of: as there.
    """
    try:
        was = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return was == {"steps": steps, "made_of": dict(made_of)} and any(folder.glob("*.safetensors"))


def finish(folder: Path, steps: int, made_of: Mapping[str, str]) -> None:
    """Write down that the weights in `folder` are whole: of so many steps, on these data."""
    text = json.dumps({"steps": steps, "made_of": dict(made_of)}, indent=1)
    (folder / FINISHED).write_text(text + "\n", encoding="utf-8")


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
