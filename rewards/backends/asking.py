"""Questions to a vision-language model about images, and the memory of the scores.

A model is one of transformers in this process (`rewards.backends.local_vlm`) or at an
OpenAI-compatible address (`rewards.backends.chat_endpoint`).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .chat_endpoint import Endpoint, EndpointError
from .local_vlm import LocalVlm

__all__ = ["AnswersQuestions", "Asker", "NoScore", "Pictures"]

CACHED = 4096  # scores

Pictures = tuple[np.ndarray, ...]  # images (h, w, 3) of bytes, in the order in which they are shown


class NoScore(Exception):
    """An answer contains no score; the message says why."""


class AnswersQuestions(Protocol):
    """A model that answers a question about images."""

    concurrency: int
    reserved: tuple[str, ...]

    def answer(self, pictures: Sequence[np.ndarray], question: str) -> str: ...

    def first(
        self, pictures: Sequence[np.ndarray], question: str, words: Sequence[Sequence[str]]
    ) -> tuple[list[float], float]:
        """Return the probability that the answer starts with each word, given by its spellings.

        The second value is the largest probability that a word of probability 0 may have, which is
        above 0 if only the likeliest tokens are known.
        """
        ...


class Asker:
    """Scores of images by a model's answers, of which each is asked for once.

    Scores are cached by the bytes of the pictures and the prompt, and equal ones of a call are
    asked once. An answer without a score, and a request that fails after all retries, is never 0.

    Args:
        source: Folder or hub id of an image-text-to-text model of transformers, or None.
        url, model: An endpoint instead of source, see `rewards.backends.chat_endpoint`, which also
            describes key_env, timeout, retries and concurrency.
        invalid: "error" raises ValueError for an answer without a score, after caching all others;
            "nan" returns NaN for it.
        max_tokens: Length limit of an answer.
        device: Device of a local model; None follows the images.
    """

    def __init__(
        self,
        source: str | None,
        url: str | None,
        model: str | None,
        *,
        key_env: str | None,
        invalid: str,
        max_tokens: int,
        timeout: float,
        retries: int,
        concurrency: int,
        device: torch.device | str | None,
    ) -> None:
        remote: dict[str, Any] = {
            "timeout": timeout,
            "retries": retries,
            "concurrency": concurrency,
        }
        _check(source, url, model, invalid)
        _check_sizes(max_tokens=max_tokens, **remote)
        self.invalid = invalid
        self.device = None if device is None else torch.device(device)
        self.model: AnswersQuestions = (
            LocalVlm(source, max_tokens, device)
            if source is not None
            else Endpoint(str(url), str(model), key_env=key_env, max_tokens=max_tokens, **remote)
        )
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, texts: Sequence[str], kind: str = "prompt") -> None:
        """Raise ValueError for texts with special tokens of the local model."""
        for text in texts:
            for token in self.model.reserved:
                if token in text:
                    raise ValueError(
                        f"the {kind} {text!r} holds {token!r}, a special token of the judge's "
                        "model; leave it out"
                    )

    def scores(
        self,
        shown: Sequence[Pictures],
        prompts: Sequence[str],
        ask: Callable[[AnswersQuestions, Pictures, str], float],
        device: torch.device,
    ) -> Tensor:
        """Return float32 (n,) on the device: the score by `ask` of the pictures and each prompt."""
        if isinstance(self.model, LocalVlm):
            self.model.to(self.device or device)
        pairs = list(zip(shown, prompts, strict=True))
        keys = [_key(*pair) for pair in pairs]
        with self._lock:
            found: dict[bytes, float | str] = {
                k: self._scores[k] for k in keys if k in self._scores
            }
        jobs = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}

        def score(pair: tuple[Pictures, str]) -> float | str:
            try:
                return ask(self.model, *pair)
            except (EndpointError, NoScore) as error:
                return str(error)

        if jobs:
            with ThreadPoolExecutor(min(self.model.concurrency, len(jobs))) as pool:
                found |= zip(jobs, pool.map(score, jobs.values()), strict=True)
        self._remember(found)
        valid = [self._valid(found[key], prompt) for key, prompt in zip(keys, prompts, strict=True)]
        return torch.tensor(valid, dtype=torch.float32, device=device)

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


def _key(pictures: Pictures, prompt: str) -> bytes:
    found = hashlib.sha256(f"{[x.shape for x in pictures]}\0{prompt}".encode())
    for picture in pictures:
        found.update(picture.tobytes())
    return found.digest()


def _check(source: str | None, url: str | None, model: str | None, invalid: str) -> None:
    if (source is None) == (url is None):
        raise ValueError(
            "a judge needs one model: source=FOLDER or a hub id, or url=http://HOST:PORT/v1 with "
            "model=NAME"
        )
    if url is not None and not model:
        raise ValueError("a judge at a url needs model=NAME, the name that its server knows")
    if invalid not in ("error", "nan"):
        raise ValueError(f"the judge's invalid is {invalid!r}; give error or nan")


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
