"""GenEval's rules: whether detected objects fulfil what a prompt asks for.

Ghosh et al. 2023, "GenEval", arXiv 2310.11513. An entry is one line of its metadata file: objects
to include, each with a count and optionally a colour and a position relative to an earlier one,
and objects of which there must be fewer than a count.

Legend: c is the count asked for, f the number found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "TASKS",
    "Detection",
    "Entry",
    "Expected",
    "exactly",
    "overall",
    "relations",
    "select",
    "share",
    "strict",
    "terms",
]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
POSITION_THRESHOLD = 0.1  # of the sizes of both objects, by which they may overlap
MOST = 16  # objects of a class
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
        name: Its class.
        colour: Its colour, or "" if it has not been determined.
        box: (left, top, right, bottom) in pixels of the image.
        score: Its confidence.
        mask: None, or bool (h, w).
    """

    name: str
    colour: str
    box: Box
    score: float
    mask: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Expected:
    """A class and its count; colour "" is any colour, relation "" any position.

    With a relation, each object has it to each object of an earlier include, number `target`.
    """

    name: str
    colour: str
    count: int
    relation: str = ""
    target: int = 0


@dataclass(frozen=True)
class Entry:
    """A prompt's requirements: all of `include`, and fewer of each in `exclude` than its count."""

    tag: str
    include: tuple[Expected, ...]
    exclude: tuple[Expected, ...] = ()

    @property
    def names(self) -> list[str]:
        """The classes that a detector must find, without repetition."""
        return list(dict.fromkeys(e.name for e in (*self.include, *self.exclude)))


def relations(a: Box, b: Box) -> set[str]:
    """Return the directions from b to a, by the centres' offset reduced by a tenth of the sizes.

    A direction holds if its share of the distance exceeds one half, so two may hold.
    """
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        slack = POSITION_THRESHOLD * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        offset.append(distance)
        beyond.append(math.copysign(max(abs(distance) - slack, 0.0), distance))
    if max(abs(x) for x in beyond) < 1e-3:
        return set()
    length = math.hypot(*offset)
    return {
        name
        for name, (x, y) in DIRECTIONS.items()
        if (x * beyond[0] + y * beyond[1]) / length > 0.5
    }


def select(found: Sequence[Detection], threshold: float, overlap: float = 1.0) -> list[Detection]:
    """Return the 16 most confident detections of each class above the threshold, best first.

    A detection whose intersection over union with a better one of its class is at least `overlap`
    is dropped before that; none is at 1, GenEval's default. GenEval selects the 16 before it
    drops, which makes no difference at its default.
    """
    kept: dict[str, list[Detection]] = {}
    for thing in sorted(found, key=lambda d: -d.score):
        better = kept.setdefault(thing.name, [])
        if thing.score <= threshold or len(better) == MOST:
            continue
        if overlap >= 1 or all(_iou(thing.box, other.box) < overlap for other in better):
            better.append(thing)
    return sorted((d for group in kept.values() for d in group), key=lambda d: -d.score)


def _iou(a: Box, b: Box) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(wide, 0.0) * max(tall, 0.0)
    outer = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inner
    return inner / outer if outer > 0 else 0.0


def strict(entry: Entry, found: Sequence[Detection]) -> float:
    """Return 1 if the image is correct by GenEval's own evaluation, else 0.

    There must be at least c of each included class, the c most confident all in the colour and in
    the relation to each of the target's, and fewer of each excluded class than its count.
    """
    groups: list[list[Detection]] = []
    for wanted in entry.include:
        group = _things(entry, wanted, found)[: wanted.count]
        if len(group) < wanted.count or _coloured(group, wanted) < wanted.count:
            return 0.0
        if wanted.relation and not _placed(group, groups[wanted.target], wanted.relation):
            return 0.0
        groups.append(group)
    return float(all(_number(found, e.name) < e.count for e in entry.exclude))


def exactly(entry: Entry, found: Sequence[Detection]) -> float:
    """Return 1 if every term is 1, else 0: flow_grpo's strict score, which requires f = c."""
    return float(min(terms(entry, found)) == 1)


def share(entry: Entry, found: Sequence[Detection]) -> float:
    """Return the mean of the terms, in [0, 1]: a reward that rises before the image is correct."""
    values = terms(entry, found)
    return sum(values) / len(values)


def terms(entry: Entry, found: Sequence[Detection]) -> list[float]:
    """Return the degree to which each requirement of an entry is fulfilled, in [0, 1].

    For each include: 1 - |c - f|/c; with a colour, the same for the objects in that colour; with a
    relation, 1 or 0. Colour and relation count only if f = c. Last, unless the counts imply
    it, 1 if nothing excluded is present, else 0. This is the dense reward of flow_grpo (Liu et al.
    2025) and DiffusionNFT without two faults: theirs falls below 0 for too many objects, and
    counts a failed relation as both 0 and 1.
    """
    groups: list[list[Detection]] = []
    values: list[float] = []
    for wanted in entry.include:
        group = _things(entry, wanted, found)
        values.append(_nearness(len(group), wanted.count))
        matched = len(group) == wanted.count
        if wanted.colour:
            right = _coloured(group, wanted)
            values.append(_nearness(right, wanted.count) if matched else 0.0)
            matched = matched and right == wanted.count
        if wanted.relation:
            target = groups[wanted.target]
            matched = matched and bool(target) and _placed(group, target, wanted.relation)
            values.append(float(matched))
        groups.append(group if matched else [])
    once = [e.name for e in entry.include]
    beyond = [e for e in entry.exclude if once.count(e.name) != 1]
    if beyond:
        values.append(float(all(_number(found, e.name) < e.count for e in beyond)))
    return values


def _nearness(number: int, wanted: int) -> float:
    return max(0.0, 1 - abs(wanted - number) / wanted)


def _things(entry: Entry, wanted: Expected, found: Sequence[Detection]) -> list[Detection]:
    """Return the detections of a class, best first.

    If an entry includes a class twice, which GenEval's never do, its colours distinguish the two.
    """
    group = [d for d in found if d.name == wanted.name]
    if sum(e.name == wanted.name for e in entry.include) > 1:
        group = [d for d in group if d.colour == wanted.colour]
    return sorted(group, key=lambda d: -d.score)


def _coloured(group: Sequence[Detection], wanted: Expected) -> int:
    return sum(wanted.colour in ("", d.colour) for d in group)


def _placed(group: Sequence[Detection], target: Sequence[Detection], relation: str) -> bool:
    return all(relation in relations(a.box, b.box) for a in group for b in target)


def _number(found: Sequence[Detection], name: str) -> int:
    return sum(d.name == name for d in found)


def overall(scores: Sequence[float], tags: Sequence[str]) -> float:
    """GenEval's overall score: the unweighted mean over tasks of the mean score of a task."""
    if len(scores) != len(tags):
        raise ValueError(f"{len(scores)} scores need as many tags but got {len(tags)}")
    missing = [task for task in TASKS if task not in tags]
    if missing or not set(tags) <= set(TASKS):
        raise ValueError(
            f"GenEval's overall score needs the tags {list(TASKS)} but got {sorted(set(tags))}; "
            "score all six tasks"
        )
    means = []
    for task in TASKS:
        own = [float(score) for score, tag in zip(scores, tags, strict=True) if tag == task]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)
