"""The memory of training and of steering, computed without a GPU: bytes are counted, never used.

    python -m scripts.bench memory --models sd15 --methods gdro     a training micro-batch
    python -m scripts.bench memory --inference --models sd15        a steered run

The networks are the published ones in their real shapes, without weights (fake tensors). Each step
is run on them, and every storage is counted from its making until it is freed; the figure is the
peak. Not in it: what docs/memory.md lists. A micro-batch fits where it leaves a fifth of the card
free. A group is k images, 6 of GDRO and 8 of Flow-GRPO; guidance evaluates each twice. Steering
runs without gradients, everything in bfloat16; its rows are what the network evaluates at once,
two a particle.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from finetune import lora
from finetune.models import FAMILIES, Noising, predict

from .networks import (
    MODELS,
    Published,
    decoder_of,
    inputs,
    latents_of,
    network_of,
    parameters,
    parts_of,
    place,
    text_encoder,
)

CARDS = {"24 GB": 24e9, "80 GB": 80e9}
HELD_IN = (torch.bfloat16, torch.bfloat16, torch.float32)  # network, decoder, critic's tower
SPARE = 0.2  # of a card: fragments, workspaces of kernels, the driver's context
POPULATIONS, DECODED = (4, 8, 16), {512: 8, 1024: 2}  # images that steer() decodes at once

# images of a group, rows of the network an image, and whether decoder and critic are at hand
METHODS = {"gdro": (6, 1, False), "grpo": (8, 1, True), "grpo, guided": (8, 2, True)}


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tree: Any) -> None:
        """Count what was not made under this mode; what is known already is not added twice."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._freed, key, size).atexit = False
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add(out := func(*args, **(kwargs or {})))
        return out


