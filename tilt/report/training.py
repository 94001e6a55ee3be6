"""The report of a training run as one page, written from its folder alone.

Curves of the rewards and where they went apart, the same noise drawn again at every check, and the
evaluation where there is one. The look is that of a steered run's report, `tilt.report.page`.
"""

from __future__ import annotations

import json
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
from tilt.report.charts import Line, chart
from tilt.report.markup import escape, link, number, short
from tilt.report.thumbnails import Budget

__all__ = ["alarms", "write"]

Row = dict[str, float]

PATIENCE = 3  # checks in a row that have to go apart
_PICTURES = 4_000_000  # bytes of all grids together
_MOST_GRIDS = 24
_LEAD = ("model", "reward", "method")  # settings that are said at the top
_TRAINED = "train/reward"
_WATCHED = ("held_out/reward", "held_out/quality", "held_out/corrected")
_TITLED = 3  # prompts that the title names
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
    settings = file.read_text(encoding="utf-8") if file.exists() else ""
    plain: Any = OmegaConf.to_container(OmegaConf.create(settings)) if settings else {}
    best = _best(checks, plain)
    seen = _looked_at(out)
    name = _title(plain, seen)
    parts = [f"<h1>{escape(name)}</h1>", _lead(log, checks, plain)]
    if checks:
        parts += [_alarm(checks), _curves(log, checks, best)]
        parts.append(_grids(out, checks, best, seen))
    evaluations = [
        path for path in (out / "evaluation.json", *sorted(out.glob("*/evaluation.json")))
    ]
    parts += [_evaluation(path, out) for path in evaluations if path.exists()]
    parts.append(_quantities(log))
    if checks:
        parts.append(_table(checks, best))
    if settings:
        code = f"<pre><code>{escape(settings.strip())}</code></pre>"
        parts.append(f"<details><summary>Settings</summary>{code}</details>")
    return markup.keep(out / "report.html", markup.document(name, "\n".join(parts)))


def _looked_at(out: Path) -> list[str]:
    """The held-out prompts of the checks, as the training writes them down."""
    file = out / "checks.json"
    return json.loads(file.read_text(encoding="utf-8"))["held_out"] if file.exists() else []


def _title(settings: dict[str, Any], prompts: Sequence[str]) -> str:
    model = settings.get("model")
    title = f"Fine-tuning of {Path(model).name}" if model else "Fine-tuning"
    named = [markup.clipped(prompt) for prompt in prompts[:_TITLED]]
    more = f" and {len(prompts) - _TITLED} more" if len(prompts) > _TITLED else ""
    return f"{title}, checked on {', '.join(named)}{more}" if named else title


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


def _best(checks: Sequence[Row], settings: dict[str, Any]) -> tuple[str, int] | None:
    """The metric that chose the weights, and the step of its best check."""
    metric = settings.get("check", {}).get("best") or "held_out/reward"
    if not any(math.isfinite(row.get(metric, math.nan)) for row in checks):
        return None
    return metric, int(best_row(checks, metric)["step"])


def _lead(log: Sequence[Row], checks: Sequence[Row], settings: dict[str, Any]) -> str:
    steps = max(int(row["step"]) for row in [*log[-1:], *checks[-1:]])
    said = [f"{steps} steps", f"{len(checks)} checks"]
    said += [f"{name} {settings[name]}" for name in _LEAD if settings.get(name)]
    return f'<p class="lead">{escape(", ".join(said))}</p>'


def _alarm(checks: Sequence[Row]) -> str:
    found = alarms(checks)
    if _TRAINED not in checks[0]:
        return (
            '<p class="note">No prompt that is trained on was checked: no alarm can be given.</p>'
        )
    if not found:
        watched = ", ".join(name for name in _WATCHED if name in checks[0])
        return (
            f'<p class="note">No alarm: {_TRAINED} never rose {PATIENCE} checks in a row while one '
            f"of {watched} fell.</p>"
        )
    lines = (
        f"{name} fell while {_TRAINED} rose, {PATIENCE} checks in a row: first seen at step "
        f"{steps[0]}"
        for name, steps in found.items()
    )
    return (
        f'<p class="warn"><strong>Alarm: the rewards go apart.</strong><br>{"<br>".join(lines)}</p>'
    )


def _line(rows: Sequence[Row], column: str, name: str, style: int) -> Line:
    return Line(name, [row["step"] for row in rows], [row[column] for row in rows], style)


def _curves(log: Sequence[Row], checks: Sequence[Row], best: tuple[str, int] | None) -> str:
    """The rewards in one figure, with the moments that matter; what else was checked beside it."""
    names = {column: name for column, name in _REWARDS.items() if column in checks[0]}
    order = list(_REWARDS)
    lines = [_line(checks, column, name, order.index(column)) for column, name in names.items()]
    if log and "reward" in log[0]:
        lines.append(_line(log, "reward", "samples of the training", 3))
    marks = [(float(step), "best") for _, step in (best,)] if best else []
    first = {steps[0] for steps in alarms(checks).values()}
    marks += [(float(step), "alarm") for step in sorted(first)]
    said = (
        "The mean reward of pictures that are drawn at each check, always from the same noise. "
        "Held-out prompts are not trained on: their curve is the one that counts."
    )
    parts = [chart("Reward", lines, size=(430, 240), marks=_apart(marks), note=said)]
    others = sorted({c.partition("/")[2] for c in checks[0] if "/" in c} - {"reward", "corrected"})
    for name in others:
        columns = [(c, i) for i, c in enumerate((f"train/{name}", f"held_out/{name}"))]
        both = [(c, i) for c, i in columns if c in checks[0]]
        called = ("train prompts", "held-out prompts")
        drawn = [_line(checks, c, called[i], i) for c, i in both]
        parts.append(chart(name, drawn, note="A part of the reward, or only watched."))
    return f'<h2>Rewards</h2>\n<div class="charts">{"".join(parts)}</div>'


