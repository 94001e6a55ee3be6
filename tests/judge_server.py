"""A judge's endpoint: a real HTTP server in a thread."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.models.vlm_judge import JudgeReward

__all__ = ["Reply", "Server", "first_tokens", "grey", "pictures", "question", "says"]

Reply = tuple[int, dict[str, str], bytes]


class Server:
    """Answers by `reply(number of the request, its JSON)` and records what came."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.reply: Callable[[int, Any], Reply] = lambda _, body: says("Score: 5")
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(self.headers)
                self.send_error(404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(self.headers)
                    outer.paths.append(self.path)
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                status, headers, content = outer.reply(number, body)
                with outer.lock:
                    outer.busy -= 1
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(content))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    for part in outer.parts(content):
                        self.wfile.write(part)
                        self.wfile.flush()
                except OSError:  # the judge has gone away
                    pass

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.parts: Callable[[bytes], Iterator[bytes]] = lambda content: iter([content])
        self.core = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.core.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.core.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        if not self.thread.is_alive():
            return
        self.core.shutdown()
        self.core.server_close()
        self.thread.join()

    def judge(self, **options: Any) -> JudgeReward:
        judge = JudgeReward(url=self.url, model="tiny-judge", **options)
        judge.model.backoff = 0.01  # type: ignore[attr-defined]
        return judge


def says(text: Any) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def first_tokens(*likely: tuple[str, float]) -> Reply:
    """A reply with the likeliest first tokens and their probabilities."""
    tokens = [{"token": token, "logprob": float(np.log(p))} for token, p in likely]
    first = {"logprobs": {"content": [{"top_logprobs": tokens}]}}
    return 200, {}, json.dumps({"choices": [first]}).encode()


def grey(*levels: int, size: tuple[int, int] = (4, 6)) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, *size).float() / 255


def pictures(body: Any) -> list[np.ndarray]:
    """The pictures that were sent, in order."""
    found = []
    for part in body["messages"][0]["content"][:-1]:
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            found.append(np.array(image))
    return found


def question(body: Any) -> str:
    return body["messages"][0]["content"][-1]["text"]
