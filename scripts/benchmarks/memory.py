"""The memory of a training micro-batch, computed without a GPU: bytes are counted, never used.

    python -m scripts.bench memory --models sd15 --methods gdro

The networks are the published ones in their real shapes, without weights (fake tensors). Each step
is run on them, and every storage is counted from its making until it is freed; the figure is the
peak. Not in it: what docs/memory.md lists. A micro-batch fits where it leaves a fifth of the card
free. A group is k images, 6 of GDRO and 8 of Flow-GRPO; guidance evaluates each twice.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Dinov2Config, Dinov2Model

from finetune import lora
from finetune.models import FAMILIES, Noising, predict

CARDS = {"24 GB": 24e9, "80 GB": 80e9}
HELD_IN = (torch.bfloat16, torch.bfloat16, torch.float32)  # network, decoder, critic's tower
SPARE = 0.2  # of a card: fragments, workspaces of kernels, the driver's context


@dataclass(frozen=True)
class Model:
    """A published model: its network and decoder by their configurations.

    given: the shape of a prompt's conditioning, by name; side: of pictures, in pixels.
    """

    family: str
    network: str
    config: Mapping[str, Any]
    latents: int
    given: Mapping[str, tuple[int, ...]]
    side: int


# from the models' own config.json; what is not stated is diffusers' default. SD3.5's prompts are 77
# tokens of the CLIPs and 256 of T5
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35M = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
MODELS = {
    "sd15": Model(
        "StableDiffusionPipeline", "UNet2DConditionModel", SD15, 4, {"embeds": (77, 768)}, 512
    ),
    "sdxl": Model(
        *("StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL, 4),
        {"embeds": (77, 2048), "pooled": (1280,), "time_ids": (6,)},
        1024,
    ),
    "sd35m": Model(
        *("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35M, 16),
        {"embeds": (333, 4096), "pooled": (2048,)},
        512,
    ),
}


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


def parts_of(model: Model, online: bool) -> list[Any]:
    """The network and, if online, the autoencoder and the critic's DINOv2-base.

    The three models' autoencoders are alike but for the channels of latents.
    """
    quant = model.latents == 4
    network = getattr(diffusers, model.network)(**model.config).eval()
    if not online:
        return [network]
    kind: Any = diffusers.AutoencoderKL  # it annotates sizes as tuples of one
    decoder = kind(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=model.latents,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    tower = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    return [network, decoder.requires_grad_(False), tower.requires_grad_(False)]


def place(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module of the meta device tensors of the mode that is on; trained ones in float32."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=torch.float32 if old.requires_grad else dtype)
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            part._buffers[name] = None if old is None else torch.empty(old.shape, dtype=dtype)


def step(network: Any, model: Model, rows: int, offline: bool) -> None:
    """Forward and backward passes of a micro-batch, as the trainers make them."""
    x = torch.empty(rows, model.latents, *2 * (model.side // 8,))
    given = {name: torch.empty(rows, *shape) for name, shape in model.given.items()}
    family, noising = FAMILIES[model.family], Noising("velocity", 1000)
    inputs = (network, family, noising, x, torch.empty(rows), given)
    target = x
    if offline:
        with torch.no_grad(), lora.reference(network), torch.autocast("cpu", torch.bfloat16):
            target = predict(*inputs).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = predict(*inputs)
    (out.float() - target).square().mean().backward()


@torch.no_grad()
def look(decoder: Any, tower: Any, model: Model, images: int) -> None:
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


def main(argv: list[str]) -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(
        prog="memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args(argv)
    print(
        "| model | side | method | checkpointing | k | GB of a group | GB an image more | ", end=""
    )
    print(" | ".join(f"groups (images) in {card}" for card in CARDS), "|")
    print("|---" * (7 + len(CARDS)) + "|")
    for name in args.models:
        for method in args.methods:
            for less in (False, True):
                print(row(name, method, less, args.rank), flush=True)
