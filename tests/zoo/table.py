"""docs/pipelines.md: one row a pipeline, as the zoo found it."""

import re
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from steering import steer
from zoo.accounts import ANIMALS, bare, reason, refusal
from zoo.building import Animal, call_of, pipeline_of
from zoo.checks import CHECKS, Subject

__all__ = ["PAGE", "Row", "lines", "read", "row", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
_HEAD = """# Which pipelines run

Every pipeline class that diffusers {version} exports, tried on a tiny instance with random
weights (`tests/zoo`). This page is written by `PYTHONPATH=tests python -m zoo`, and `pytest -m slow
tests/test_zoo.py` finds each cell again.

- **parity**: with `reward_scale=0` the latents are those of the pipeline's own call on our
  scheduler, bit for bit at the same batch, and so are the images, to one grey level in 1 % of the
  values where large ones are decoded a few at a time. Where its own call takes one row alone, the
  rows are those of a call each, to rounding.
- **reward**: it is resampled by a reward, and what was passed in is not changed.
- **chunks**: `max_batch=1` and `2` give what the whole batch gives.
- **funnel**: rows that a funnel dropped are not evaluated, and nothing else changes.
- **packing**: `prompts_per_call=2` gives what two calls give.
- **lineage**: two rows with the same latents and the same noise from there on stay the same, so the
  latents are all that has to be resampled.

*refused* is one sentence before any step; *no* is a fault that is known.
"""


@dataclass(frozen=True)
class Row:
    """`cells` has an outcome for each check, none where `note` says why nothing was tried."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    note: str = ""


def row(name: str) -> Row:
    """Try everything with the class `name`."""
    why = reason(name)
    if why is not None:
        return Row(name, note=f"not tried: {why}")
    if refusal(name) is not None:
        return Row(name, note=f"refused: {_sentence(name)}")
    animal = ANIMALS.get(name, Animal())
    it = Subject(pipeline_of(name, animal), call_of(name, animal), animal.prompts, animal.steer)
    cells, notes = {}, ["With `decode=`."] if "decode" in animal.steer else []
    for check, function in CHECKS.items():
        cells[check], note = _outcome(function, it)
        notes += [note] if note and note not in notes else []
    return Row(name, cells, " ".join(notes))


def _sentence(name: str) -> str:
    try:
        steer(bare(name), "a red cube", lambda images, prompts: images, progress=False)
    except ValueError as error:
        if re.search(refusal(name) or "", str(error)):
            return str(error)
        raise
    raise AssertionError(f"{name} is not refused")


def _outcome(function: Callable[[Subject], None], it: Subject) -> tuple[str, str]:
    try:
        function(it)
    except ValueError as error:
        ours = "/steering/" in traceback.extract_tb(error.__traceback__)[-1].filename
        return ("refused", str(error)) if ours else ("no", "")
    except Exception:
        return "no", ""
    return "yes", ""


def read(page: Path = PAGE, checks: Collection[str] = CHECKS) -> dict[str, Row]:
    """The rows of a page whose tables have a column for each check."""
    rows = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        name, *rest = [part.strip() for part in line.strip("|").split("|")]
        name = name.strip("`")
        cells = dict(zip(checks, rest[:-1], strict=True)) if len(rest) > 1 else {}
        rows[name] = Row(name, cells, rest[-1])
    return rows


def write(rows: dict[str, Row]) -> None:
    import diffusers

    tried = [r for r in rows.values() if r.cells]
    parts = [_HEAD.format(version=diffusers.__version__), _count(tried)]
    heads = ["class", *CHECKS, "note"]
    parts.append(lines(heads, [[f"`{r.name}`", *r.cells.values(), r.note] for r in tried]))
    rest = [r for r in rows.values() if not r.cells]
    parts.append("## Refused, or not tried\n")
    parts.append(lines(["class", "note"], [[f"`{r.name}`", r.note] for r in rest]))
    PAGE.write_text("\n".join(parts), encoding="utf-8")


# what refuses a class that no filter of one Gaussian chain a row could steer
_BEYOND = re.compile(
    "draws noise from PyTorch's global generator|gives every token its own timestep"
    "|reads scheduler.|denoises more than once"
)


def _count(tried: list[Row]) -> str:
    runs = [r for r in tried if r.cells["reward"] == "yes"]
    beyond = sum(r not in runs and bool(_BEYOND.search(r.note)) for r in tried)
    able, faults = len(tried) - beyond, sum("no" in r.cells.values() for r in tried)
    held = {check: sum(r.cells[check] == "yes" for r in runs) for check in CHECKS}
    said = ", ".join(f"{check} {number}" for check, number in held.items())
    return (
        f"{len(tried)} classes were tried. {beyond} of them are beyond any filter: they draw noise "
        "that no\nseed sets, give each token a timestep of its own, run several chains a call, or "
        f"need a scheduler\nthat is no Gaussian chain. Of the other {able}, {len(runs)} run "
        f"({len(runs) / able:.1%}); the rest make one row a call.\n"
        f"Of those that run hold: {said}.\nClasses with a *no*: {faults}.\n"
    )


def lines(heads: list[str], rows: list[list[str]]) -> str:
    table = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"
