"""The model card of a LoRA: its base, method, settings and data, with its training curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checks import read
from steering import tiny
from steering.hub import HUB_ID
from tilt.report import markup

__all__ = ["About", "curves", "write"]

Point = dict[str, float]


@dataclass(frozen=True)
class About:
    """The contents of a card; settings: YAML; data: lines about the data."""

    base: str
    pipeline: str
    method: str
    settings: str
    data: Sequence[str]
    step: int


def write(folder: Path, about: About, run: Path) -> None:
    """Write README.md and curves.png into the folder of a LoRA, from the tables of its run."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        library_name="diffusers",
        # the hub accepts only names of its own
        base_model=about.base if HUB_ID.fullmatch(about.base) else None,
        tags=["lora", "text-to-image", "tilt-diffusion"],
    )
    checks = read(run / "checks.csv")
    curves(read(run / "log.csv"), checks, folder / "curves.png")
    card = markup.render(
        "model_card.md",
        head=head.to_yaml(),
        about=about,
        embedded=about.base in tiny.NAMES,
        checks=checks,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def curves(log: Sequence[Point], checks: Sequence[Point], path: Path) -> None:
    """Draw one panel for each quantity of the log, and one for the checks."""
    from matplotlib.figure import Figure

    names = [name for name in (log[0] if log else {}) if name != "step"]
    panels: list[tuple[str, Sequence[Point], list[str]]] = [(name, log, [name]) for name in names]
    if checks:
        panels.insert(0, ("checks", checks, [name for name in checks[0] if name != "step"]))
    columns = 3
    rows = max(1, -(-len(panels) // columns))
    height = 2.6 * rows
    figure = Figure(figsize=(4 * columns, height))
    # fixed positions, since automatic layouts take seconds for many panels
    figure.subplots_adjust(0.05, 0.3 / height, 0.99, 1 - 0.3 / height, hspace=0.25, wspace=0.2)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, points, shown) in zip(axes.flat, panels, strict=False):
        for name in shown:
            axis.plot([p["step"] for p in points], [p[name] for p in points], label=name, lw=1.2)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(nbins=5)
        if len(shown) > 1:
            axis.legend(fontsize=6)
    figure.savefig(path, dpi=110)
