"""What the app shows of a run, as HTML; every text in it is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from steering.lineage import Score
from steering.weights import normalize
from tilt.app.run import Done, Picture

__all__ = ["CSS", "LEGEND", "file_link", "message", "pictures", "progress", "score"]

# the page's own variables: they follow light and dark
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; width: 100%; }
.tilt-head h1 { font-size: 1.5rem; font-weight: 600; margin: 0.5rem 0 0; }
.tilt-head p, .tilt-note { color: var(--body-text-color-subdued); margin: 0.2rem 0; }
.tilt-status { min-height: 2.6rem; }
.tilt-status progress { width: 100%; height: 0.5rem; appearance: none; border: 0; }
.tilt-status progress, .tilt-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.tilt-status progress::-webkit-progress-value { background: var(--color-accent); }
.tilt-status progress::-moz-progress-bar { background: var(--color-accent); }
.tilt-refused { border-left: 4px solid #d0453b; padding: 0.4rem 0.8rem; }
.tilt-stopped { border-left: 4px solid var(--border-color-accent); padding: 0.4rem 0.8rem; }
.tilt-scores .prose, .tilt-scores { display: flex; flex-direction: column-reverse; }
.tilt-legend { order: 1; margin: 0 0 0.6rem !important; font-size: 0.8rem; }
.tilt-score { margin: 0 !important; padding-bottom: 0.9rem; }
.tilt-tiles { display: grid; gap: 0.5rem; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); }
.tilt-tiles.large { gap: 0.8rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.tilt-tiles figure { margin: 0; font-size: 0.75rem; line-height: 1.35; }
.tilt-tiles img { width: 100%; margin: 0; display: block; border-radius: 4px; }
.tilt-tiles img.small { image-rendering: pixelated; }
.tilt-tiles a, .tilt-tiles a:hover { display: block; padding: 0 !important; background: none; }
.tilt-tiles figcaption { color: var(--body-text-color-subdued); padding-top: 2px; }
.tilt-tiles b { color: var(--body-text-color); }
.tilt-tiles .bar { height: 4px; margin-top: 3px; background: var(--border-color-primary); }
.tilt-tiles .bar i { display: block; height: 100%; background: var(--color-accent); }
.tilt-tiles .dead img { filter: grayscale(1); opacity: 0.4; }
.tilt-tiles .best img { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.tilt-report { font-weight: 600; }
"""  # noqa: E501
LEGEND = """<p class="tilt-note tilt-legend">Under each picture: its number ← that of its parent at
the score below, how many children it gets; its weight, its reward.</p>"""


def message(text: str, kind: str) -> str:
    """A sentence for people; kind: refused, stopped or note."""
    text = text[:1].upper() + text[1:]
    role = "alert" if kind == "refused" else "status"
    return f'<div class="tilt-{kind}" role="{role}">{html.escape(text)}</div>'


def progress(text: str, done: int = 0, total: int = 0) -> str:
    """A line and a bar; without a total the bar only says that something goes on."""
    value = f' value="{done}" max="{total}"' if total else ""
    said = html.escape(text)
    return f'<div role="status">{said}</div><progress{value} aria-label="{said}"></progress>'


def score(score: Score, num_steps: int, before: Score | None = None) -> str:
    """One scored step of a run of one prompt: a tile a particle of the population it looked at.

    A tile has the particle's number and its parent's at the score before, its weight, its reward
    and how many children it got; one without any is marked as dead.
    """
    weights, num = normalize(score.log_weights)[0], score.rewards.shape[1]
    children = torch.bincount(score.ancestors[0], minlength=num).tolist()
    parents = range(num) if before is None else before.ancestors[0].tolist()
    dead = children.count(0)
    fate = f"{dead} of {num} replaced" if dead and bool(score.replaced[0]) else "all kept"
    tiles = []
    for i, (weight, reward) in enumerate(
        zip(weights.tolist(), score.rewards[0].tolist(), strict=True)
    ):
        born = f" ← {parents[i]}" if before is not None else ""
        fate_of = "ends" if children[i] == 0 else f"×{children[i]}"
        caption = f"<b>{i}</b>{born} · {fate_of}<br>{_percent(weight)} · {reward:.3g}"
        image = ""
        if score.previews is not None:
            alt = f"particle {i}, weight {_percent(weight)}, {fate_of}"
            image = f'<img class="small" src="{_inline(score.previews[0, i])}" alt="{alt}">'
        tiles.append(_tile(image, caption, weight, "dead" if children[i] == 0 else ""))
    head = f"Step {score.step + 1} of {num_steps} · ESS {score.ess[0].item():.1f} of {num} · {fate}"
    return (
        f'<section class="tilt-score"><div><b>{head}</b></div>'
        f'<div class="tilt-tiles">{"".join(tiles)}</div></section>'
    )


def pictures(done: Done, link: Callable[[Path], str], seconds: float) -> str:
    """What a run returned, the best first, each a link to its file, and the way to its report."""
    count, best = len(done.pictures), done.pictures[0].reward
    head = f"{count} pictures in {seconds:.0f} s" if count > 1 else f"1 picture in {seconds:.0f} s"
    said = f"{head} · best reward {best:.3g} · log Ẑ {done.log_z:.3g}"
    report = _link(link(done.report), "Open the report", "tilt-report")
    tiles = [
        _returned(picture, link(picture.file), i == 0) for i, picture in enumerate(done.pictures)
    ]
    return (
        f'<section><div class="tilt-note">{said} {report}</div>'
        f'<div class="tilt-tiles large">{"".join(tiles)}</div></section>'
    )


def file_link(path: Path) -> str:
    """The address of a file under Gradio's allowed_paths, relative to the page."""
    return "gradio_api/file=" + quote(str(path))


def _returned(picture: Picture, url: str, best: bool) -> str:
    with Image.open(picture.file) as image:
        small = max(image.size) < 200
    caption = f"<b>{picture.reward:.3g}</b> · weight {_percent(picture.weight)}"
    size = ' class="small"' if small else ""
    label = f"picture {picture.particle}, reward {picture.reward:.3g}"
    image = f'<img src="{html.escape(url)}" alt="{label}"{size}>'
    return _tile(_link(url, image), caption, picture.weight, "best" if best else "")


def _tile(image: str, caption: str, weight: float, kind: str) -> str:
    bar = f'<div class="bar"><i style="width:{100 * weight:.1f}%"></i></div>'
    return f'<figure class="{kind}">{image}{bar}<figcaption>{caption}</figcaption></figure>'


def _link(url: str, inner: str, kind: str = "") -> str:
    address = html.escape(url)
    return f'<a href="{address}" target="_blank" rel="noopener" class="{kind}">{inner}</a>'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "&lt;1 %"


def _inline(pixels: Tensor) -> str:
    """A (3, h, w) uint8 picture as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
