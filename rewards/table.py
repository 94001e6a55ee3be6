"""Scores of many pictures as a table on disk: written batch by batch, carried on, drawn.

While a run goes on its rows lie in `NAME.part`, JSON lines after a first line that says which
reward they are of. When it is complete they become NAME: a .parquet file, which has the reward's
spec in its metadata, or a .csv file with the spec in `NAME.spec` beside it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "TEXTS",
    "Table",
    "draw",
    "ensure_writable",
    "read_table",
    "spec_of",
    "summary",
    "write_table",
]

SUFFIXES = (".csv", ".parquet")
TEXTS = ("image", "prompt", "references")  # the columns that are no scores; they name a row


class Table:
    """Rows that survive an interruption, each named by its TEXTS.

    Args: path, the .csv or .parquet file to be; spec, the reward's full text form, which rows
    that are already there must share; resume, whether there may be some. ValueError for these
    and for a path that cannot be written.
    """

    def __init__(self, path: Path, spec: str, resume: bool = False) -> None:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"the table {path} must end in one of {list(SUFFIXES)}")
        if path.suffix == ".parquet":
            _arrow()
        self.path, self.part, self.spec = path, path.with_name(path.name + ".part"), spec
        if not resume and (path.exists() or self.part.exists()):
            raise ValueError(f"{path} is already there; add --resume, or give another --out")
        ensure_writable(path)
        self.rows: list[dict[str, Any]] = []
        self._begun = False
        if self.part.exists():
            # by "\n" alone: a prompt may hold other characters that end a line for str.splitlines
            was, self.rows = _read_part(self.part)
            self._check(spec if was is None else was)
        elif path.exists():
            self._check(spec_of(path))
            self.rows = read_table(path)

    def _check(self, was: str) -> None:
        if was != self.spec:
            by = repr(was) if was else "something that it does not name"
            raise ValueError(
                f"{self.path} was scored by {by}, not {self.spec!r}; give another --out"
            )

    def missing(self, wanted: Sequence[Mapping[str, str]]) -> list[int]:
        """The places in `wanted`, the TEXTS of the rows to be, of those that are not there yet.

        ValueError where the table holds rows that are none of these.
        """
        asked, there = {_key(row) for row in wanted}, {_key(row) for row in self.rows}
        extra = [row for row in self.rows if _key(row) not in asked]
        if extra:
            raise ValueError(
                f"{self.path} holds rows that are not asked for ({len(extra)}), the first of "
                f"{extra[0]['image']} with the prompt {extra[0]['prompt']!r}; ask for these too, "
                "or give another --out"
            )
        return [i for i, row in enumerate(wanted) if _key(row) not in there]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, on disk when this returns; ValueError where there is no room."""
        with _writable(self.part):
            if self._begun:
                with self.part.open("a", encoding="utf-8") as file:
                    file.write(_lines(rows))
            else:  # at the first row, and whole: the old rows come along
                scratch = self.part.with_name(self.part.name + ".new")
                text = _lines([{"reward": self.spec}, *self.rows, *rows])
                scratch.write_text(text, encoding="utf-8")
                scratch.replace(self.part)
                self._begun = True
        self.rows.extend(rows)

    def finish(self, wanted: Sequence[Mapping[str, str]]) -> bool:
        """Write the table in this order and drop the working file; False if it is there already."""
        order, rows = [_key(row) for row in wanted], {_key(row): row for row in self.rows}
        whole = self.path.exists() and not self.part.exists()
        if whole and order == [_key(row) for row in self.rows]:
            return False
        self.rows = [rows[key] for key in order]
        with _writable(self.path):
            write_table(self.path, self.rows, self.spec)
            self.part.unlink(missing_ok=True)
        return True


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Around writing: a full disk becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror or error}); the scores written before are kept: "
            "mend that, then repeat the command with --resume"
        ) from error


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in TEXTS)


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ensure_writable(path: Path) -> None:
    """Make the folder of a file to be; ValueError where the file could not be written."""
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
    """Rows of equal keys as .csv or .parquet, whole or not at all; NaN is an empty cell."""
    scratch = path.with_name(path.name + ".new")
    if path.suffix == ".parquet":
        arrow = _arrow()
        table = arrow.Table.from_pylist(list(rows)).replace_schema_metadata({"spec": spec})
        arrow.parquet.write_table(table, scratch)
    else:
        _spec_file(path).write_text(spec, encoding="utf-8")
        with scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: "" if _is_nan(v) else v for k, v in row.items()} for row in rows)
    scratch.replace(path)


