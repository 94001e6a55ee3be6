"""Questions about images to an OpenAI-compatible HTTP endpoint, by the standard library only.

Requests and responses are JSON. Error messages contain neither the address nor the key.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

__all__ = ["Endpoint", "EndpointError", "data_url"]

LARGEST_RESPONSE = 4 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds between two attempts
TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # status codes to retry
PERMANENT = {401, 403, 404, 405}  # status codes that every request would get


class EndpointError(RuntimeError):
    """A request failed. The message contains neither the address nor the key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # urllib would send the key to the address of the redirect
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class Endpoint:
    """`POST {url}/chat/completions` with greedy decoding, time-outs and retries.

    A request that times out, cannot connect or gets a temporary error (429, 5xx) is repeated
    `retries` times. The wait starts at `backoff` seconds and doubles, or follows Retry-After, and
    is at most a minute. Other errors are raised at once.

    Args:
        url: http or https, without key and query.
        model: Name of the model at the server.
        key_env: Name of the environment variable that holds the key; it is read for each request.
        timeout: Seconds for one attempt.
        retries: Number of further attempts.
        backoff: Seconds before the second attempt.
        concurrency: Number of concurrent requests that the caller may make.
        max_tokens: Length limit of an answer.
    """

    reserved: tuple[str, ...] = ()  # the special tokens of the server's tokenizer are unknown

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
        max_tokens: int = 512,
    ) -> None:
        self._address = _address(url)
        self.model, self.key_env, self.max_tokens = model, key_env, max_tokens
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.concurrency = concurrency
        host = urlsplit(url).hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if here else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def answer(self, pictures: Sequence[np.ndarray], question: str) -> str:
        """Return the text of the model's answer; EndpointError where the request fails."""
        choice = self._ask(pictures, question, max_tokens=self.max_tokens)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise EndpointError("the judge's endpoint sent a message without text")
        return text

    def first(
        self, pictures: Sequence[np.ndarray], question: str, words: Sequence[Sequence[str]]
    ) -> tuple[list[float], float]:
        """Return the probability that the answer starts with each word, given by its spellings.

        Only the 20 likeliest tokens are known: the second value is the largest probability that
        any other can have. Spaces around a token do not matter.
        """
        choice = self._ask(pictures, question, max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            pairs = [(str(t["token"]).strip(), float(t["logprob"])) for t in tokens]
        except (KeyError, IndexError, TypeError, ValueError):
            pairs = []
        found = [(token, math.exp(min(logprob, 0))) for token, logprob in pairs]
        every = [p for _, p in found]
        if not every or not all(map(math.isfinite, every)):
            raise EndpointError("the judge's endpoint gave no log-probabilities")
        spelled = [{text.strip() for text in spellings} for spellings in words]
        chances = [math.fsum(p for token, p in found if token in one) for one in spelled]
        return chances, max(min([*every, 1 - math.fsum(every)]), 0.0)

    def _ask(self, pictures: Sequence[np.ndarray], question: str, **options: Any) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures
        ]
        content.append({"type": "text", "text": question})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        sent = json.dumps(body | {"temperature": 0, "seed": 0, "stream": False} | options)
        received = self._send(sent.encode())
        try:
            choice = json.loads(received)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            choice = None
        if not isinstance(choice, dict):
            raise EndpointError("the judge's endpoint sent no chat completion")
        return choice

    def _send(self, body: bytes) -> bytes:
        """Return the bytes of a successful response, after at most `retries` further attempts."""
        reason = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                return self._once(body)
            except HTTPError as error:
                error.close()
                reason = f"answered HTTP {error.code} ({_phrase(error.code)})"
                if error.code in PERMANENT:
                    raise ValueError(
                        f"the judge's endpoint {reason}; check url, model and key_env"
                    ) from None
                if error.code not in TEMPORARY:
                    raise EndpointError(f"the judge's endpoint {reason}") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, URLError) else error
                late = isinstance(cause, TimeoutError)
                name = type(cause).__name__
                reason = (
                    f"did not answer within {self.timeout:g} s"
                    if late
                    else f"could not be reached ({name})"
                )
            if attempt < self.retries:
                time.sleep(min(wait, LONGEST_WAIT))
        tries = self.retries + 1
        raise EndpointError(f"the judge's endpoint failed {tries} times; the last time it {reason}")

    def _once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {_key(self.key_env)}"
        request = urllib.request.Request(self._address, body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        with self._opener.open(request, timeout=self.timeout) as response:
            received = bytearray()
            # read1 returns available bytes, so a slow response cannot exceed the time-out
            while chunk := response.read1(1 << 16):
                received += chunk
                if len(received) > LARGEST_RESPONSE:
                    raise EndpointError(
                        f"the judge's endpoint sent more than {LARGEST_RESPONSE} bytes"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # truncated
                raise http.client.IncompleteRead(b"")
        return bytes(received)


def data_url(picture: np.ndarray) -> str:
    """Return an image (h, w, 3) of bytes as a PNG data URL of the same size."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _address(url: Any) -> str:
    # the value may contain a key, so neither it nor urlsplit's error is shown
    match = re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url if isinstance(url, str) else "")
    if match is None:
        raise ValueError(
            "the judge's url must be like http://127.0.0.1:8000/v1, with no user, key or query "
            "in it; the key goes into an environment variable, named by key_env"
        )
    return match[0].rstrip("/") + "/chat/completions"


def _key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"the environment variable {name} (key_env) holds no key for the judge; set it"
        )
    return key


def _phrase(status: int) -> str:
    return http.client.responses.get(status, "unknown status")
