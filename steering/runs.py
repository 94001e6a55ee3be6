"""The folder of a run: what was asked for in manifest.json, and results, each whole or not there.

A run that was cut off is carried on by asking for the same again: what is finished is skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from steering import report

if TYPE_CHECKING:
    from steering.result import Steered

__all__ = ["draw", "folder_name", "keep", "open_run"]

_ROWS_PER_GRID = 30


def open_run(out: Path, manifest: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder and its manifest.json, or check that the one there asked for the same.

    `manifest["settings"]` and `manifest["prompts"]` have to agree; other entries may differ. Raises
    ValueError where they do not, where there is a run that is not to be resumed, and where nothing
    can be written. A run that has not finished anything is none.
    """
    path = out / "manifest.json"
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    if path.exists() and any(out.glob("[0-9]*-*/")):
        if not resume:
            raise ValueError(f"{out} holds a run: --resume carries it on, another --out spares it")
        _check_same(_read_manifest(path), json.loads(text), out)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = path.with_name(".manifest.json.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ValueError(
            f"cannot write in {out} ({error.strerror}): choose another --out"
        ) from None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(manifest["settings"]), "prompts": list(manifest["prompts"])}
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is not the manifest of a run: choose another --out") from None


def _check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    before, now = old["settings"], new["settings"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{out} was begun with {name}={before.get(name)!r}, not {now.get(name)!r}: "
                "carry it on as it was, or choose another --out"
            )
    if old["prompts"] != new["prompts"]:
        raise ValueError(f"{out} was begun with other prompts: give those, or choose another --out")


def folder_name(index: int, prompt: str) -> str:
    """A name that any file system takes, whatever the prompt says: "0007-a-red-circle"."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only.lower())[:40].strip("-")
    return f"{index:04d}-{words or 'prompt'}"


def keep(folder: Path, results: Mapping[str, Steered]) -> None:
    """Save each result under its name in `folder`, which appears when all is written."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was cut off here
    for name, result in results.items():
        result.save(part / name)
    os.replace(part, folder)


def draw(out: Path, folders: Sequence[Path]) -> list[Path]:
    """Write grid.png (and grid-2.png, ... for many prompts) and history.png of what `keep` saved.

    Each holds a result "steered", and a result "plain" (min_ess=0) where there is a comparison.
    """
    traces = [trace for folder in folders for trace in report.traces(folder / "steered")]
    paths = [_write(report.history(traces), out / "history.png")]
    # one grid's pictures at a time: a run may hold more than the memory does
    rows = (row for folder in folders for row in report.rows(folder / "steered", folder / "plain"))
    while page := list(itertools.islice(rows, _ROWS_PER_GRID)):
        name = f"grid-{len(paths)}.png" if len(paths) > 1 else "grid.png"
        paths.append(_write(report.comparison(page), out / name))
    return sorted(paths)


def _write(picture: Image.Image, path: Path) -> Path:
    part = path.with_name(f".{path.name}.part")
    picture.save(part, "png")
    os.replace(part, path)
    return path
