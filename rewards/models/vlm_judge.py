"""The answer of a vision-language model to a question about an image, as its score.

    judge(url="http://127.0.0.1:8000/v1", model=NAME)     an OpenAI-compatible endpoint
    judge(source=/a/folder)                               a transformers model in this process

Legend: n images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_choice
from ..backends.asking import AnswersQuestions, Asker, NoScore, Pictures
from ..backends.judge_presets import PRESETS, Preset
from ..images import check_inputs, to_uint8
from ..references import each_once, entries_of, pictures_of
from ..spec import written
from .base import Card

__all__ = ["PRESETS", "JudgeReward", "Preset"]

# the first token of an answer in any capitalisation, with and without a leading space
YES, NO = (
    [space + form for space in ("", " ") for form in (word, word.title(), word.upper())]
    for word in ("yes", "no")
)


class JudgeReward:
    """The number in a vision-language model's answer, or its probability of yes against no.

    `{prompt}` in the question is replaced by the prompt. The last match of the pattern is used,
    because models may reason first. With low and high, the number is mapped to [0, 1] as
    (x - low)/(high - low), and a number outside of them is not a score. The preset `yes_no` returns
    P(yes)/(P(yes) + P(no)) of the first token. Presets are described in
    `rewards.backends.judge_presets`; `flow_grpo` has Flow-GRPO's question and scale, but neither
    squashes the image to 512 x 512 nor counts a failure as 0.

    An edited image is judged beside its source: the presets whose name holds `_edit` show the one
    image of `references` before it, and the prompt is the instruction.

    An answer without a number, and a request that fails after all retries, is never 0. Scores are
    cached by the bytes of the images and the prompt, and equal pairs of a call are asked once.
    Decoding is greedy with seed 0, but a server that batches requests may still vary close
    decisions. The image keeps its size.

    Args:
        source: Folder or hub id of an image-text-to-text model of transformers, or None.
        preset: One of `PRESETS`.
        url, model, key_env, invalid, timeout, retries, concurrency: See
            `rewards.backends.asking.Asker`.
        question, pattern, low, high: Replace those of the preset. The pattern is a regular
            expression with one group, the number.
        compares: Whether all images of `references` are shown before the image; None as the preset.
        max_tokens: Length limit of an answer; None is that of the preset.
        device: Device of a local model; None follows the images.
    """

    differentiable = False
    card = Card(
        weights="",
        size="the model's own",
        licence="the model's own",
        range="[0, 1] on a scale, else unbounded",
        citation="Wang et al. 2025, arXiv 2503.05236; Lin et al. 2024, arXiv 2404.01291",
    )

    def __init__(
        self,
        source: str | None = None,
        preset: str = "score",
        *,
        url: str | None = None,
        model: str | None = None,
        key_env: str | None = None,
        question: str | None = None,
        pattern: str | None = None,
        low: float | None = None,
        high: float | None = None,
        compares: bool | None = None,
        invalid: str = "error",
        max_tokens: int | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the judge's preset", preset, PRESETS)
        _check_texts(source=source, question=question, pattern=pattern, key_env=key_env)
        if not isinstance(compares, bool | None):
            raise ValueError(f"the judge's compares is {compares!r}; give true or false")
        self.name = "judge"
        asking: dict[str, Any] = {
            **{"source": source, "url": url, "model": model, "key_env": key_env},
            **{"invalid": invalid, "timeout": timeout, "retries": retries},
            "concurrency": concurrency,
        }
        self.spec = written(
            "judge",
            JudgeReward,
            **{"preset": preset, "question": question, "pattern": pattern, "low": low},
            **{"high": high, "compares": compares, "max_tokens": max_tokens},
            **asking,
        )
        self.task = _task(PRESETS[preset], question, pattern, low, high)
        if compares is not None:
            self.task = replace(self.task, sources=math.inf if compares else 0)
        bounded = not self.task.patterns or self.task.low is not None
        self.range: tuple[float | None, float | None] = (0.0, 1.0) if bounded else (None, None)
        longest = self.task.max_tokens if max_tokens is None else max_tokens
        self.asker = Asker(**asking, max_tokens=longest, device=device)
        self.model: AnswersQuestions = self.asker.model

    @property
    def wants_references(self) -> bool:
        """Whether the question is about images of `references` as well."""
        return self.task.sources > 0

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts with special tokens of the local model."""
        self.asker.check(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        self.check(prompts)
        shown: list[Pictures] = [(picture,) for picture in to_uint8(images)]
        if self.wants_references and shown:
            entries = entries_of("the judge", references, len(images))
            sources = each_once(entries, self._sources)
            shown = [(*before, *after) for before, after in zip(sources, shown, strict=True)]
        return self.asker.scores(shown, prompts, self._ask, images.device)

    def _sources(self, entry: Any, index: int) -> list[np.ndarray]:
        found = [to_uint8(picture)[0] for picture in pictures_of(entry, index)]
        if len(found) > self.task.sources:
            raise ValueError(
                f"the judge's question is about one source image but image {index} has "
                f"{len(found)} references; give one, or a question of your own with compares=true"
            )
        return found

    def _ask(self, model: AnswersQuestions, pictures: Pictures, prompt: str) -> float:
        question = self.task.question.replace("{prompt}", prompt)
        if not self.task.patterns:
            (yes, no), _ = model.first(pictures, question, (YES, NO))
            return _share(yes, no)
        return _number(model.answer(pictures, question), self.task)


def _share(yes: float, no: float) -> float:
    if not yes + no > 0:
        raise NoScore("neither yes nor no is among the likely answers")
    return yes / (yes + no)


def _number(answer: str, task: Preset) -> float:
    """Return the mean (or minimum) of what the patterns match, on the scale of the task."""
    shown = repr(answer if len(answer) <= 80 else "..." + answer[-80:])
    numbers = []
    for pattern in task.patterns:
        try:
            numbers.append(float(re.findall(pattern, answer)[-1]))
        except (IndexError, ValueError):
            raise NoScore(f"its answer {shown} holds no score") from None
        if not math.isfinite(numbers[-1]):
            raise NoScore(f"its answer {shown} holds no finite score")
    number = min(numbers) if task.least else sum(numbers) / len(numbers)
    if task.low is None or task.high is None:
        return number
    for found in numbers:
        if not task.low <= found <= task.high:
            raise NoScore(
                f"its answer {shown} gives {found:g}, outside [{task.low:g}, {task.high:g}]"
            )
    return (number - task.low) / (task.high - task.low)


def _check_texts(**texts: Any) -> None:
    for name, value in texts.items():
        if not isinstance(value, str | None):
            raise ValueError(f'the judge\'s {name} is {value!r}; give text, as in {name}="..."')


def _task(
    preset: Preset,
    question: str | None,
    pattern: str | None,
    low: float | None,
    high: float | None,
) -> Preset:
    """Return the preset with the given replacements; a new pattern drops its low and high."""
    if question is not None:
        preset = replace(preset, question=question)
    if pattern is None and low is None and high is None:
        return preset
    if not preset.patterns:
        raise ValueError("the preset yes_no reads no number; leave out pattern, low and high")
    numbers = [x for x in (low, high) if isinstance(x, int | float) and math.isfinite(x)]
    if (low, high) != (None, None) and not (len(numbers) == 2 and numbers[0] < numbers[1]):
        raise ValueError(
            f"the judge's low is {low!r} and high {high!r}; give both as numbers, low below "
            "high, or neither"
        )
    if pattern is None:
        return replace(preset, low=low, high=high)
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"the judge's pattern {pattern!r} is not a regex: {error}") from error
    if groups != 1:
        raise ValueError(
            f"the judge's pattern {pattern!r} has {groups} groups; give it one, around the number"
        )
    return replace(preset, patterns=(pattern,), low=low, high=high)
