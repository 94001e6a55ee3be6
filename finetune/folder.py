"""Checks of a run's folder: whether it may be used, and whether its run may be resumed.

Every command that makes a folder calls these functions, so that all of them refuse the same things
in the same words: a folder that holds other files, a run without `resume`, and settings that differ
from those the run began with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["begun", "refuse_changes", "writing"]


def begun(
    folder: Path, record: str, results: str = "", *, kind: str = "run", resume: bool = False
) -> bool:
    """Return whether the folder holds results to resume from; nothing is written.

    record: the file that every folder of this kind has. results: a pattern of the files that a new
    run would overwrite, by default the record. Raises ValueError if the folder holds files without
    the record, if it holds results and `resume` is False, or if it cannot be read.
    """
    with writing(folder):
        names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    seen = [name for name in names if not name.startswith(".")]
    if seen and record not in seen:
        raise ValueError(
            f"{folder} is not empty and holds no {kind} ({seen[-1]}), and its files would be "
            "overwritten; give another out="
        )
    found = any(folder.glob(results or record))
    if found and not resume:
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} holds {article} {kind}; add resume=true, or give another out=")
    return found


def refuse_changes(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    alike: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Raise ValueError for the first entry that differs from when the run began."""
    for name in sorted(before.keys() | now.keys()):
        was, given = before.get(name), now.get(name)
        if alike(was, given):
            continue
        said = f"{name}={was!r}, not {given!r}"
        if len(said) > 200:
            said = f"another value of {name}"
        raise ValueError(
            f"{folder} was begun with {said}; continue it as it was, or give another out="
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block, such as a full disk, into a ValueError in one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write in {folder} ({error.strerror}); give another out="
        ) from None
