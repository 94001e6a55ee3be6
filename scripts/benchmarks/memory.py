"""The memory of training and of steering, computed without a GPU: bytes are counted, never used.

    python -m scripts.bench memory --models sd15                 a training micro-batch
    python -m scripts.bench memory --models qwen-image           the same of a larger network
    python -m scripts.bench memory --models sd15 --inference     a steered run

docs/memory.md explains the tables. The networks have no weights (fake tensors). A step is run on
them, and every storage is counted from its allocation until it is freed; the figure is the peak.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from finetune import lora
from finetune.network import targets_of

from ..parser import parser_of
from ..tables import head, line
from .larger import BASES, BLOCKS, LARGER, asked, pack
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
RANK = 32  # of the LoRA
SPARE = 0.2  # share of a card for fragmentation, workspaces of kernels and the driver's context
POPULATIONS, DECODED = (4, 8, 16), {512: 8, 1024: 2}  # images that steer() decodes at once

# images of a group, rows of the network for each, and whether decoder and critic are loaded
METHODS = {"gdro": (6, 1, False), "grpo": (8, 1, True), "grpo, guided": (8, 2, True)}
EVERY = MODELS | LARGER
FEW = (2, 4)  # blocks of larger networks that are computed


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tree: Any) -> None:
        """Count tensors that were allocated outside this mode; none is counted twice."""
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
    """A norm in float32, as under CUDA's autocast; the CPU's leaves it in half precision."""

    def called(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, (args, kwargs))
        return norm(*args, **kwargs)

    return called


def step(network: Any, model: Published, rows: int, offline: bool, device: str = "cpu") -> None:
    """Forward and backward passes of a micro-batch, as the trainers make them.

    They run on the default device, which is of the type `device`.
    """
    given, half = asked(model, rows), torch.autocast(device, torch.bfloat16)

    def output() -> Tensor:
        with half:
            out = network(**given, return_dict=False)[0]
        return (torch.stack(out) if isinstance(out, list) else out).float()

    with torch.no_grad(), lora.reference(network):
        target = output() if offline else None
    out = output()
    (out - (torch.zeros_like(out) if target is None else target)).square().mean().backward()


@torch.no_grad()
def look(decoder: Any, tower: Any, model: Published, images: int) -> None:
    """Decode a micro-batch and run the critic on it, 32 pictures at once."""
    latents = latents_of(model, images, model.side, torch.bfloat16)
    pictures = decoder.decode(latents).sample.float()
    if model.frames is not None:
        pictures = pictures.transpose(1, 2).flatten(0, 1)
    for part in pictures.split(32):
        tower(F.interpolate(part, (224, 224), mode="bicubic", antialias=True))


def peaks(
    model: Published,
    method: str,
    images: int,
    less: bool,
    base: str = "bf16",
    offline: bool | None = None,
) -> tuple[float, float]:
    """The most bytes of a micro-batch in training, and while it is decoded and scored.

    less: with gradient checkpointing; base: how the frozen weights are held; offline: whether the
    reference has a pass, too. The second is 0 if nothing is decoded.
    """
    _, copies, online = METHODS[method]
    offline = not online if offline is None else offline
    with torch.device("meta"):
        network, *others = parts_of(model, online)
        lora.attach(network, targets_of(network), RANK, RANK, torch.Generator())
    if less:
        network.enable_gradient_checkpointing()
    with FakeTensorMode(), Count() as count:
        for part, dtype in zip((network, *others), HELD_IN, strict=False):
            place(part, dtype)
        if base in BASES:
            pack(network, base)
            count.peak = count.live
        weights = list(lora.parameters(network).values())
        # AdamW's two moments and the average; gradients are left by earlier micro-batches
        kept = [torch.zeros_like(weight) for weight in weights for _ in range(3)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        norms = [patch.object(F, n, in_float(getattr(F, n))) for n in ("layer_norm", "group_norm")]
        with norms[0], norms[1]:  # around the backward pass too, which may recompute
            step(network, model, images * copies, offline)
        trained, count.peak = count.peak, 0
        if online:
            look(others[0], others[1], model, images)
        del kept
    return float(trained), float(count.peak)


def peak(*of: Any, **more: Any) -> float:
    """The most bytes of a micro-batch, of the arguments of `peaks`."""
    return max(peaks(*of, **more))


def row(name: str, method: str, less: bool) -> str:
    """A line of the table; the peak is linear in the images, drawn through one group and two."""
    k = METHODS[method][0]
    one, two = (peak(MODELS[name], method, k * groups, less) for groups in (1, 2))
    each = (two - one) / k
    cells = [name, MODELS[name].side, method, "yes" if less else "no", k]
    cells += [f"{one / 1e9:.1f}", f"{each / 1e9:.2f}", f"{(one - (k - 1) * each) / 1e9:.1f}"]
    for card in CARDS.values():
        images = max(0, int(k + ((1 - SPARE) * card - one) // each))
        cells.append(f"{images // k} ({images})")
    return line(*cells)


def whole_peaks(name: str, side: int, method: str, *rest: Any) -> tuple[float, float]:
    """The two peaks of a larger network, each drawn through two with fewer blocks, in seconds.

    With few blocks, decoding may need more than training, and with all of them less. The pass of
    the reference, which needs less than the one with gradients, is left out.
    """
    model, (setting, blocks) = replace(LARGER[name], side=side), BLOCKS[name]
    cut = [replace(model, config={**model.config, setting: few}) for few in FEW]
    few, more = (peaks(part, method, *rest, offline=False) for part in cut)
    share = (blocks - FEW[0]) / (FEW[1] - FEW[0])
    trained, decoded = (a + (b - a) * share for a, b in zip(few, more, strict=True))
    return trained, decoded


def larger_rows(name: str, side: int, less: bool) -> Iterator[str]:
    """Yield the lines of a larger network: one image, each further one, and what fits."""
    saved = [0.0] * (1 + len(BASES))  # by weights in 8 and 4 bits
    for method in ("gdro", "grpo"):
        firsts, seconds = (whole_peaks(name, side, method, images, less) for images in (1, 2))
        one, each = max(firsts), max(b - a for a, b in zip(firsts, seconds, strict=True))
        if method == "gdro":
            packed = (max(whole_peaks(name, side, method, 1, less, base)) for base in BASES)
            saved = [0.0, *(one - of for of in packed)]
        ones = [one - of for of in saved]
        cells = [name, side, method, "yes" if less else "no"]
        cells += [" / ".join(f"{of / 1e9:.1f}" for of in ones), f"{each / 1e9:.2f}"]
        for card in CARDS.values():
            room = [(1 - SPARE) * card - of for of in ones]
            cells.append(" / ".join(str(max(0, int(1 + left // each))) for left in room))
        yield line(*cells)


@torch.no_grad()
def loaded_peak(model: Published, run: Callable[[Any, Any], object]) -> float:
    """The most bytes while run(network, autoencoder) computes; both are loaded."""
    with torch.device("meta"):
        parts = [network_of(model), decoder_of(model)]
    with FakeTensorMode(), Count() as count:
        for part in parts:
            place(part.requires_grad_(False), torch.bfloat16)
        run(*parts)
    return float(count.peak)


def call_peak(model: Published, side: int, rows: int) -> float:
    """The most bytes while the network evaluates `rows`."""
    half = partial(torch.empty, dtype=torch.bfloat16)
    return loaded_peak(model, lambda network, _: network(**inputs(model, rows, side, half)))


def decode_peak(model: Published, side: int, images: int, sliced: bool) -> float:
    """The most bytes while `images` are decoded at once, or one by one."""

    def decode(_: Any, vae: Any) -> None:
        vae.use_slicing = sliced
        vae.decode(latents_of(model, images, side, torch.bfloat16)).sample.float()

    return loaded_peak(model, decode)


def most_rows(card: float, texts: float, one: float, each: float, rows: int, decode: float) -> int:
    """How many rows leave a fifth of the card free; 0 if decoding does not.

    one: bytes of a call of `rows`; each: of one more row; texts: of what else is loaded.
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
    return line(*cells)


