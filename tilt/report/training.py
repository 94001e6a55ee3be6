"""The report of a training run as one page, written from its folder alone.

Curves of the rewards and where they went apart, the same noise drawn again at every check, and the
evaluation where there is one. The look is that of a steered run's report, `tilt.report.steered`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image

from finetune.checks import GRID_ROWS, best_row, read
from rewards.compare import hacked
from tilt.report import markup
from tilt.report.charts import Chart, Line, chart
from tilt.report.markup import short
from tilt.report.saved import read_json
from tilt.report.thumbnails import Budget

__all__ = ["alarms", "write"]

Row = dict[str, float]

PATIENCE = 3  # checks in a row that have to go apart
_PICTURES = 4_000_000  # bytes of all grids together
_MOST_GRIDS = 24
_LEAD = ("model", "reward", "method")  # settings that are said at the top
_TRAINED = "train/reward"
_WATCHED = ("held_out/reward", "held_out/quality", "held_out/corrected")
_MEANS = {  # column of log.csv -> what it is
    "loss": "What the training lowers.",
    "accuracy": "How often the model prefers the better of two images; 0.5 is chance.",
    "spread": "How far apart the images of a group are held to be. At 0 nothing is learned.",
    "entropy": "What the rewards ask for: 1 nothing, 0 one image of a group alone.",
    "best_image": "The error on the best image of a group.",
    "drift": "How much the error on the best image grew. It should stay near 0.",
    "ratio": "How much likelier a step is than when it was drawn: 1 if nothing has changed.",
    "clipped": "The share of steps whose ratio went out of bounds and teaches no more.",
    "kl": "How far the model has moved from the one it began as.",
    "moved": "How far a prediction is from that of the policy that drew the images, squared.",
    "dropped": "How many of an epoch's images had no score and were left out.",
    "flat_groups": "The share of groups whose images have one reward and teach nothing.",
    "grad_norm": "The length of the gradient, before long ones are cut.",
    "seconds": "Of an update.",
}
_REWARDS = {  # column -> what the curve is called; the order gives colour and dash
    "train/reward": "train prompts",
    "held_out/reward": "held-out prompts",
    "held_out/corrected": "held-out, corrected",
}


def write(out: Path) -> Path:
    """Write report.html into the folder of a training run; returns its path.

    It holds what is there of log.csv, checks.csv, grids/, settings.yaml and evaluation.json, which
    may lie in a folder of its own inside. Raises ValueError for a folder without any log or check.
    """
    out = Path(out)
    log, checks = read(out / "log.csv"), read(out / "checks.csv")
    if not log and not checks:
        raise ValueError(f"{out} has neither log.csv nor checks.csv: pass the folder of a training")
    file = out / "settings.yaml"
    text = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    settings: Any = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
    best = _best(checks, settings)
    evaluations = [out / "evaluation.json", *sorted(out.glob("*/evaluation.json"))]
    values = {
        "model": Path(settings["model"]).name if settings.get("model") else "",
        "prompts": _looked_at(out),
        "steps": max(int(row["step"]) for row in [*log[-1:], *checks[-1:]]),
        "lead": {name: settings[name] for name in _LEAD if settings.get(name)},
        "best": best,
        "evaluations": [_evaluation(path, out) for path in evaluations if path.exists()],
        "updates": _updates(log),
        "settings": text,
        **(_checked(out, log, checks, best) if checks else {"checks": [], "grids": []}),
    }
    return markup.keep(out / "report.html", markup.render("training.html", **values))


def _looked_at(out: Path) -> list[str]:
    """The held-out prompts of the checks, as the training writes them down."""
    file = out / "checks.json"
    return read_json(file, "held_out")["held_out"] if file.exists() else []


def alarms(checks: Sequence[Row], patience: int = PATIENCE) -> dict[str, list[int]]:
    """At which steps the reward trained on had risen while a held-out column fell, by column.

    Each time `patience` checks in a row; see `rewards.compare.hacked`. Columns without are left
    out.
    """
    if not checks or _TRAINED not in checks[0]:
        return {}
    found = {}
    trained = torch.tensor([row[_TRAINED] for row in checks], dtype=torch.float64)
    for name in _WATCHED:
        if name in checks[0]:
            other = torch.tensor([row[name] for row in checks], dtype=torch.float64)
            which = hacked(trained, other, patience).nonzero().flatten().tolist()
            found[name] = [int(checks[i]["step"]) for i in which]
    return {name: steps for name, steps in found.items() if steps}


def _best(checks: Sequence[Row], settings: dict[str, Any]) -> int | None:
    """The step of the check whose weights were kept."""
    metric = settings.get("check", {}).get("best") or "held_out/reward"
    if not any(math.isfinite(row.get(metric, math.nan)) for row in checks):
        return None
    return int(best_row(checks, metric)["step"])


def _checked(
    out: Path, log: Sequence[Row], checks: Sequence[Row], best: int | None
) -> dict[str, Any]:
    """What the checks add to the values of the page."""
    columns = [name for name in checks[0] if name != "step"]
    return {
        "trained": _TRAINED,
        "watched": [name for name in _WATCHED if name in columns],
        "patience": PATIENCE,
        "alarms": alarms(checks),
        "rewards": _rewards(log, checks, best),
        "others": _others(checks),
        **_grids(out, checks, best),
        "columns": columns,
        "checks": [[row["step"], *(row[name] for name in columns)] for row in checks],
    }


def _line(rows: Sequence[Row], column: str, name: str, style: int) -> Line:
    return Line(name, [row["step"] for row in rows], [row[column] for row in rows], style)


def _rewards(log: Sequence[Row], checks: Sequence[Row], best: int | None) -> Chart:
    """The rewards in one figure, with the moments that matter."""
    lines = [
        _line(checks, column, name, style)
        for style, (column, name) in enumerate(_REWARDS.items())
        if column in checks[0]
    ]
    if log and "reward" in log[0]:
        lines.append(_line(log, "reward", "samples of the training", 3))
    marks = [] if best is None else [(float(best), "best")]
    first = {steps[0] for steps in alarms(checks).values()}
    marks += [(float(step), "alarm") for step in sorted(first)]
    return chart("Reward", lines, size=(430, 240), marks=_apart(marks))


def _others(checks: Sequence[Row]) -> list[Chart]:
    """What else was checked: the parts of the reward, and what is only watched."""
    sets = {"train": "train prompts", "held_out": "held-out prompts"}
    names = {c.partition("/")[2] for c in checks[0] if "/" in c} - {"reward", "corrected"}
    return [
        chart(
            name,
            [
                _line(checks, f"{part}/{name}", called, style)
                for style, (part, called) in enumerate(sets.items())
                if f"{part}/{name}" in checks[0]
            ],
        )
        for name in sorted(names)
    ]


def _apart(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Marks of one step as one."""
    steps = dict.fromkeys(step for step, _ in marks)
    return [(step, ", ".join(name for s, name in marks if s == step)) for step in steps]


