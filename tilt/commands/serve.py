"""Serve a reward over HTTP, so that it can be evaluated on another machine or another GPU.

Other commands and programs use it as the reward remote(http://HOST:PORT). Requests are scored one
at a time, and others wait in a queue. It needs the extra "serve".
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rewards
from finetune.ranges import GIVEN, NAME, setting, whole
from tilt import loading, started
from tilt.exit_status import of_command
from tilt.options import Options

EXAMPLES = """\
examples:
  # on the machine, or in the process, that has a GPU for the reward
  tilt serve "clip + ocr" --device cuda:1

  # where images are drawn
  tilt score pictures.jsonl --reward "remote(http://127.0.0.1:7870)"

  # for other machines: whoever reaches the port can use the reward, so keep it in a private network
  tilt serve "judge(source=/models/judge)" --host 0.0.0.0 --port 7871
"""


@dataclass
class Serve:
    """The reward, the address, and the limits of requests."""

    reward: str = setting("", GIVEN, "a spec such as 'clip(tiny) + 0.5*ocr(mode=strict)'")
    host: str = setting("127.0.0.1", NAME, "address to listen on; by default only this machine")
    port: int = setting(7870, whole(0, 65535), "port to listen on; 0 is any free one")
    device: str = setting("auto", NAME, "auto, cpu, cuda, cuda:1, mps")
    queue: int = setting(
        32,
        whole(1, 10_000),
        "requests that may be there at a time, one of them scored; others are told to come back",
    )
    max_megabytes: int = setting(64, whole(1, 4096), "largest request, in 2**20 bytes")
    max_images: int = setting(
        512, whole(1, 100_000), "most images of a request, references included"
    )
    max_megapixels: int = setting(32, whole(1, 89), "most pixels of a request, in 2**20")


OPTIONS = Options("tilt serve", Serve, __doc__ or "", EXAMPLES, positional="reward")


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address, but does not listen yet."""
    found = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = places[0]
        found = socket.socket(family, kind, protocol)  # asyncio sends at once only if it is TCP
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # to be restarted at once
        found.bind(address)
    except OSError as error:
        if found:
            found.close()
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error}): try another --port"
        ) from None
    return found


def server_of(settings: Serve) -> Any:
    """Load the reward and return a uvicorn.Server of it, without a socket."""
    try:
        import uvicorn

        from tilt.server.routes import routes
        from tilt.server.scorer import Scorer, described
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ValueError(
            "tilt serve needs FastAPI and uvicorn: pip install 'tilt-diffusion[serve]'"
        ) from None
    device = loading.pick_device(settings.device)
    started.say(f"loading {settings.reward}")
    reward = rewards.load(settings.reward, device, imports=True)
    served = described(
        reward,
        max_bytes=settings.max_megabytes << 20,
        max_images=settings.max_images,
        max_pixels=settings.max_megapixels << 20,
    )
    app = routes(Scorer(reward, served, device, settings.queue))
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=10,
        )
    )


def run(settings: Serve) -> None:
    """Serve until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING)
    with bound(settings.host, settings.port) as listener:
        server, (host, port) = server_of(settings), listener.getsockname()[:2]
        listener.listen()  # before the line below, which may be waited for
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {settings.reward} at http://{shown}:{port} (Ctrl-C stops it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def main(argv: Sequence[str]) -> int:
    """Return exit status 0 after Ctrl-C, or 2 for refused input or an OSError."""
    return of_command(OPTIONS, argv, run)
