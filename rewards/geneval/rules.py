"""GenEval's rules: what a prompt asks for, and how far the things detected in a picture meet it.

Ghosh et al. 2023, "GenEval", arXiv 2310.11513. An entry is one line of its metadata file: things
to include, each with a count, perhaps a colour and a place beside an earlier one, and things of
which there must be fewer than a count. Pure Python; what detects is none of its business.
Legend: c the count asked for, f the number found.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = [
    "CLASSES",
    "COLOURS",
    "DIRECTIONS",
    "TASKS",
    "Detection",
    "Entry",
    "Expected",
    "exactly",
    "grammar",
    "included",
    "overall",
    "parse",
    "phrase",
    "read_metadata",
    "relations",
    "select",
    "share",
    "strict",
    "terms",
]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
POSITION_THRESHOLD = 0.1  # of the sizes of both things, which may overlap by that
MOST = 16  # things of a class
# fmt: off
# COCO's classes, three of them renamed by GenEval
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One thing: box (left, top, right, bottom) in pixels of the picture, score its confidence.

    colour "" is one that nobody has looked at yet; mask, if there is one, is bool (h, w).
    """

    name: str
    colour: str
    box: Box
    score: float
    mask: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Expected:
    """A class and how many of it; colour "" is any, relation "" is anywhere.

    With a relation, each lies so to each thing of the entry's include number `target`, an
    earlier one.
    """

    name: str
    colour: str
    count: int
    relation: str = ""
    target: int = 0


@dataclass(frozen=True)
class Entry:
    """What a prompt asks for: all of `include`, and of each in `exclude` fewer than its count."""

    tag: str
    include: tuple[Expected, ...]
    exclude: tuple[Expected, ...] = ()

    @property
    def names(self) -> list[str]:
        """The classes that a detector must look for, each once."""
        return list(dict.fromkeys(e.name for e in (*self.include, *self.exclude)))


def relations(a: Box, b: Box) -> set[str]:
    """How a lies to b: the offset of the centres, less a tenth of the sizes, by its direction.

    A direction holds where its share of the distance exceeds one half, so two may hold.
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
    """GenEval's choice: the 16 most confident of each class above the threshold, best first.

    overlap: a thing whose intersection over union with a better one of its class is as much or
    more is dropped first; at 1 none is, which is GenEval's default. (GenEval takes the 16 before
    it drops, which never matters at its default.)
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
    """1 if the picture is correct by GenEval's own evaluation, else 0.

    Of each included class at least c; the c most confident all in the colour; each of them in
    the relation to each of its target's; and fewer of each excluded class than its count.
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
    """1 if every term holds in full, else 0: flow_grpo's strict score, which asks for f = c."""
    return float(min(terms(entry, found)) == 1)


def share(entry: Entry, found: Sequence[Detection]) -> float:
    """The mean of the terms, in [0, 1]: a reward that rises before the picture is correct."""
    values = terms(entry, found)
    return sum(values) / len(values)


def terms(entry: Entry, found: Sequence[Detection]) -> list[float]:
    """What an entry asks for, one number in [0, 1] each.

    For each include 1 - |c - f|/c; if it names a colour, the same of those in it; if a relation,
    1 or 0. Colour and relation count only where f = c. Then, if the counts do not say it
    already, 1 if nothing excluded is there, else 0. This is the dense reward of flow_grpo (Liu
    et al. 2025) and DiffusionNFT without two faults of it: there a picture with too many things
    falls below 0, and a failed relation is entered as 0 and then as 1 too, which gives it half.
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
    """Those of the wanted class, best first.

    Where an entry asks for one class twice, which GenEval's never do, colours tell them apart.
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
    """GenEval's figure: the mean over tasks of a task's mean score, whatever their sizes."""
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


