"""Checks of a run's folder: whether it may be used, and whether its run may be resumed.

Every command that makes a folder calls these functions, so that all of them refuse the same things
in the same words: a folder that holds other files, a run without `resume`, and settings that differ
from those the run began with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import disk_errors

__all__ = ["ELSEWHERE", "begun", "flat", "refuse_changes"]

ELSEWHERE = "give another out="  # advice for a folder that cannot be used


def begun(
    folder: Path, record: str, results: str = "", *, kind: str = "run", resume: bool = False
) -> bool:
    """Return whether the folder holds results to resume from; nothing is written.

    record: the file that every folder of this kind has. results: a pattern of the files that a new
    run would overwrite, by default the record. Raises ValueError if the folder is a file or cannot
    be read, if it holds files without the record (those whose names begin with a dot do not
    count), and if it holds results and `resume` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as out=")
    with disk_errors(folder, ELSEWHERE):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        found = any(folder.glob(results or record))
    seen = [name for name in names if not name.startswith(".")]
    if seen and record not in seen:
        raise ValueError(
            f"{folder} is not empty: it holds other files, such as {seen[-1]}, and no {kind}; "
            f"{ELSEWHERE}"
        )
    if found and not resume:
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} holds {article} {kind}; add resume=true, or {ELSEWHERE}")
    return found


def refuse_changes(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    alike: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Raise ValueError for the first entry that differs from when the run began.

    Nested entries are compared one by one. Those below "weights" are fingerprints, which are not
    shown.
    """
    old, new = dict(flat(before)), dict(flat(now))
    for name in sorted(old.keys() | new.keys()):
        was, given = old.get(name), new.get(name)
        if alike(was, given):
            continue
        said = f"{name}={was!r}, not {given!r}"
        if name.partition(".")[0] == "weights":
            said = "other weights of the model"
        elif len(said) > 200:
            said = f"another {name}="
        raise ValueError(f"{folder} was begun with {said}; continue it as it was, or {ELSEWHERE}")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested mappings with dotted names, such as ("check.every", 50)."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        elif not isinstance(value, Mapping):
            yield prefix + name, value
