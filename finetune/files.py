"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic", "write"]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under, which becomes `path` at the end.

    Where the block fails, nothing is left of it, and `path` stays as it was. What a process that
    was killed has left under that name is removed.
    """
    scratch = path.with_name(f".{path.name}.part")
    _remove(scratch)
    try:
        yield scratch
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        _remove(scratch)


def write(path: Path, text: str) -> None:
    """Write text and a newline, as UTF-8; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