def main(argv: list[str] | None = None) -> None:
    """Print the table line by line; larger networks have one of their own."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--models", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--inference", action="store_true", help="print the table of steering")
    parser.add_argument("--side", type=int, help="pixels of the pictures of larger networks")
    args = parser.parse_args(argv)
    names = [name for name in args.models if name in MODELS]
    larger = [name for name in args.models if name in LARGER]
    if args.inference:
        calls = [f"call, k = {k}" for k in POPULATIONS]
        heads = ["model", "side", "weights", "text encoders", *calls, "decode", "sliced"]
        for card in CARDS:
            heads += [f"rows in {card}", "text encoders freed"]
        show(heads, (steered_row(*of) for of in product(names, DECODED)))
        return
    heads = ["model", "side", "method", "checkpointing", "k"]
    heads += ["GB of a group", "GB an image more", "GB of an image"]
    heads += [f"groups (images) in {card}" for card in CARDS]
    show(heads, (row(*of, less) for of in product(names, METHODS) for less in (False, True)))
    heads = ["model", "side", "method", "checkpointing"]
    heads += ["GB of an image (bf16 / 8-bit / 4-bit)", "GB an image more"]
    heads += [f"images in {card}" for card in CARDS]
    of = product(larger, (True, False))
    rows = (larger_rows(name, args.side or LARGER[name].side, less) for name, less in of)
    show(heads, (found for pair in rows for found in pair))


def show(heads: Sequence[str], lines: Iterator[str]) -> None:
    """Print a table as its lines are computed, or nothing if it has none."""
    for i, found in enumerate(lines):
        if i == 0:
            print(head(*heads))
        print(found, flush=True)
