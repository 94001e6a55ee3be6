"""The report of a training run: one page, written from its folder.

It shows curves of the rewards with alarms of reward hacking, the images of every check from the
same noise, and the evaluation if there is one, in the style of `tilt.report.steered`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.checks import GRID_ROWS, best_row, read
from rewards.compare import hacked
from tilt.report import markup
from tilt.report.charts import Chart, Line, chart
from tilt.report.markup import short
from tilt.report.saved import read_evaluation, read_held_out, read_settings
from tilt.report.thumbnails import Budget

__all__ = ["alarms", "write"]

Row = dict[str, float]

PATIENCE = 3  # consecutive diverging checks that raise an alarm
_PICTURES = 4_000_000  # bytes of all grids together
_MOST_GRIDS = 24
_LEAD = ("model", "reward", "method")  # settings shown at the top
_TRAINED = "train/reward"
_WATCHED = ("held_out/reward", "held_out/quality", "held_out/corrected")
_MEANS = {  # column of log.csv -> its meaning
    "loss": "Training loss.",
    "accuracy": "GDRO: fraction of pairs of different rewards that the model orders as the reward "
    "does. A critic: how often a reference scores above a sample. 0.5 is chance.",
    "spread": "Standard deviation within a group: of how much the LoRA lowers the error on each "
    "image, times -β (GDRO), or of the rewards (online).",
    "entropy": "Entropy of the target distribution over a group's k images, divided by log k: 1 if "
    "it is uniform, 0 if it is one image.",
    "best_image": "Error on the best image of a group.",
    "drift": "Error on the best image minus that of the reference. It should stay near 0.",
    "ratio": "Ratio of a step's density per element, current over sampling policy: 1 if equal.",
    "clipped": "Fraction of steps whose ratio is outside the clip range.",
    "kl": "KL divergence from the reference (NFT: squared distance of the predictions).",
    "moved": "Squared distance of the prediction from that of the sampling policy.",
    "dropped": "Number of images of an epoch that had no score and were left out.",
    "flat_groups": "Fraction of groups whose rewards are all equal, which teach nothing.",
    "grad_norm": "Norm of the gradient before clipping.",
    "seconds": "Seconds per update.",
}
_REWARDS = {  # column -> name of the curve; the order decides colour and dash
    "train/reward": "train prompts",
    "held_out/reward": "held-out prompts",
    "held_out/corrected": "held-out, corrected",
}


def write(out: Path) -> Path:
    """Write report.html into the folder of a training run, and return its path.

    It shows log.csv, checks.csv, grids/, settings.yaml and evaluation.json as far as they exist;
    evaluation.json may be in a subfolder. Raises ValueError for a folder without log and checks.
    """
    out = Path(out)
    log, checks = read(out / "log.csv"), read(out / "checks.csv")
    if not log and not checks:
        raise ValueError(f"{out} has neither log.csv nor checks.csv: pass the folder of a training")
    text, settings = read_settings(out / "settings.yaml")
    best = _best(checks, settings)
    evaluations = [out / "evaluation.json", *sorted(out.glob("*/evaluation.json"))]
    values = {
        "model": Path(str(settings["model"])).name if settings.get("model") else "",
        "prompts": read_held_out(out / "checks.json") if (out / "checks.json").exists() else [],
        "steps": max(int(row["step"]) for row in [*log[-1:], *checks[-1:]]),
        "lead": {name: settings[name] for name in _LEAD if settings.get(name)},
        "best": best,
        "evaluations": [_evaluation(path, out) for path in evaluations if path.exists()],
        "updates": _updates(log),
        "settings": text,
        **(_checked(out, log, checks, best) if checks else {"checks": [], "grids": []}),
    }
    return markup.keep(out / "report.html", markup.render("training.html", **values))


def alarms(checks: Sequence[Row], patience: int = PATIENCE) -> dict[str, list[int]]:
    """Return, by held-out column, the steps at which it had fallen while the trained reward rose.

    Both must do so for `patience` consecutive checks; see `rewards.compare.hacked`. Columns without
    such steps are left out.
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
    """Return the step of the check whose weights were kept, None if no check has a value."""
    metric = str((settings.get("check") or {}).get("best") or "held_out/reward")
    if not any(math.isfinite(row.get(metric, math.nan)) for row in checks):
        return None
    return int(best_row(checks, metric)["step"])


def _checked(
    out: Path, log: Sequence[Row], checks: Sequence[Row], best: int | None
) -> dict[str, Any]:
    """Return the values of the page that depend on the checks."""
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
    """Chart the rewards, with marks at the best step and at alarms."""
    lines = [
        _line(checks, column, name, style)
        for style, (column, name) in enumerate(_REWARDS.items())
        if column in checks[0]
    ]
    if log and "reward" in log[0]:
        lines.append(_line(log, "reward", "training samples", 3))
    marks = [] if best is None else [(float(best), "best")]
    first = {steps[0] for steps in alarms(checks).values()}
    marks += [(float(step), "alarm") for step in sorted(first)]
    return chart("Reward", lines, size=(430, 240), marks=_apart(marks))


def _others(checks: Sequence[Row]) -> list[Chart]:
    """Chart the other columns of the checks: components of the reward, and held-out measures."""
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
    """Merge marks of the same step."""
    steps = dict.fromkeys(step for step, _ in marks)
    return [(step, ", ".join(name for s, name in marks if s == step)) for step in steps]


def _grids(out: Path, checks: Sequence[Row], best: int | None) -> dict[str, Any]:
    """Return the image grids of the checks, which have the same prompts and noise, in order."""
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
    """Select at most `_MOST_GRIDS` steps evenly, with the first, the last and those wanted."""
    if len(steps) <= _MOST_GRIDS:
        return list(steps)
    count = _MOST_GRIDS - len(wanted)
    chosen = {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}
    return sorted(chosen | wanted)


def _evaluation(path: Path, out: Path) -> dict[str, Any]:
    """Return the tables of `tilt evaluate`, with a row per measure and a column per variant."""
    content = read_evaluation(path)
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
    """Return a chart and an explanation of each column of the log."""
    names = [name for name in (log[0] if log else {}) if name not in ("step", "reward")]
    return [
        (chart(name, [_line(log, name, name, 0)], size=(260, 140)), _MEANS.get(name, ""))
        for name in names
    ]
