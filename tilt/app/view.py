"""The display of the app's runs, as HTML from templates that escape every text."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from steering.lineage import Score
from steering.weights import normalize
from tilt.app.run import Done
from tilt.report.markup import environment

__all__ = ["CSS", "LEGEND", "file_link", "message", "pictures", "progress", "score"]

_TEMPLATES = environment(Path(__file__).parent / "templates")
_VIEW: Any = _TEMPLATES.get_template("view.html").module
CSS = _TEMPLATES.get_template("app.css").render()
LEGEND = str(_VIEW.legend())


def message(text: str, kind: str) -> str:
    """Return a message to the user; kind: refused, stopped or note."""
    return str(_VIEW.message(text[:1].upper() + text[1:], kind))


def progress(text: str, done: int = 0, total: int = 0) -> str:
    """Return a line and a progress bar, which is indeterminate without a total."""
    return str(_VIEW.progress(text, done, total))


def score(score: Score, num_steps: int, before: Score | None = None) -> str:
    """Return one scored step of a run of one prompt, with one tile per particle.

    A tile has the particle's number, its parent's number at the previous score, its weight, its
    reward and its number of children; one without children is marked as dead.
    """
    num = score.rewards.shape[1]
    children = torch.bincount(score.ancestors[0], minlength=num).tolist()
    parents = [None] * num if before is None else before.ancestors[0].tolist()
    weights, rewards = normalize(score.log_weights)[0].tolist(), score.rewards[0].tolist()
    images = [""] * num if score.previews is None else map(_inline, score.previews[0])
    tiles = list(zip(parents, children, weights, rewards, images, strict=True))
    step, ess, replaced = score.step + 1, score.ess[0].item(), bool(score.replaced[0])
    return str(_VIEW.score(step, num_steps, ess, tiles, children.count(0) * replaced))


def pictures(done: Done, link: Callable[[Path], str], seconds: float) -> str:
    """Return the images of a run, best first, with links to their files and to the report."""
    tiles = [(p, link(p.file), _is_small(p.file)) for p in done.pictures]
    return str(_VIEW.pictures(tiles, seconds, done.log_z, link(done.report)))


def file_link(path: Path) -> str:
    """Return the address of a file in Gradio's allowed_paths, relative to the page."""
    return "gradio_api/file=" + quote(str(path))


def _is_small(file: Path) -> bool:
    with Image.open(file) as image:
        return max(image.size) < 200


def _inline(pixels: Tensor) -> str:
    """Return a data: address of an image (3, h, w) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