def _apart(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Marks of one step as one."""
    steps = dict.fromkeys(step for step, _ in marks)
    return [(step, ", ".join(name for s, name in marks if s == step)) for step in steps]


def _grids(
    out: Path, checks: Sequence[Row], best: tuple[str, int] | None, prompts: Sequence[str]
) -> str:
    """The pictures of the checks in their order: the same prompts and noise each time."""
    steps = [int(row["step"]) for row in checks]
    files = {step: out / "grids" / f"{step:06d}.png" for step in steps}
    there = [step for step, file in files.items() if file.exists()]
    if not there:
        return ""
    shown = _some(there, {best[1]} if best else set())
    rewards = {int(row["step"]): row.get("held_out/reward", math.nan) for row in checks}
    budget, figures = Budget(_PICTURES, len(shown), longest=448), []
    for step in shown:
        with Image.open(files[step]) as image:
            address, small = budget.encode(image.convert("RGB"))
        marked = best is not None and step == best[1]
        label = f"step {step}, held-out reward {short(rewards[step])}{', the best' * marked}"
        kind = ' class="best"' if marked else ""
        figures.append(
            f'<figure{kind}><a href="{link(f"grids/{step:06d}.png")}"><img src="{address}" '
            f'width="{small.width}" height="{small.height}" loading="lazy" alt="{label}"></a>'
            f"<figcaption>step {step}{', best' * marked}<br>{number(rewards[step])}</figcaption>"
            "</figure>"
        )
    left_out = len(there) - len(shown)
    more = f" {left_out} more are in grids/." if left_out else ""
    rows = f": {'; '.join(map(markup.text, prompts[:GRID_ROWS]))}" if prompts else ""
    return (
        "<h2>The same noise over time</h2>\n"
        f'<p class="note">A row a held-out prompt{rows}.</p>\n'
        '<p class="note">The same seed at every check; below, the mean '
        f"reward of all held-out prompts.{more}</p>\n"
        f'<div class="strip" tabindex="0" role="region" aria-label="Grids over time">'
        f"{''.join(figures)}</div>"
    )


def _some(steps: Sequence[int], wanted: set[int]) -> list[int]:
    """At most `_MOST_GRIDS` of them, evenly, with the first, the last and those wanted."""
    if len(steps) <= _MOST_GRIDS:
        return list(steps)
    count = _MOST_GRIDS - len(wanted)
    chosen = {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}
    return sorted(chosen | wanted)


def _evaluation(path: Path, out: Path) -> str:
    """The tables of `tilt evaluate`: a line a measure, a column a variant."""
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = ["<h2>Evaluation</h2>"]
    parts.append(
        '<p class="note">Means with 95 % intervals over prompts, and below each the difference '
        "from the base at the same noise.</p>"
    )
    for title, measures in content["sections"].items():
        names = list(dict.fromkeys(v for measure in measures for v in measure["variants"]))
        rows = []
        for measure in measures:
            cells = [_cell(measure["variants"].get(name)) for name in names]
            less = "<small>less is better</small>" if measure["less_is_better"] else ""
            rows.append([escape(measure["name"]) + less, str(len(measure["prompts"])), *cells])
        parts.append(f"<h3>{escape(title)}</h3>")
        parts.append(markup.table(["", "prompts", *map(escape, names)], rows))
    command = content.get("command", "")
    place = path.relative_to(out).as_posix()
    parts.append(f"<pre><code>{escape(command)}</code></pre>" if command else "")
    parts.append(f'<p class="note">All numbers: <a href="{link(place)}">{escape(place)}</a>.</p>')
    return "\n".join(parts)


def _cell(variant: dict[str, Any] | None) -> str:
    if variant is None:
        return ""
    lines = [_interval(variant["mean"])]
    if "difference" in variant:
        lines.append(f"<small>{_interval(variant['difference'], '+')}</small>")
    return "".join(lines)


def _interval(value: dict[str, Any], sign: str = "") -> str:
    low, high = value["low"], value["high"]
    ends = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f'<data value="{value["mean"]!r}">{value["mean"]:{sign}.3f}</data>{ends}'


def _quantities(log: Sequence[Row]) -> str:
    names = [name for name in (log[0] if log else {}) if name not in ("step", "reward")]
    if not names:
        return ""
    drawn = "".join(
        chart(name, [_line(log, name, name, 0)], size=(260, 140), note=_MEANS.get(name, ""))
        for name in names
    )
    return f'<h2>The updates</h2>\n<div class="charts small">{drawn}</div>'


def _table(checks: Sequence[Row], best: tuple[str, int] | None) -> str:
    names = [name for name in checks[0] if name != "step"]
    rows = [
        [
            f"{row['step']:.0f}{' (best)' * (best is not None and row['step'] == best[1])}",
            *(number(row[name]) for name in names),
        ]
        for row in checks
    ]
    body = markup.table(["step", *map(escape, names)], rows)
    return f"<details><summary>All checks</summary>{body}</details>"
