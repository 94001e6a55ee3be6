"""A reward that many clients share: requests are scored one at a time, in order of arrival.

Clients are not batched together, so that a score depends only on its own request.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import rewards
from rewards.backends.reward_messages import Served, write_answer
from rewards.combine import component_names
from tilt.server.requests import BadRequest, read_prompts, read_request

__all__ = ["Busy", "Gone", "Scorer", "described"]


class Busy(RuntimeError):
    """As many requests as allowed are waiting."""


class Gone(RuntimeError):
    """The client has closed its connection, so nothing was scored."""


def described(reward: rewards.WeightedSum, **limits: int) -> Served:
    """Return what clients are told about a reward that was loaded from text.

    limits: the fields of `Served` that begin with max.
    """
    spec = reward.spec
    whole = hashlib.sha256(f"{rewards.identity(spec)} {spec}".encode())
    return Served(
        spec=spec,
        identity=whole.hexdigest()[:12],
        components=tuple(component_names(reward.parts)),
        range=(_end(reward.range[0]), _end(reward.range[1])),
        wants_references=reward.wants_references,
        needs_references=reward.needs_references,
        **limits,
    )


def _end(bound: float | None) -> float | None:
    """Return a bound as JSON can hold it; a reward of one's own may have infinite ones."""
    return bound if bound is not None and math.isfinite(bound) else None


class Scorer:
    """Evaluates a reward on `device` in one thread; at most `queue` requests are there at a time.

    `place`, `turn` and `waiting` are for one event loop.
    """

    def __init__(
        self, reward: rewards.WeightedSum, served: Served, device: torch.device, queue: int
    ) -> None:
        self.reward, self.served, self.device, self.queue = reward, served, device, queue
        self.waiting = 0
        self._turn = asyncio.Lock()  # served in order of arrival
        self._thread = ThreadPoolExecutor(1, "reward")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, from before the body of a request is read; raises Busy."""
        if self.waiting >= self.queue:
            raise Busy(f"{self.waiting} requests are waiting, as many as allowed")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def turn(
        self, work: Callable[[], bytes], is_gone: Callable[[], Awaitable[bool]]
    ) -> bytes:
        """Return work(), called in the thread when its turn comes; raises Gone.

        ValueError and BadRequest of the work are raised; other errors, too.
        """
        async with self._turn:
            if await is_gone():
                raise Gone
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def score(self, body: bytes, kind: str) -> bytes:
        """Return the answer to a request of this content type; raises ValueError."""
        request = read_request(body, kind, self.served)
        if request.identity not in ("", self.served.identity):
            raise BadRequest(
                409,
                f"this server serves {self.served.spec[:200]} [{self.served.identity}], not the "
                f"reward {request.identity[:40]!r} that was asked for; load the reward again",
            )
        images = request.images.to(self.device)
        with torch.no_grad():
            total, components = self.reward.evaluate(
                images, request.prompts, references=request.references
            )
        return write_answer(total, components, self.served.identity)

    def check(self, body: bytes) -> bytes:
        """Check the prompts of a request; raises ValueError."""
        self.reward.check(read_prompts(body))
        return b"{}"