def spec_of(path: Path) -> str:
    """The spec that a table was scored by, or "" where it does not say."""
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
    """The rows of such a file; numbers as floats, an empty cell of a score as NaN.

    Rows that were cut off are left out. ValueError for a file that is no such table.
    """
    try:
        if path.suffix == ".parquet":
            found = _arrow().parquet.read_table(path).to_pylist()
            return [_row(row) for row in found]
        text = path.read_bytes().decode("utf-8")
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline="")))
        if rows and not text.endswith("\n"):  # the last number may lack digits
            rows.pop()
        return [_row(row) for row in rows if None not in row.values()]
    except (OSError, ValueError, TypeError, LookupError, csv.Error) as error:
        raise _damaged(path, error) from None


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row["image"], str) or not isinstance(row["prompt"], str):
        raise TypeError("a row says neither its image nor its prompt")
    scores = {k: v for k, v in row.items() if k not in TEXTS}
    blank = ("", None)
    return {k: row[k] for k in TEXTS if k in row} | {
        k: math.nan if v in blank else float(v) for k, v in scores.items()
    }


def _read_part(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """The spec and the rows of a working file; None where nothing is in it yet."""
    try:
        *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
        was = str(json.loads(lines[0])["reward"]) if lines else None
        return was, [_row(dict(json.loads(line))) for line in lines[1:]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    said = " ".join(str(error).split())
    return ValueError(
        f"{path} is no table of scores, or a damaged one ({said:.200}); delete it, or give "
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


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = [name for name in rows[0] if name not in TEXTS]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in names}
    if len(names) == 2 and np.array_equal(*columns.values(), equal_nan=True):
        columns.pop("reward")  # the only component is the total
    return columns


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line a score: mean ± standard error, smallest, median, largest, how many are missing."""
    columns = _columns(rows)
    width = max(map(len, columns))
    lines = [f"{'':{width}}      mean       se      min   median      max  missing"]
    for name, values in columns.items():
        there = values[np.isfinite(values)]
        if len(there):
            se = there.std(ddof=1) / math.sqrt(len(there)) if len(there) > 1 else math.nan
            numbers = [there.mean(), se, there.min(), np.median(there), there.max()]
        else:
            numbers = [math.nan] * 5
        cells = " ".join(f"{number:8.4g}" for number in numbers)
        lines.append(f"{name:{width}}  {cells} {len(values) - len(there):8d}")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Histograms of every score, and their rank correlations (Spearman), as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(rows)
    names, many = list(columns), len(columns) > 1
    wide = len(names) + many
    figure = Figure(figsize=(3.2 * wide, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, wide, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        values = columns[name][np.isfinite(columns[name])]
        panel.hist(values, bins=min(30, max(5, int(math.sqrt(len(values))))), color="#4477aa")
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
    if many:
        _draw_correlations(figure, panels[-1], columns)
    with _writable(path):
        figure.savefig(path, dpi=120)


def _draw_correlations(figure: Any, panel: Any, columns: dict[str, np.ndarray]) -> None:
    names = list(columns)
    matrix = np.array([[rank_correlation(columns[a], columns[b]) for b in names] for a in names])
    shown = panel.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    for i in range(len(names)):
        for j in range(len(names)):
            dark = abs(matrix[i, j]) > 0.6
            colour = "white" if dark else "black"
            panel.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=colour)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_title("rank correlation", fontsize=9)
    figure.colorbar(shown, ax=panel, shrink=0.8)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho of the pairs that are both there, ties at their mean rank; NaN if constant."""
    there = np.isfinite(a) & np.isfinite(b)
    if there.sum() < 2:
        return math.nan
    x, y = _ranks(a[there]), _ranks(b[there])
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