def read_metadata(path: str | Path) -> dict[str, Entry]:
    """The entries of a file in GenEval's format, one JSON object a line, by their prompts.

    ValueError names the line that is not one, or that contradicts an earlier one of its prompt.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ValueError(
            f"there is no metadata file {str(path)!r}; give GenEval's evaluation_metadata.jsonl, "
            "or one like it"
        )
    entries: dict[str, Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, entry = str(record["prompt"]).strip(), _entry(record)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"line {number} of {path} is no entry of GenEval's metadata: "
                f"{type(error).__name__}: {error}"
            ) from error
        if entries.setdefault(prompt, entry) != entry:
            raise ValueError(
                f"line {number} of {path} asks for other things than an earlier line of the same "
                f"prompt {prompt!r}; keep one of them"
            )
    if not entries:
        raise ValueError(f"the metadata file {str(path)!r} is empty; give one with prompts")
    return entries


def _entry(record: Mapping[str, Any]) -> Entry:
    if record["tag"] not in TASKS:
        raise ValueError(f"the tag is {record['tag']!r} but must be one of {list(TASKS)}")
    include: list[Expected] = []
    for item in record["include"]:
        colour, (relation, target) = item.get("color", ""), item.get("position", ("", 0))
        if unknown := set(item) - {"class", "count", "color", "position"}:
            raise ValueError(f"an include has {sorted(unknown)}, which GenEval does not know")
        if colour not in ("", *COLOURS):
            raise ValueError(f"the color is {colour!r} but must be one of {list(COLOURS)}")
        if relation and (relation not in DIRECTIONS or target not in range(len(include))):
            raise ValueError(
                f"the position is {item['position']!r} but must be one of {list(DIRECTIONS)} "
                "and the number of an earlier include"
            )
        name, count = _class_and_count(item)
        include.append(Expected(name, colour, count, relation, target))
    if not include:
        raise ValueError("nothing is included; ask for one thing at least")
    if not _distinct(include):
        raise ValueError(
            "a class is included twice; name both by different colours, or make it one"
        )
    exclude = [_class_and_count(item) for item in record.get("exclude", ())]
    return Entry(record["tag"], tuple(include), tuple(Expected(n, "", c) for n, c in exclude))


def _distinct(wanted: Sequence[Expected]) -> bool:
    """Whether things of one class are told apart by colours."""
    names = [e.name for e in wanted]
    kinds = {(e.name, e.colour) for e in wanted}
    return len(kinds) == len(wanted) and all(e.colour or names.count(e.name) == 1 for e in wanted)


def _class_and_count(item: Mapping[str, Any]) -> tuple[str, int]:
    name, count = item["class"], item["count"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the class is {name!r} but must be a name")
    if type(count) is not int or count < 1:
        raise ValueError(f"the count of {name} is {count!r} but must be a whole number, 1 or more")
    return name.strip(), count


def grammar(names: Sequence[str], colours: Sequence[str]) -> re.Pattern[str]:
    """GenEval's prompts about such classes, less "a photo of": one thing, or two with a link."""
    counts, shades = "|".join(("an?", *NUMBERS)), "|".join(colours)
    kinds = "|".join(sorted(names, key=len, reverse=True))
    noun = rf"(?P<count{{0}}>{counts})( (?P<colour{{0}}>{shades}))? (?P<name{{0}}>{kinds})(es|s)?"
    links = "|".join(("and", *DIRECTIONS))
    return re.compile(rf"{noun.format(1)}( (?P<link>{links}) {noun.format(2)})?")


def phrase(pattern: re.Pattern[str], text: str) -> tuple[str, list[Expected], str] | None:
    """(tag, the things asked for in order, the relation of the first to the second or "").

    None where the text is no such phrase, or asks for one thing twice.
    """
    match = pattern.fullmatch(text)
    if match is None:
        return None
    numbers = [i for i in (1, 2) if match[f"name{i}"]]
    wanted = [
        Expected(match[f"name{i}"], match[f"colour{i}"] or "", _count(match[f"count{i}"]))
        for i in numbers
    ]
    if not _distinct(wanted):
        return None
    relation = match["link"] if match["link"] in DIRECTIONS else ""
    coloured = any(e.colour for e in wanted)
    if len(wanted) == 2:
        tag = "position" if relation else "color_attr" if coloured else "two_object"
    elif match["count1"] in NUMBERS:
        tag = "counting"
    else:
        tag = "colors" if coloured else "single_object"
    return tag, wanted, relation


def _count(word: str) -> int:
    return NUMBERS.index(word) + 1 if word in NUMBERS else 1


def included(wanted: Sequence[Expected], relation: str) -> tuple[Expected, ...]:
    """The includes in GenEval's order, where what others lie beside comes first."""
    if not relation:
        return tuple(wanted)
    first, second = wanted
    return second, replace(first, relation=relation, target=0)


PHOTOGRAPHS = grammar(CLASSES, COLOURS)


def parse(prompt: str) -> Entry | None:
    """The entry of a prompt made as GenEval's are, of its classes and colours; else None.

    "a photo of three dogs": of a number above one, GenEval excludes one more.
    """
    start, text = "a photo of ", prompt.strip().lower()
    found = phrase(PHOTOGRAPHS, text[len(start) :]) if text.startswith(start) else None
    if found is None:
        return None
    tag, wanted, relation = found
    exclude = tuple(Expected(e.name, "", e.count + 1) for e in wanted if e.count > 1)
    return Entry(tag, included(wanted, relation), exclude)
