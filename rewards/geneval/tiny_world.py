"""A detector of the coloured shapes of the embedded models' world, and the grammar of its prompts.

Pixels are modelled as background mixed with one colour of the palette; connected pixels of one
colour are an object, and its shape is the template that overlaps it most after moment matching.

Legend: n images, h w their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import check_inputs, resize
from .prompts import grammar, included, phrase
from .rules import Detection, Entry, Expected

__all__ = ["COLOURS", "SHAPES", "SIZE", "detect", "parse"]

# the world on which the embedded models were trained
SIZE = 64
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 170, 70),
    "blue": (40, 90, 220),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SMALLEST = 40  # pixels of a 64x64 image; objects of the world have at least 125
OVERLAP = 0.6  # least intersection over union of an object with its template

GRAMMAR = grammar(SHAPES, tuple(COLOURS))


def parse(prompt: str) -> Entry | None:
    """Return the entry of a prompt of the embedded world, or None; no other shapes may be present.

    One more of each shape than is asked for is excluded, so that counts are exact.
    """
    found = phrase(GRAMMAR, prompt.strip().lower())
    if found is None:
        return None
    tag, wanted, relation = found
    asked = {shape: sum(e.count for e in wanted if e.name == shape) for shape in SHAPES}
    exclude = tuple(Expected(shape, "", count + 1) for shape, count in asked.items())
    return Entry(tag, included(wanted, relation), exclude)


def detect(images: Tensor, names: Sequence[Sequence[str]] = ()) -> list[list[Detection]]:
    """Return the objects in each image (n, 3, h, w), from left to right; the score is the overlap.

    All shapes are detected; `names` is ignored.
    """
    check_inputs(images, [""] * len(images))
    h, w = images.shape[2:]
    x = resize(images.detach().float().cpu(), (SIZE, SIZE))
    labels = _components(_masks(x)).numpy()
    scale = np.array([w, h, w, h]) / SIZE
    found = []
    for picture in labels:
        things = []
        for colour, plane in zip(COLOURS, picture, strict=True):
            for label in np.unique(plane[plane > 0]):
                thing = _thing(plane == label, colour, scale)
                if thing is not None:
                    things.append(thing)
        found.append(sorted(things, key=lambda thing: thing.box))
    return found


def _masks(x: Tensor) -> Tensor:
    """Masks (n, colours, h, w) of the pixels with more than half of that colour.

    A pixel is background + a·(colour - background), 0 <= a <= 1, for the colour with the smallest
    residual, so that the soft edge of a yellow object on black is not classified as green.
    """
    border = torch.cat([x[:, :, :2].flatten(2), x[:, :, -2:].flatten(2)], 2)
    border = torch.cat([border, x[..., :2].flatten(2), x[..., -2:].flatten(2)], 2)
    background = border.median(2).values[:, None, :, None, None]  # (n, 1, 3, 1, 1)
    x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)  # reduces noise
    palette = torch.tensor(list(COLOURS.values()), dtype=x.dtype).view(1, -1, 3, 1, 1) / 255
    towards = palette - background
    away = x[:, None] - background
    share = (away * towards).sum(2) / (towards * towards).sum(2).clamp(min=1e-4)
    residual = (away - share.clamp(0, 1).unsqueeze(2) * towards).pow(2).sum(2)
    best = residual.argmin(1, keepdim=True)
    mine = torch.arange(palette.shape[1]).view(1, -1, 1, 1) == best
    return mine & (share > 0.5)


def _components(masks: Tensor) -> Tensor:
    """Labels of the connected components (8 neighbours) of (n, c, h, w), 0 outside."""
    h, w = masks.shape[2:]
    labels = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w) * masks
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * masks
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _thing(mask: np.ndarray, colour: str, scale: np.ndarray) -> Detection | None:
    area = int(mask.sum())
    if area < SMALLEST:
        return None
    rows, columns = np.nonzero(mask)
    centre = np.array([columns.mean(), rows.mean()]) + 0.5
    overlaps = {shape: _overlap(mask, shape, centre, area) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < OVERLAP:
        return None
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * scale
    left, top, right, bottom = (float(side) for side in box)
    return Detection(shape, colour, (left, top, right, bottom), overlaps[shape])


def _overlap(mask: np.ndarray, shape: str, centre: np.ndarray, area: int) -> float:
    """Intersection over union with the template of the same area and centroid."""
    unit_area, offset = _moments(shape)
    radius = np.sqrt(area / unit_area)
    middle = centre - radius * np.array([0.0, offset])
    pixels = np.arange(SIZE) + 0.5
    u, v = np.meshgrid((pixels - middle[0]) / radius, (pixels - middle[1]) / radius)
    template = _inside(shape, u, v)
    return float((template & mask).sum() / (template | mask).sum())


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area and vertical centroid of a shape of radius 1."""
    grid = (np.arange(400) + 0.5) / 160 - 1.25
    u, v = np.meshgrid(grid, grid)
    inside = _inside(shape, u, v)
    return float(inside.sum() / 160**2), float(v[inside].mean())


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return whether points (u right, v down) lie in a shape of radius 1 around the origin."""
    if shape == "circle":
        return u * u + v * v <= 0.95**2
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.82
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)
    if shape == "triangle":
        return (v <= 0.8) & (abs(u) <= 0.95 * (v + 1) / 1.8)
    # a five-pointed star: fold the plane to half of a point, which one edge bounds
    angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    inner = 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    return (along - 1.05) * inner[1] + across * (1.05 - inner[0]) <= 0
