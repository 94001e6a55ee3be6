"""Scores of many images as a table on disk, which is written batch by batch and can be resumed.

During a run, `NAME.part` contains a JSON line that names the reward, and then one per row; each
further process of the run has its own file, `NAME.part-1` and so on. The complete table is NAME: a
.parquet file with the reward's spec in its metadata, or a .csv file with the spec in `NAME.spec`
beside it.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from finetune.files import atomic, disk_errors

__all__ = [
    "TEXTS",
    "Table",
    "ensure_writable",
    "is_scored",
    "read_table",
    "spec_of",
    "working_files",
    "writable",
    "write_table",
]

SUFFIXES = (".csv", ".parquet")
TEXTS = ("image", "prompt", "references")  # the columns that identify a row; all others are scores


class Table:
    """Rows that are kept after an interruption, each identified by its `TEXTS`.

    Args:
        path: The .csv or .parquet file to write.
        spec: The full text form of the reward; existing rows must have the same.
        resume: Whether existing rows are kept; without it they are an error.
        index: This process's index among those that write the table together. All of them must
            have made theirs before one adds rows, and the first one calls `collect` at the end.
    """

    def __init__(self, path: Path, spec: str, resume: bool = False, index: int = 0) -> None:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"the table {path} must end in one of {list(SUFFIXES)}")
        if path.suffix == ".parquet":
            _arrow()
        self.path, self.spec = path, spec
        self.part = path.with_name(f"{path.name}.part{f'-{index}' if index else ''}")
        if not resume and (path.exists() or working_files(self.path)):
            raise ValueError(f"{path} exists; add --resume, or give another --out")
        ensure_writable(path)
        self.rows: list[dict[str, Any]] = []
        self._begun = False
        if working_files(self.path):
            self.collect()
        elif path.exists():
            self._check(spec_of(path))
            self.rows = read_table(path)

    def collect(self) -> None:
        """Read the rows of all processes' working files, in which a row may be more than once.

        Of two that are the same row, one that has its scores is kept, or else the later one.
        """
        rows = {_key(row): row for row in self.rows}
        for part in working_files(self.path):
            was, found = _read_part(part)
            self._check(self.spec if was is None else was)
            for row in found:
                if is_scored(row) or not is_scored(rows.get(_key(row), row)):
                    rows[_key(row)] = row
        self.rows = list(rows.values())

    def _check(self, was: str) -> None:
        if was != self.spec:
            by = repr(was) if was else "an unnamed reward"
            raise ValueError(
                f"{self.path} was scored by {by}, not {self.spec!r}; give another --out"
            )

    def missing(self, wanted: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the indices of `wanted`, rows given by their `TEXTS`, that have no scores yet.

        The table lacks them, or one of their scores is NaN. Raises ValueError if the table contains
        rows that are not wanted.
        """
        asked = {_key(row) for row in wanted}
        scored = {_key(row) for row in self.rows if is_scored(row)}
        extra = [row for row in self.rows if _key(row) not in asked]
        if extra:
            raise ValueError(
                f"{self.path} contains rows that are not asked for ({len(extra)}), the first of "
                f"{extra[0]['image']} with the prompt {extra[0]['prompt']!r}; ask for these too, "
                "or give another --out"
            )
        return [i for i, row in enumerate(wanted) if _key(row) not in scored]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and write them to disk; raises ValueError if that fails."""
        with writable(self.part):
            if self._begun:
                with self.part.open("a", encoding="utf-8") as file:
                    file.write(_lines(rows))
            else:  # the first write of this run rewrites the file, with the existing rows
                with atomic(self.part) as scratch:
                    text = _lines([{"reward": self.spec}, *self.rows, *rows])
                    scratch.write_text(text, encoding="utf-8")
                self._begun = True
        self.rows.extend(rows)

    def finish(self, wanted: Sequence[Mapping[str, str]]) -> bool:
        """Write the table in this order and delete the working files; False if it was complete."""
        order, rows = [_key(row) for row in wanted], {_key(row): row for row in self.rows}
        whole = self.path.exists() and not working_files(self.path)
        if whole and order == [_key(row) for row in self.rows]:
            return False
        self.rows = [rows[key] for key in order]
        with writable(self.path):
            write_table(self.path, self.rows, self.spec)
            for part in working_files(self.path):
                part.unlink()
        return True


def working_files(path: Path) -> list[Path]:
    """Return the existing working files of all processes that write the table `path`."""
    first = path.with_name(path.name + ".part")
    return [first] * first.exists() + sorted(path.parent.glob(f"{glob.escape(first.name)}-*"))


def writable(path: Path) -> AbstractContextManager[None]:
    """Return a context in which a failing disk becomes a ValueError that says how to resume."""
    advice = "the scores written before are kept: fix the cause, then repeat with --resume"
    return disk_errors(path, advice)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in TEXTS)


def is_scored(row: Mapping[str, Any]) -> bool:
    """Return whether no score of a row is NaN, which stands for a score that is missing."""
    return not any(_is_nan(value) for value in row.values())


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ensure_writable(path: Path) -> None:
    """Create the folder of a file; raises ValueError if the file is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give another path"
        ) from error


def write_table(path: Path, rows: Sequence[dict[str, Any]], spec: str = "") -> None:
    """Write rows of equal keys as .csv or .parquet, atomically; NaN becomes an empty cell."""
    if path.suffix == ".parquet":
        arrow = _arrow()
        table = arrow.Table.from_pylist(list(rows)).replace_schema_metadata({"spec": spec})
        with atomic(path) as scratch:
            arrow.parquet.write_table(table, scratch)
        return
    _spec_file(path).write_text(spec, encoding="utf-8")
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "" if _is_nan(v) else v for k, v in row.items()} for row in rows)


def spec_of(path: Path) -> str:
    """Return the spec of the reward of a table, or "" if it is not recorded."""
    try:
        if path.suffix == ".parquet":
            return (_arrow().parquet.read_schema(path).metadata or {}).get(b"spec", b"").decode()
        file = _spec_file(path)
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _spec_file(path: Path) -> Path:
    return path.with_name(path.name + ".spec")


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table, with numbers as floats and empty cells of scores as NaN.

    Truncated rows are left out. Raises ValueError if the file is not a table of scores.
    """
    try:
        if path.suffix == ".parquet":
            found = _arrow().parquet.read_table(path).to_pylist()
            return [_row(row) for row in found]
        text = path.read_bytes().decode("utf-8")
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline="")))
        if rows and not text.endswith("\n"):  # the last number may be truncated
            rows.pop()
        return [_row(row) for row in rows if None not in row.values()]
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        raise _damaged(path, error) from None


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row["image"], str) or not isinstance(row["prompt"], str):
        raise TypeError("a row has no image or no prompt")
    scores = {k: v for k, v in row.items() if k not in TEXTS}
    blank = ("", None)
    return {k: row[k] for k in TEXTS if k in row} | {
        k: math.nan if v in blank else float(v) for k, v in scores.items()
    }


def _read_part(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the spec and the rows of a working file; the spec is None if the file is empty."""
    try:
        # not splitlines(), which also splits at other characters that a prompt may contain
        *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
        was = str(json.loads(lines[0])["reward"]) if lines else None
        return was, [_row(dict(json.loads(line))) for line in lines[1:]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    said = " ".join(str(error).split())
    return ValueError(
        f"{path} is not a table of scores, or is damaged ({said:.200}); delete it, or give "
        "another --out"
    )


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "a .parquet table needs pyarrow: pip install pyarrow, or name a .csv file"
        ) from error
    return pyarrow


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
