"""A reward that a server on another machine or another GPU evaluates.

    remote(http://127.0.0.1:7870)        what `tilt serve` serves there
    remote("http://[::1]:7870")          an address with other characters is quoted

Legend: n images.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_batch_size, check_number
from ..backends.reward_client import RewardClient, Unanswered
from ..backends.reward_messages import Served, UnreadableAnswer, pack, read_answer
from ..images import check_inputs
from ..references import entries_of
from ..spec import written
from .base import Card

__all__ = ["RemoteReward"]

Answer = tuple[Tensor, dict[str, Tensor]]  # the total, and the components by name
Request = tuple[Sequence[int], bytes]  # the rows whose images it holds, and its body
log = logging.getLogger(__name__)


class RemoteReward:
    """The total of the reward that the server at `url` evaluates, without gradients.

    Images travel without loss, so that on a machine of the same kind the scores are those of the
    same reward in this process. An image whose request fails at every attempt (a time-out, no
    connection, a temporary error) scores NaN, and a line is logged; training leaves such an image
    out. With the defaults, a server may be away for two and a half minutes. Whatever the reward
    itself refuses raises the same ValueError as it does in this process; if it raises another
    error three times, the images score NaN.

    The server is asked for its reward when this object is made. If it serves another one later,
    a ValueError is raised.

    Args:
        url: Address of the server, http or https.
        timeout: Seconds for one attempt, which include waiting for other clients' requests.
        retries: Number of further attempts.
        concurrency: Number of requests that are sent at the same time.
        batch_size: Number of images in a request, fewer if they exceed the server's limits.
    """

    differentiable = False
    card = Card(
        weights="",
        size="on the server",
        licence="the served reward's",
        range="the served reward's",
        citation="the served reward's",
    )

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        retries: int = 10,
        concurrency: int = 4,
        batch_size: int = 32,
    ) -> None:
        check_number("remote's timeout", timeout, 0.001, 86_400)
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if type(value) is not int or not least <= value <= 1000:
                raise ValueError(
                    f"remote's {name} is {value!r} but must be a whole number, {least} to 1000"
                )
        check_batch_size(batch_size)
        sizes = {"timeout": timeout, "retries": retries, "concurrency": concurrency}
        self.name = "remote"
        self.spec = written("remote", RemoteReward, url=url, batch_size=batch_size, **sizes)
        self.batch_size = batch_size
        self.client = RewardClient(url, **sizes)
        self.served: Served = self.client.describe()
        self.range = self.served.range
        self.wants_references = self.served.wants_references
        self.needs_references = self.served.needs_references
        self.reports = self.served.reported

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that the served reward cannot score."""
        self.client.check(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        return self.evaluate(images, prompts, references=references)[0]

    def evaluate(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Answer:
        """Return the total (n,) and the served reward's components {name: (n,)}."""
        check_inputs(images, prompts)
        if not len(images):
            total, parts = self._empty()
            return total.to(images.device), {n: x.to(images.device) for n, x in parts.items()}
        entries = self._entries(references, len(images))
        rows = range(len(images))
        chunks = [rows[i : i + self.batch_size] for i in rows[:: self.batch_size]]
        pixels = images.detach().cpu()
        requests = [x for chunk in chunks for x in self._requests(chunk, pixels, prompts, entries)]
        answers = self._ask(requests)
        self._report(requests, answers)
        like = next((found for found in answers if not isinstance(found, str)), self._empty())
        parts = [
            _nothing(len(rows), like) if isinstance(found, str) else found
            for (rows, _), found in zip(requests, answers, strict=True)
        ]
        totals, components = zip(*parts, strict=True)
        columns = {name: torch.cat([part[name] for part in components]) for name in like[1]}
        return _on(images, torch.cat(totals)), {n: _on(images, x) for n, x in columns.items()}

    def _empty(self) -> Answer:
        return torch.zeros(0), {name: torch.zeros(0) for name in self.served.components}

    def _entries(self, references: Any, count: int) -> Sequence[Any] | None:
        if references is None or not self.wants_references:
            return None  # the served reward refuses it, if it needs them
        return entries_of(self.name, references, count)

    def _requests(
        self,
        rows: Sequence[int],
        images: Tensor,
        prompts: Sequence[str],
        references: Sequence[Any] | None,
    ) -> Iterator[Request]:
        """Yield requests for these rows, each within the server's limits."""
        chosen = None if references is None else [references[i] for i in rows]
        own = images[rows[0] : rows[-1] + 1]
        made = pack(own, [prompts[i] for i in rows], chosen, self.served.identity)
        if self.served.accepts(made):
            yield rows, made.body
            return
        if len(rows) == 1:
            most = self.served
            raise ValueError(
                f"one image with its references is {made.images} images of {made.pixels} pixels in "
                f"{len(made.body)} bytes, but the reward server at {self.client.url} accepts "
                f"{most.max_images}, {most.max_pixels} and {most.max_bytes} at once; start it with "
                "larger limits"
            )
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from self._requests(half, images, prompts, references)

    def _ask(self, requests: Sequence[Request]) -> list[Answer | str]:
        """Return the answers in order, each as the reason if it failed."""
        stop = threading.Event()
        if len(requests) == 1:  # in this thread, so that Ctrl-C ends it at once
            return [self._one(requests[0], stop)]
        pool = ThreadPoolExecutor(min(self.client.concurrency, len(requests)))
        try:
            return list(pool.map(lambda request: self._one(request, stop), requests))
        finally:
            stop.set()  # after an error, the other requests are not tried again
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, request: Request, stop: threading.Event) -> Answer | str:
        rows, body = request
        try:
            answer = self.client.score(body, stop)
            identity, total, parts = read_answer(answer, len(rows), self.served.components)
        except Unanswered as error:
            return str(error)
        except UnreadableAnswer as error:
            raise ValueError(f"{self.client.url} sent an answer, but {error}") from None
        if identity != self.served.identity:
            raise ValueError(
                f"the reward server at {self.client.url} serves another reward than "
                f"{self.served.spec}, with which this run began; load the reward again to use it"
            )
        return total, parts

    def _report(self, requests: Sequence[Request], answers: Sequence[Answer | str]) -> None:
        failed = [i for i, found in enumerate(answers) if isinstance(found, str)]
        if failed:
            count, every = sum(len(requests[i][0]) for i in failed), requests[-1][0][-1] + 1
            log.warning("%d of %d images have no score: %s", count, every, answers[failed[0]])


def _nothing(count: int, like: Answer) -> Answer:
    """Return NaN for `count` images, in the dtypes of another answer."""
    total, parts = like
    found = {name: x.new_full((count,), torch.nan) for name, x in parts.items()}
    return total.new_full((count,), torch.nan), found


def _on(images: Tensor, scores: Tensor) -> Tensor:
    if images.device.type == "mps":  # has no float64
        scores = scores.float()
    return scores.to(images.device)