def _grids(out: Path, checks: Sequence[Row], best: int | None) -> dict[str, Any]:
    """The pictures of the checks in their order: the same prompts and noise each time."""
    rewards = {int(row["step"]): row.get("held_out/reward", math.nan) for row in checks}
    files = {step: f"grids/{step:06d}.png" for step in rewards}
    there = [step for step, file in files.items() if (out / file).exists()]
    shown = _some(there, {step for step in there if step == best})
    budget, grids = Budget(_PICTURES, len(shown), longest=448), []
    for step in shown:
        with Image.open(out / files[step]) as opened:
            image = opened.convert("RGB")
        label = (
            f"step {step}, held-out reward {short(rewards[step])}{', the best' * (step == best)}"
        )
        picture = budget.picture(image, files[step], label, step == best)
        grids.append({"step": step, "reward": rewards[step], "picture": picture})
    return {"grids": grids, "grid_rows": GRID_ROWS, "left_out": len(there) - len(shown)}


def _some(steps: Sequence[int], wanted: set[int]) -> list[int]:
    """At most `_MOST_GRIDS` of them, evenly, with the first, the last and those wanted."""
    if len(steps) <= _MOST_GRIDS:
        return list(steps)
    count = _MOST_GRIDS - len(wanted)
    chosen = {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}
    return sorted(chosen | wanted)


def _evaluation(path: Path, out: Path) -> dict[str, Any]:
    """The tables of `tilt evaluate`: a line a measure, a column a variant."""
    content = read_json(path, "sections")
    sections = []
    for title, measures in content["sections"].items():
        names = list(dict.fromkeys(v for measure in measures for v in measure["variants"]))
        rows = [
            [m, len(m["prompts"]), *(m["variants"].get(name) for name in names)] for m in measures
        ]
        sections.append({"title": title, "variants": names, "rows": rows})
    file = path.relative_to(out).as_posix()
    return {"sections": sections, "command": content.get("command", ""), "file": file}


def _updates(log: Sequence[Row]) -> list[tuple[Chart, str]]:
    """A chart and a note for each quantity of the log."""
    names = [name for name in (log[0] if log else {}) if name not in ("step", "reward")]
    return [
        (chart(name, [_line(log, name, name, 0)], size=(260, 140)), _MEANS.get(name, ""))
        for name in names
    ]
