"""Requests to a reward server, with time-outs and retries; `rewards.models.remote` makes them.

It needs httpx. Proxies of the environment are not used, and redirects are not followed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from .reward_messages import JSON, SAFETENSORS, Served, error_of, write_prompts

__all__ = ["RewardClient", "Unanswered"]

LARGEST_ANSWER = 64 << 20  # bytes
LONGEST_CONNECT = 10.0  # seconds
LONGEST_WAIT = 30.0  # seconds between two attempts, unless the server asks for more
LONGEST_ASKED = 60.0  # seconds that a server may ask for
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # status codes to retry
BROKEN, TRIES = 500, 3  # the status of a reward that failed, and how often it may
ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
log = logging.getLogger(__name__)


class Unanswered(RuntimeError):
    """A request failed each time that it was sent."""


class _Failure(Exception):
    """One attempt failed, for a reason that may pass.

    asked: seconds that the server asks for; broken: whether the reward failed, not the connection.
    """

    def __init__(self, reason: str, asked: float = 0, broken: bool = False) -> None:
        self.asked, self.broken = asked, broken
        super().__init__(reason)


class RewardClient:
    """Sends requests to the reward server at `url`.

    A request that times out, cannot connect or gets one of the statuses TEMPORARY is sent again up
    to `retries` times. The wait before it starts at `backoff` seconds, doubles up to 30, and is at
    least what the server asks for by Retry-After, up to a minute. Status 500, of a reward that
    failed, is given up at its third time, because an error in the reward would never pass. Any
    other status is raised at once, as ValueError with the server's sentence.

    It can be pickled, copied, and used by several threads and by forked processes.

    Args:
        url: http or https, without user and query.
        timeout: Seconds for one attempt.
        retries: Number of further attempts.
        concurrency: Largest number of connections.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, concurrency: int) -> None:
        httpx = _httpx()
        if not isinstance(url, str) or not ADDRESS.fullmatch(url):
            raise ValueError(
                f"the url of remote is {url!r:.200} but must be like http://127.0.0.1:7870, "
                "without user and query"
            )
        try:
            _ = urlsplit(url).port, httpx.URL(url)
        except (ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"the url of remote is {url!r:.200}: {error}") from None
        self.url, self.timeout, self.retries = url, timeout, retries
        self.concurrency, self.backoff = concurrency, 0.5
        self._https: dict[int, Any] = {}  # by process, because a fork must not share connections

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_https": {}}

    def describe(self) -> Served:
        """Return what the server says about its reward.

        Tries three times only, so that a wrong address is noticed soon. Raises ValueError if no
        reward server answers.
        """
        try:
            return Served.of_json(self._send("GET", "/reward", tries=3))
        except Unanswered as error:
            raise ValueError(f"{error}; start one there, or correct the url") from None
        except ValueError as error:
            raise ValueError(f"there is no reward server at {self.url}: {error}") from None

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that the reward cannot score, and if nobody answers."""
        try:
            self._send("POST", "/check", write_prompts(prompts), JSON)
        except Unanswered as error:
            raise ValueError(str(error)) from None

    def score(self, request: bytes, stop: threading.Event) -> bytes:
        """Return the answer to a request in safetensors; Unanswered if all attempts fail.

        No further attempt is made once `stop` is set.
        """
        return self._send("POST", "/score", request, SAFETENSORS, stop=stop)

    def _send(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        kind: str = "",
        tries: int = 0,
        stop: threading.Event | None = None,
    ) -> bytes:
        tries, stop, reason = tries or self.retries + 1, stop or threading.Event(), ""
        made = broken = 0
        for attempt in range(tries):
            try:
                return self._once(method, path, content, kind)
            except _Failure as failure:
                reason, asked = str(failure), failure.asked
                made, broken = attempt + 1, broken + failure.broken
            if broken == TRIES:
                break
            if made < tries:
                if attempt == 2:  # a short pause is not worth a line
                    log.warning("the reward server at %s %s; trying again", self.url, reason)
                wait = min(self.backoff * 2**attempt, LONGEST_WAIT)
                stop.wait(max(wait, min(asked, LONGEST_ASKED)))
            if stop.is_set():
                break
        raise Unanswered(
            f"the reward server at {self.url} failed {made} times; the last time it {reason}"
        )

    def _once(self, method: str, path: str, content: bytes | None, kind: str) -> bytes:
        """Return the body of a response with status 200; _Failure for what may pass."""
        httpx = _httpx()
        headers = {"Accept": JSON, "Accept-Encoding": "identity"}
        headers |= {"Content-Type": kind} if kind else {}
        address, deadline = self.url.rstrip("/") + path, time.monotonic() + self.timeout
        received = bytearray()
        try:
            with self._http().stream(method, address, content=content, headers=headers) as response:
                for part in response.iter_raw():
                    received += part
                    if len(received) > LARGEST_ANSWER:
                        raise _Failure("sent more than an answer can hold")
                    if time.monotonic() > deadline:  # of a server that sends slowly
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            raise _Failure(f"did not answer within {self.timeout:g} s") from None
        except httpx.RequestError as error:
            raise _Failure(f"could not be reached ({type(error).__name__})") from None
        status, said = response.status_code, error_of(received)
        if status == 200:
            return bytes(received)
        if status in TEMPORARY:
            asked = response.headers.get("Retry-After", "")
            failure = f"answered HTTP {status}" + (f" ({said})" if said else "")
            seconds = float(asked) if asked.isdecimal() else 0
            raise _Failure(failure, seconds, broken=status == BROKEN)
        said = said or "it is another service, or another version of this one"
        raise ValueError(f"{self.url} answered HTTP {status}: {said}")

    def _http(self) -> Any:
        """Return this process's connections."""
        if os.getpid() not in self._https:
            httpx = _httpx()
            limits = httpx.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            )
            seconds = httpx.Timeout(
                self.timeout, connect=min(self.timeout, LONGEST_CONNECT), pool=None
            )
            http = httpx.Client(timeout=seconds, limits=limits, trust_env=False)
            if self._https.setdefault(os.getpid(), http) is http:
                weakref.finalize(self, http.close)
        return self._https[os.getpid()]


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError:
        raise ValueError("remote needs httpx: pip install 'tilt-diffusion[serve]'") from None
    return httpx
