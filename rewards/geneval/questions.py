"""The questions of a prompt in GenEval 2's format, each with its answer of one word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_by_prompt
from .prompts import NUMBERS

__all__ = ["Questions", "read_questions", "spellings"]

Questions = tuple[tuple[str, str], ...]  # (question, answer in lower case)


def read_questions(path: str | Path) -> dict[str, Questions]:
    """Return the questions and answers of a file like geneval2_data.jsonl, by prompt.

    A line is {"prompt": ..., "vqa_list": [[question, answer], ...]}; other keys are ignored. Raises
    ValueError for a line that is not, or that contradicts an earlier one of its prompt.
    """
    example = "GenEval 2's geneval2_data.jsonl"
    return read_by_prompt(path, "file of questions", example, _questions)


def _questions(record: Mapping[str, Any]) -> Questions:
    pairs = []
    for item in record["vqa_list"]:
        if not isinstance(item, list) or [type(part) for part in item] != [str, str]:
            raise ValueError(f"the vqa_list holds {item!r:.80} but must hold [question, answer]")
        question, answer = (part.strip() for part in item)
        if not question or len(answer.split()) != 1:
            raise ValueError(f"{item!r:.80} is not a question with an answer of one word")
        pairs.append((question, answer.lower()))
    if not pairs:
        raise ValueError("the vqa_list is empty; give at least one question")
    return tuple(pairs)


def spellings(answer: str) -> list[str]:
    """Return the spellings of an answer that count, as in GenEval 2's evaluation.py.

    They are the word in lower case and capitalised, and a number up to ten in digits as well, each
    with and without a leading space.
    """
    number = answer if answer in NUMBERS else _word(answer)
    words = [number, number.capitalize()]
    words += [str(NUMBERS.index(number) + 1)] if number in NUMBERS else []
    return [space + word for space in ("", " ") for word in words]


def _word(answer: str) -> str:
    digits = [str(i) for i in range(1, len(NUMBERS) + 1)]
    return NUMBERS[digits.index(answer)] if answer in digits else answer
