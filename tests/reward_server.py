"""A reward server in a thread, and rewards for it that every processor computes alike."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import uvicorn
from torch import Tensor

import rewards
from rewards.images import to_images
from tilt.commands.serve import bound
from tilt.server.routes import routes
from tilt.server.scorer import Scorer, described

EXACT = "reward_server:fingerprint"


def fingerprint(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A number in [0, 1) that any change of a bit, of the dtype or of the prompt changes."""
    return torch.tensor([_hashed(*pair) for pair in zip(images, prompts, strict=True)]).double()


def unhurried(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same, 20 ms later."""
    time.sleep(0.02)
    return fingerprint(images, prompts)


def _hashed(image: Tensor, prompt: str) -> float:
    raw = image.contiguous().view(torch.uint8).numpy().tobytes()
    whole = f"{image.dtype} {tuple(image.shape)} {prompt}".encode() + raw
    return int.from_bytes(hashlib.sha256(whole).digest()[:6], "big") / 2**48


def likeness(images: Tensor, prompts: Sequence[str], references: Any) -> Tensor:
    """The fingerprints of each image's references, added."""
    found = []
    for entry in references:
        rows = [x for item in entry for x in to_images(item)]
        found.append(sum(_hashed(row, "") for row in rows))
    return torch.tensor(found).double()


def odd(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The number that each prompt spells; ValueError for "refuse", RuntimeError for "break"."""
    if "refuse" in prompts:
        raise ValueError("the prompt 'refuse' cannot be scored:\nwrite another")
    if "break" in prompts:
        raise RuntimeError("out of memory")
    return torch.tensor([float(prompt) for prompt in prompts], dtype=torch.float64)


class Boundless:
    """A reward of one's own whose bounds are written as infinite."""

    name, differentiable, wants_references = "boundless", True, False
    range = (-float("inf"), float("inf"))

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        return images.mean((1, 2, 3))


gate = threading.Event()  # what `gated` waits for
scored: list[str] = []  # the prompts that `gated` has scored


def gated(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The length of each prompt; where one is "wait", once the gate is open (at most 30 s)."""
    if "wait" in prompts:
        gate.wait(30)
    scored.extend(prompts)
    return torch.tensor([float(len(prompt)) for prompt in prompts])


class Live:
    """A server of a spec, which can be stopped and started again at its address."""

    def __init__(self, spec: str, port: int = 0, queue: int = 32, **limits: int) -> None:
        self.reward = rewards.load(spec, "cpu", imports=True)
        sizes = {"max_bytes": 1 << 22, "max_images": 512, "max_pixels": 1 << 20} | limits
        self.served = described(self.reward, **sizes)
        self.scorer = Scorer(self.reward, self.served, torch.device("cpu"), queue)
        config = uvicorn.Config(
            routes(self.scorer), log_level="error", access_log=False, lifespan="off", ws="none"
        )
        self.core, self.socket = uvicorn.Server(config), bound("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.core.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.core.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """End at once, as if killed; requests in progress get no answer."""
        self.core.should_exit = self.core.force_exit = True
        self.thread.join()
        self.socket.close()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def pictures(n: int, seed: int = 0, size: tuple[int, int] = (9, 14)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def remote(url: str, **options: Any) -> Any:
    """The reward at this address, impatient between its attempts."""
    from rewards.models.remote import RemoteReward

    found = RemoteReward(url, **options)
    found.client.backoff = 0.02
    return found