def in_float(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm as CUDA's autocast computes it, in float32; the CPU's leaves it in half precision."""

    def called(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, (args, kwargs))
        return norm(*args, **kwargs)

    return called


def step(network: Any, model: Published, rows: int, offline: bool, device: str = "cpu") -> None:
    """Forward and backward passes of a micro-batch, as the trainers make them.

    On the default device, of the type `device`.
    """
    x = torch.empty(rows, model.latents, *2 * (model.side // 8,))
    given = {name: torch.empty(rows, *shape) for name, shape in model.given.items()}
    family, noising = FAMILIES[model.family], Noising("velocity", 1000)
    inputs = (network, family, noising, x, torch.empty(rows), given)
    target = x
    if offline:
        with torch.no_grad(), lora.reference(network), torch.autocast(device, torch.bfloat16):
            target = predict(*inputs).float()
    with torch.autocast(device, torch.bfloat16):
        out = predict(*inputs)
    (out.float() - target).square().mean().backward()


@torch.no_grad()
def look(decoder: Any, tower: Any, model: Published, images: int) -> None:
    """Decode a micro-batch and show it to the critic, 32 pictures at once."""
    latents = torch.empty(images, model.latents, *2 * (model.side // 8,), dtype=torch.bfloat16)
    pictures = decoder.decode(latents).sample.float()
    for part in pictures.split(32):
        tower(F.interpolate(part, (224, 224), mode="bicubic", antialias=True))


def peak(name: str, method: str, images: int, less: bool, rank: int) -> float:
    """The most bytes of a micro-batch; `less`, with gradient checkpointing."""
    model, (_, copies, online) = MODELS[name], METHODS[method]
    with torch.device("meta"):
        network, *others = parts_of(model, online)
        lora.attach(network, FAMILIES[model.family].targets, rank, rank, torch.Generator())
    if less:
        network.enable_gradient_checkpointing()
    with FakeTensorMode(), Count() as count:
        for part, dtype in zip((network, *others), HELD_IN, strict=False):
            place(part, dtype)
        weights = list(lora.parameters(network).values())
        # AdamW's two moments and the average; gradients are left by earlier micro-batches
        kept = [torch.zeros_like(weight) for weight in weights for _ in range(3)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        norms = [patch.object(F, n, in_float(getattr(F, n))) for n in ("layer_norm", "group_norm")]
        with norms[0], norms[1]:  # around the backward pass too, which may recompute
            step(network, model, images * copies, not online)
        if online:
            look(others[0], others[1], model, images)
        del kept
    return float(count.peak)


def row(name: str, method: str, less: bool, rank: int = 32) -> str:
    """A line of the table; the peak is linear in the images, drawn through one group and two."""
    k = METHODS[method][0]
    one, two = (peak(name, method, k * groups, less, rank) for groups in (1, 2))
    each = (two - one) / k
    cells = [name, str(MODELS[name].side), method, "yes" if less else "no", str(k)]
    cells += [f"{one / 1e9:.1f}", f"{each / 1e9:.2f}"]
    for card in CARDS.values():
        images = max(0, int(k + ((1 - SPARE) * card - one) // each))
        cells.append(f"{images // k} ({images})")
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def call_peak(model: Published, side: int, rows: int) -> float:
    """The most bytes while the network evaluates `rows`; network and autoencoder are loaded."""
    with torch.device("meta"):
        parts = [network_of(model), decoder_of(model)]
    with FakeTensorMode(), Count() as count:
        for part in parts:
            place(part.requires_grad_(False), torch.bfloat16)
        parts[0](**inputs(model, rows, side, torch.bfloat16))
    return float(count.peak)


@torch.no_grad()
def decode_peak(model: Published, side: int, images: int, sliced: bool) -> float:
    """The most bytes while `images` are decoded at once, or one by one; both are loaded."""
    with torch.device("meta"):
        parts = [network_of(model), decoder_of(model)]
    if sliced:
        parts[1].enable_slicing()
    with FakeTensorMode(), Count() as count:
        for part in parts:
            place(part.requires_grad_(False), torch.bfloat16)
        parts[1].decode(latents_of(model, images, side, torch.bfloat16)).sample.float()
    return float(count.peak)


def most_rows(card: float, texts: float, one: float, each: float, rows: int, decode: float) -> int:
    """How many rows leave a fifth of the card free; 0 where decoding does not.

    one: bytes of a call of `rows`; each: of a row more; texts: of what else is loaded.
    """
    room = (1 - SPARE) * card - texts
    return max(0, int(rows + (room - one) // each)) if decode <= room else 0


def steered_row(name: str, side: int) -> str:
    """A line of the table of steering; the peak is linear in the rows, drawn through two calls."""
    model = MODELS[name]
    with torch.device("meta"):
        texts = 2.0 * sum(parameters(text_encoder(text)) for text, _ in model.texts)
        held = 2.0 * (parameters(network_of(model)) + parameters(decoder_of(model)))
    calls = {k: call_peak(model, side, 2 * k) for k in POPULATIONS}
    (few, one), *_, (many, two) = ((2 * k, calls[k]) for k in POPULATIONS)
    each = (two - one) / (many - few)
    decodes = [decode_peak(model, side, DECODED[side], sliced) for sliced in (False, True)]
    cells = [name, str(side)]
    cells += [f"{size / 1e9:.1f}" for size in (held, texts, *calls.values(), *decodes)]
    for card in CARDS.values():
        for resident in (texts, 0.0):
            most = [most_rows(card, resident, one, each, few, decode) for decode in decodes]
            cells.append(f"{most[1]}{'' if most[0] else ' (sliced)'}" if most[1] else "none")
    return f"| {' | '.join(cells)} |"


def steering_table(names: list[str]) -> None:
    """Print the table of steering, line by line."""
    heads = ["model", "side", "weights", "text encoders"]
    heads += [f"call, k = {k}" for k in POPULATIONS]
    heads += ["decode", "sliced"]
    for card in CARDS:
        heads += [f"rows in {card}", "text encoders freed"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in names:
        for side in DECODED:
            print(steered_row(name, side), flush=True)


def main(argv: list[str]) -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(
        prog="memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--inference", action="store_true", help="of steering, not of training")
    args = parser.parse_args(argv)
    if args.inference:
        steering_table(args.models)
        return
    print(
        "| model | side | method | checkpointing | k | GB of a group | GB an image more | ", end=""
    )
    print(" | ".join(f"groups (images) in {card}" for card in CARDS), "|")
    print("|---" * (7 + len(CARDS)) + "|")
    for name in args.models:
        for method in args.methods:
            for less in (False, True):
                print(row(name, method, less, args.rank), flush=True)
