"""Atomic writing of files and folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic", "disk_errors", "write"]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` at the end.

    If the block fails, the temporary file is removed and `path` is unchanged. Leftovers of a
    process that was killed are removed first.
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


@contextmanager
def disk_errors(place: object, advice: str) -> Iterator[None]:
    """Turn an OSError of the block, such as a full disk, into a ValueError that ends in advice."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.filename and str(error.filename) != str(place):
            why += f": {error.filename}"
        raise ValueError(f"cannot read or write {place} ({why}); {advice}") from error


def write(path: Path, text: str) -> None:
    """Write text and a newline as UTF-8, creating the parent folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
