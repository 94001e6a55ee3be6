"""The requirements of a prompt: GenEval's metadata files, and the grammar of its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import read_by_prompt
from .rules import COLOURS, DIRECTIONS, TASKS, Entry, Expected

__all__ = ["CLASSES", "grammar", "included", "parse", "phrase", "read_metadata"]

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# fmt: off
# COCO's classes, of which GenEval renamed three
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


def read_metadata(path: str | Path) -> dict[str, Entry]:
    """Return the entries of a file in GenEval's format, one JSON object in each line, by prompt.

    Raises ValueError for a line that is not an entry or contradicts an earlier one of its prompt.
    """
    return read_by_prompt(path, "metadata file", "GenEval's evaluation_metadata.jsonl", _entry)


def _entry(record: Mapping[str, Any]) -> Entry:
    if record["tag"] not in TASKS:
        raise ValueError(f"the tag is {record['tag']!r} but must be one of {list(TASKS)}")
    include: list[Expected] = []
    for item in record["include"]:
        colour, (relation, target) = item.get("color", ""), item.get("position", ("", 0))
        if unknown := set(item) - {"class", "count", "color", "position"}:
            raise ValueError(f"an include has the unknown keys {sorted(unknown)}")
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
        raise ValueError("nothing is included; include at least one object")
    if not _distinct(include):
        raise ValueError(
            "a class is included twice; name both by different colours, or make it one"
        )
    exclude = [_class_and_count(item) for item in record.get("exclude", ())]
    return Entry(record["tag"], tuple(include), tuple(Expected(n, "", c) for n, c in exclude))


def _distinct(wanted: Sequence[Expected]) -> bool:
    """Return whether entries of the same class differ in colour."""
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
    """Return a pattern of GenEval's prompts without "a photo of": one noun, or two and a link."""
    counts, shades = "|".join(("an?", *NUMBERS)), "|".join(colours)
    kinds = "|".join(sorted(names, key=len, reverse=True))
    noun = rf"(?P<count{{0}}>{counts})( (?P<colour{{0}}>{shades}))? (?P<name{{0}}>{kinds})(es|s)?"
    links = "|".join(("and", *DIRECTIONS))
    return re.compile(rf"{noun.format(1)}( (?P<link>{links}) {noun.format(2)})?")


def phrase(pattern: re.Pattern[str], text: str) -> tuple[str, list[Expected], str] | None:
    """Parse a text to (tag, objects in order, relation of the first to the second or "").

    Returns None if the text does not match, or names the same object twice.
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
    """Return the includes in GenEval's order, in which the target of a relation comes first."""
    if not relation:
        return tuple(wanted)
    first, second = wanted
    return second, replace(first, relation=relation, target=0)


PHOTOGRAPHS = grammar(CLASSES, COLOURS)


def parse(prompt: str) -> Entry | None:
    """Return the entry of a prompt of GenEval's form with its classes and colours, or None.

    As in GenEval, a count above one, as in "a photo of three dogs", excludes one more.
    """
    start, text = "a photo of ", prompt.strip().lower()
    found = phrase(PHOTOGRAPHS, text[len(start) :]) if text.startswith(start) else None
    if found is None:
        return None
    tag, wanted, relation = found
    exclude = tuple(Expected(e.name, "", e.count + 1) for e in wanted if e.count > 1)
    return Entry(tag, included(wanted, relation), exclude)
