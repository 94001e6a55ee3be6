"""Conditioning in a folder: written by the main process, memory-mapped by all.

A folder holds parts with the tensors of some prompts each, where equal tensors, such as those of a
negative prompt, are stored once, and an index that says which tensors a prompt has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .conditioning import Conditioning, Form
from .files import atomic, disk_errors
from .folder import ELSEWHERE

__all__ = ["stored"]

IN_PART = 64  # prompts whose tensors are in memory at once


def stored(
    folder: Path,
    record: Callable[[Sequence[str]], Conditioning],
    prompts: Sequence[str],
    made_of: str,
    accelerator: Any,
) -> Conditioning:
    """Return the conditioning of prompts, memory-mapped; all processes must call this.

    The main process calls record(some of the prompts) and writes the folder, unless that holds
    what was made of the same. made_of: names the model and the call. Raises ValueError if the
    folder cannot be written or read.
    """
    about = hashlib.sha256(json.dumps([made_of, *prompts]).encode()).hexdigest()
    with disk_errors(folder, ELSEWHERE):
        if accelerator.is_main_process and _index(folder).get("made_of") != about:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic(folder) as scratch:
                _write(scratch, record, prompts, about)
        accelerator.wait_for_everyone()
        return _read(folder)


def _index(folder: Path) -> dict[str, Any]:
    """Return the index of a folder, {} if there is none."""
    try:
        return dict(json.loads((folder / "index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _write(
    folder: Path,
    record: Callable[[Sequence[str]], Conditioning],
    prompts: Sequence[str],
    made_of: str,
) -> None:
    folder.mkdir()
    rows: list[dict[str, list[str]]] = []  # of each prompt, by name: the part and the tensor's key
    known: dict[str, list[str]] = {}
    form = ""
    for first in range(0, len(prompts), IN_PART):
        given, part = record(prompts[first : first + IN_PART]).to("cpu"), f"{first:07d}.safetensors"
        form, tensors = given.form.dumps(), {}
        for i, row in enumerate(given.rows):
            places = {}
            for name, value in row.items():
                content, key = _digest(value), f"given.{first + i}.{name}"
                if content not in known:
                    known[content], tensors[key] = [part, key], value.contiguous()
                places[name] = known[content]
            rows.append(places)
        save_file(tensors, folder / part)
    index = {"made_of": made_of, "form": form, "rows": rows}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _digest(value: Tensor) -> str:
    held = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(held).hexdigest()}"


def _read(folder: Path) -> Conditioning:
    index, mapped = _index(folder), {}
    for part in {part for row in index["rows"] for part, _ in row.values()}:
        with safe_open(folder / part, "pt") as file:
            mapped[part] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    rows = [{name: mapped[part][key] for name, (part, key) in row.items()} for row in index["rows"]]
    return Conditioning(Form.loads(index["form"]), rows)
