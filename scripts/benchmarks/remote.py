"""Images per second of a reward over HTTP, over those of the same reward in this process.

    python -m scripts.bench remote --pairs 7

`tilt serve` runs in a process of its own on this machine, with the same number of threads. Each
pair scores the same batch here and there; which comes first alternates. The last column has eight
clients at once, each with an eighth of the batch. No picture is scored twice. Scores must agree, or
nothing is compared. On one machine the two sides share its processors, so encoding, sending and
reading are part of the cost.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import rewards

from ..parser import parser_of
from ..tables import head, line, span
from .machine import about
from .rewards import pictures
from .timing import ratios, seconds

SPECS = ["jpeg", "clip(tiny)", "ocr"]
CLIENTS = 8


@contextlib.contextmanager
def served(spec: str) -> Iterator[str]:
    """The address of a server of this reward."""
    words = ["serve", spec, "--port", "0", "--device", "cpu"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, "-m", "tilt", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | threads,
    ) as server:
        assert server.stdout
        try:
            said = server.stdout.readline().split()
            yield next(word for word in said if word.startswith("http://"))
        finally:
            server.send_signal(signal.SIGINT)


def measure(spec: str, images: Tensor, prompts: list[str], pairs: int) -> tuple[Any, ...]:
    """Images per second here, and the ratios of one client and of eight; raises SystemExit."""
    local = rewards.load(spec)
    with served(spec) as url:
        remote = rewards.load(f"remote({url}, batch_size={len(prompts)})", imports=True)
        shares = list(range(len(prompts)))[:: -(-len(prompts) // CLIENTS)]
        ends = [*shares[1:], len(prompts)]
        clients = [rewards.load(f"remote({url})", imports=True) for _ in shares]

        turns = itertools.count()

        def others() -> None:  # or a reward that remembers pictures would have nothing to do
            turn = next(turns)
            images[:, :2, 0, 0] = torch.tensor([turn // 256, turn % 256]) / 255

        def one(i: int) -> Tensor:
            own = slice(shares[i], ends[i])
            return clients[i](images[own], prompts[own])

        def here() -> Tensor:
            others()
            return local(images, prompts)

        def there() -> Tensor:
            others()
            return remote(images, prompts)

        def together() -> Tensor:
            others()
            return torch.cat(list(pool.map(one, range(len(shares)))))

        with ThreadPoolExecutor(CLIENTS) as pool:
            for asked in (there, together):
                found, expected = asked(), local(images, prompts)
                apart = (found - expected).abs().max().item()
                if not apart <= 1e-4 * expected.abs().max().item():
                    raise SystemExit(f"the scores differ by {apart:.2g}, so nothing was compared")
            took = statistics.median(seconds(here) for _ in range(3))
            single, shared = ratios(here, there, pairs), ratios(here, together, pairs)
    return len(images) / took, single, shared


def main(argv: list[str] | None = None) -> None:
    """Print a row for each reward and size."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--images", type=int, default=16, help="images of a batch")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 512], help="in pixels")
    parser.add_argument("--rewards", nargs="+", default=SPECS)
    args = parser.parse_args(argv)
    print(
        f"{about(torch.device('cpu'), torch.float32)}, {args.images} images, {args.pairs} pairs\n"
    )
    heads = ("reward", "pixels", "images/s here", "one client / here", f"{CLIENTS} clients / here")
    print(head(*heads))
    with torch.inference_mode():
        for spec in args.rewards:
            for side in args.sides:
                images, prompts = pictures(side, 0)
                images, prompts = images[: args.images], prompts[: args.images]
                speed, *found = measure(spec, images, prompts, args.pairs)
                print(line(spec, side, f"{speed:.3g}", *(span(x, 3) for x in found)), flush=True)
