"""The answer of a vision-language model to a question about an image, as its score.

    judge(url="http://127.0.0.1:8000/v1", model=NAME)     an OpenAI-compatible endpoint
    judge(source=/a/folder)                               a transformers model in this process

Legend: n images.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_choice
from ..backends.chat_endpoint import Endpoint, EndpointError
from ..backends.judge_presets import PRESETS, Preset
from ..backends.local_vlm import LocalVlm
from ..images import check_inputs, to_uint8
from ..spec import written
from .base import Card

__all__ = ["PRESETS", "JudgeReward", "Preset"]

CACHED = 4096  # scores


class NoScore(Exception):
    """An answer contains no score; the message says why."""


class AnswersQuestions(Protocol):
    """A model that answers a question about an image (h, w, 3) of bytes."""

    concurrency: int
    reserved: tuple[str, ...]

    def answer(self, picture: np.ndarray, question: str) -> str: ...

    def yes(self, picture: np.ndarray, question: str) -> tuple[float, float]: ...


class JudgeReward:
    """The number in a vision-language model's answer, or its probability of yes against no.

    `{prompt}` in the question is replaced by the prompt. The last match of the pattern is used,
    because models may reason first. With low and high, the number is mapped to [0, 1] as
    (x - low)/(high - low), and a number outside of them is not a score. The preset `yes_no` returns
    P(yes)/(P(yes) + P(no)) of the first token. Presets are described in
    `rewards.backends.judge_presets`; `flow_grpo` has Flow-GRPO's question and scale, but neither
    squashes the image to 512 x 512 nor counts a failure as 0.

    An answer without a number, and a request that fails after all retries, is never 0. Scores are
    cached by the bytes of the image and the prompt, and equal pairs of a call are asked once.
    Decoding is greedy with seed 0, but a server that batches requests may still vary close
    decisions. The image keeps its size.

    Args:
        source: Folder or hub id of an image-text-to-text model of transformers, or None.
        preset: One of `PRESETS`.
        url, model: An endpoint instead of source, see `rewards.backends.chat_endpoint`, which also
            describes key_env, timeout, retries and concurrency.
        question, pattern, low, high: Replace those of the preset. The pattern is a regular
            expression with one group, the number.
        invalid: "error" raises ValueError for an answer without a score, after caching all others;
            "nan" returns NaN for it.
        max_tokens: Length limit of an answer.
        device: Device of a local model; None follows the images.
    """

    differentiable = False
    wants_references = False
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
        invalid: str = "error",
        max_tokens: int = 512,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        _check(source, preset, url, model, invalid)
        texts = {"source": source, "question": question, "pattern": pattern, "key_env": key_env}
        _check_texts(**texts)
        remote = {"timeout": timeout, "retries": retries, "concurrency": concurrency}
        sizes = {"max_tokens": max_tokens, **remote}
        _check_sizes(**sizes)
        own = {"preset": preset, "url": url, "model": model, "low": low, "high": high}
        self.name = "judge"
        self.spec = written("judge", JudgeReward, invalid=invalid, **own, **texts, **sizes)
        self.task = _task(PRESETS[preset], question, pattern, low, high)
        self.invalid = invalid
        self.device = None if device is None else torch.device(device)
        bounded = not self.task.patterns or self.task.low is not None
        self.range: tuple[float | None, float | None] = (0.0, 1.0) if bounded else (None, None)
        self.model: AnswersQuestions = (
            LocalVlm(source, max_tokens)
            if source is not None
            else Endpoint(str(url), str(model), key_env=key_env, max_tokens=max_tokens, **remote)
        )
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts with special tokens of the local model."""
        for prompt in prompts:
            for token in self.model.reserved:
                if token in prompt:
                    raise ValueError(
                        f"the prompt {prompt!r} holds {token!r}, a special token of the judge's "
                        "model; leave it out"
                    )

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        self.check(prompts)
        if isinstance(self.model, LocalVlm):
            self.model.to(self.device or images.device)
        pairs = list(zip(to_uint8(images), prompts, strict=True))
        keys = [_key(*pair) for pair in pairs]
        with self._lock:
            found: dict[bytes, float | str] = {
                k: self._scores[k] for k in keys if k in self._scores
            }
        jobs = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
        if jobs:
            with ThreadPoolExecutor(min(self.model.concurrency, len(jobs))) as pool:
                found |= zip(jobs, pool.map(self._ask, jobs.values()), strict=True)
        self._remember(found)
        scores = [
            self._valid(found[key], prompt) for key, prompt in zip(keys, prompts, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _ask(self, pair: tuple[np.ndarray, str]) -> float | str:
        """Return the score, or the reason why there is none."""
        picture, prompt = pair
        question = self.task.question.replace("{prompt}", prompt)
        try:
            if not self.task.patterns:
                return _share(*self.model.yes(picture, question))
            return _number(self.model.answer(picture, question), self.task)
        except (EndpointError, NoScore) as error:
            return str(error)

    def _remember(self, found: dict[bytes, float | str]) -> None:
        with self._lock:
            for key, score in found.items():
                if isinstance(score, float):
                    self._scores[key] = score
                    self._scores.move_to_end(key)
            while len(self._scores) > CACHED:
                self._scores.popitem(last=False)

    def _valid(self, score: float | str, prompt: str) -> float:
        if isinstance(score, float):
            return score
        if self.invalid == "error":
            raise ValueError(
                f"the judge gives no score for the prompt {prompt!r}: {score}; try again, or set "
                "invalid=nan to leave such scores out"
            )
        return math.nan


def _share(yes: float, no: float) -> float:
    if not yes + no > 0:
        raise NoScore("neither yes nor no is among the likely answers")
    return yes / (yes + no)


def _number(answer: str, task: Preset) -> float:
    """Return the mean of the numbers that the patterns match, on the scale of the task."""
    shown = repr(answer if len(answer) <= 80 else "..." + answer[-80:])
    numbers = []
    for pattern in task.patterns:
        try:
            numbers.append(float(re.findall(pattern, answer)[-1]))
        except (IndexError, ValueError):
            raise NoScore(f"its answer {shown} holds no score") from None
        if not math.isfinite(numbers[-1]):
            raise NoScore(f"its answer {shown} holds no finite score")
    if task.low is None or task.high is None:
        return sum(numbers) / len(numbers)
    for number in numbers:
        if not task.low <= number <= task.high:
            raise NoScore(
                f"its answer {shown} gives {number:g}, outside [{task.low:g}, {task.high:g}]"
            )
    return (sum(numbers) / len(numbers) - task.low) / (task.high - task.low)


def _key(picture: np.ndarray, prompt: str) -> bytes:
    shape = str(picture.shape).encode()
    return hashlib.sha256(b"\0".join((shape, prompt.encode(), picture.tobytes()))).digest()


def _check(
    source: str | None, preset: str, url: str | None, model: str | None, invalid: str
) -> None:
    if (source is None) == (url is None):
        raise ValueError(
            "a judge needs one model: source=FOLDER or a hub id, or url=http://HOST:PORT/v1 with "
            "model=NAME"
        )
    if url is not None and not model:
        raise ValueError("a judge at a url needs model=NAME, the name that its server knows")
    check_choice("the judge's preset", preset, PRESETS)
    if invalid not in ("error", "nan"):
        raise ValueError(f"the judge's invalid is {invalid!r}; give error or nan")


def _check_texts(**texts: Any) -> None:
    for name, value in texts.items():
        if not isinstance(value, str | None):
            raise ValueError(f'the judge\'s {name} is {value!r}; give text, as in {name}="..."')


def _check_sizes(*, timeout: float, retries: int, concurrency: int, max_tokens: int) -> None:
    for name, value, least in (
        ("retries", retries, 0),
        ("concurrency", concurrency, 1),
        ("max_tokens", max_tokens, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(
                f"the judge's {name} is {value!r}; give a whole number, at least {least}"
            )
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"the judge's timeout is {timeout!r}; give seconds, above 0")


def _task(
    preset: Preset,
    question: str | None,
    pattern: str | None,
    low: float | None,
    high: float | None,
) -> Preset:
    """Return the preset with the given replacements; a new pattern drops its low and high."""
    if question is None:
        question = preset.question
    if pattern is None and low is None and high is None:
        return Preset(question, preset.patterns, preset.low, preset.high)
    if not preset.patterns:
        raise ValueError("the preset yes_no reads no number; leave out pattern, low and high")
    numbers = [x for x in (low, high) if isinstance(x, int | float) and math.isfinite(x)]
    if (low, high) != (None, None) and not (len(numbers) == 2 and numbers[0] < numbers[1]):
        raise ValueError(
            f"the judge's low is {low!r} and high {high!r}; give both as numbers, low below "
            "high, or neither"
        )
    if pattern is None:
        return Preset(question, preset.patterns, low, high)
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"the judge's pattern {pattern!r} is not a regex: {error}") from error
    if groups != 1:
        raise ValueError(
            f"the judge's pattern {pattern!r} has {groups} groups; give it one, around the number"
        )
    return Preset(question, (pattern,), low, high)
