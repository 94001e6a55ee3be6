"""Questions about a picture to an OpenAI-compatible HTTP endpoint, with the standard library only.

JSON goes both ways, never a pickle. No error names the address or the key.
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
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

__all__ = ["Endpoint", "EndpointError", "data_url"]

LARGEST_RESPONSE = 4 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds between two tries
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth another try
MISTAKEN = {401, 403, 404, 405}  # no picture will fare better


class EndpointError(RuntimeError):
    """One request failed for good. The text names neither the address nor the key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # urllib would send the key along to wherever the answer points
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class Endpoint:
    """`POST {url}/chat/completions`, greedy, with time-outs and retries.

    A request that times out, cannot connect or meets a passing error (429, 5xx) is repeated
    `retries` times; the wait starts at `backoff` seconds and doubles, or is what Retry-After
    says, at most a minute. Anything else fails at once.

    Args: url, http or https, with neither key nor query in it; key_env, the name of the
    environment variable that holds the key, read at each request; timeout, seconds for one try;
    concurrency, how many requests the caller may have under way.
    """

    reserved: tuple[str, ...] = ()  # which tokens the server's tokenizer obeys is not known here

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

    def answer(self, picture: np.ndarray, question: str) -> str:
        """What the model writes; EndpointError where it cannot be had."""
        choice = self._ask(picture, question, max_tokens=self.max_tokens)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise EndpointError("the judge's endpoint sent a message without text")
        return text

    def yes(self, picture: np.ndarray, question: str) -> tuple[float, float]:
        """Probabilities that the answer starts with yes and with no, of the 20 likeliest tokens."""
        choice = self._ask(picture, question, max_tokens=1, logprobs=True, top_logprobs=20)
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            pairs = [(str(t["token"]).strip().lower(), min(float(t["logprob"]), 0)) for t in tokens]
        except (KeyError, IndexError, TypeError, ValueError):
            raise EndpointError("the judge's endpoint gave no log-probabilities") from None
        yes, no = (math.fsum(math.exp(p) for t, p in pairs if t == w) for w in ("yes", "no"))
        return yes, no

    def _ask(self, picture: np.ndarray, question: str, **options: Any) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
            {"type": "text", "text": question},
        ]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        sent = json.dumps(body | {"temperature": 0, "seed": 0, "stream": False} | options)
        received = self._send(sent.encode())
        try:
            choice = json.loads(received)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            choice = None
        if not isinstance(choice, dict):
            raise EndpointError("the judge's endpoint sent something that is no chat completion")
        return choice

    def _send(self, body: bytes) -> bytes:
        """The bytes of a successful response, after as many tries as it takes."""
        reason = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                return self._once(body)
            except HTTPError as error:
                error.close()
                reason = f"answered HTTP {error.code} ({_phrase(error.code)})"
                if error.code in MISTAKEN:
                    raise ValueError(
                        f"the judge's endpoint {reason}; check url, model and key_env"
                    ) from None
                if error.code not in PASSING:
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
            # read1 returns what is there, so that a trickle cannot outlive the time-out
            while chunk := response.read1(1 << 16):
                received += chunk
                if len(received) > LARGEST_RESPONSE:
                    raise EndpointError(
                        f"the judge's endpoint sent more than {LARGEST_RESPONSE} bytes"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # cut short
                raise http.client.IncompleteRead(b"")
        return bytes(received)


def data_url(picture: np.ndarray) -> str:
    """A picture (h, w, 3) of bytes as a PNG data URL, in its own size and shape."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _address(url: Any) -> str:
    # the value may hold a key, so it is not repeated, nor is urlsplit's own complaint
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
