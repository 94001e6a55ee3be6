"""DINO backbones, which are models of transformers, and their sources.

A source is

    tiny                   the embedded 64x64 model of the rendered world, without a network
    a folder               config.json and model.safetensors of transformers' DINOv2 or DINOv3
    org/name               a hub repository of either kind, or timm's of DINOv2
    a file                 DINOv2 with the weight names of timm or facebookresearch/dinov2
    random:<seed>          a small untrained model, for tests

Legend: n images, p patches of an image, d features.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation_cache import shared
from ..images import normalize
from .checkpoints import built, fetch, local, looks_like, moved, read_state
from .dual_encoder import prepare
from .model_cache import loaded_once
from .sources import randomise, seed_of

__all__ = ["MEAN", "STD", "Backbone", "Tokens", "View", "from_timm", "view"]

TINY = Path(__file__).parents[1] / "tiny" / "dino"
FILES = ("model.safetensors", "pytorch_model.bin")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SIDE = 224  # pixels; DINOv2 was trained at 224 and finished at 518
LARGEST = 2048  # pixels; the cost of attention grows with the fourth power of the side
HEAD = 64  # features of an attention head in every DINOv2
REFERENCES = 128  # cached
RANDOM_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# model_type of config.json -> class of transformers
CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


class Tokens(NamedTuple):
    """Unit vectors, float32: the CLS token (..., d) and the patches (..., p, d)."""

    cls: Tensor
    patches: Tensor


@dataclass(eq=False)
class Backbone:
    """A frozen DINO.

    Attributes:
        patch: Side of a patch in pixels.
        prefix: Number of leading output tokens that are no patches: CLS and registers.
        side: Side in pixels of the images that its position embeddings are for.
    """

    model: nn.Module
    patch: int
    prefix: int
    side: int

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()


@dataclass(eq=False)
class View:
    """A backbone applied to the centre square of images, at `size` x `size` pixels.

    Features of references are cached by the bytes of the image and pass no gradient.
    """

    backbone: Backbone
    size: int
    _references: OrderedDict[bytes, Tokens] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def to(self, device: torch.device) -> None:
        """Move the backbone; cached references are moved when they are next used."""
        with self._lock:
            if next(self.backbone.model.parameters()).device != device:
                moved(self.backbone.model, device)

    def tokens(self, images: Tensor, batch_size: int = 32) -> Tokens:
        """Return tokens of images (n, 3, h, w) in [0, 1] of any size, `batch_size` at once.

        Within `rewards.evaluation_cache.sharing()` the tokens of a tensor are computed once.
        """
        return shared(self, images, lambda: self._look(images, batch_size))

    def image_features(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Return the CLS tokens of images as unit vectors (n, d), for `rewards.sets`."""
        return self.tokens(images, batch_size).cls

    def _look(self, images: Tensor, batch_size: int) -> Tokens:
        device = next(self.backbone.model.parameters()).device
        chunks = (chunk.to(device) for chunk in images.split(batch_size))
        pixels = (prepare(x, (self.size, self.size), "bicubic", "shortest") for x in chunks)
        outputs = (self.backbone.model(normalize(x, MEAN, STD)) for x in pixels)
        unit = torch.cat([_unit(output.last_hidden_state) for output in outputs])
        return Tokens(unit[:, 0], unit[:, self.backbone.prefix :])

    def reference(self, picture: Tensor) -> Tokens:
        """Return the tokens of one image (1, 3, h, w), without batch dimension and autocast."""
        device = next(self.backbone.model.parameters()).device
        x = picture.detach().float().cpu().contiguous()
        key = hashlib.sha256(x.numpy().tobytes() + str(tuple(x.shape)).encode()).digest()
        # outside inference mode, because the cached tokens may take part in autograd later
        with self._lock, torch.inference_mode(False), torch.no_grad():
            found = self._references.get(key)
            if found is None:
                with torch.autocast(device.type, enabled=False):
                    found = Tokens(*(part[0] for part in self._look(x.clone(), 1)))
            self._references[key] = found = Tokens(*(part.to(device) for part in found))
            self._references.move_to_end(key)
            while len(self._references) > REFERENCES:
                self._references.popitem(last=False)
        return found


def _unit(features: Tensor) -> Tensor:
    # in half precision, by weights or autocast, rounding could change the order of scores
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1)


def view(source: str, size: int | None = None, device: torch.device | str | None = None) -> View:
    """Return the view of a source at a size, loaded once for all rewards that use it.

    `size` None is 224 pixels, or the training size of the model if that is less. Raises ValueError
    for a source that does not exist or is not a DINO, and for a size that is not a multiple of its
    patch.
    """
    seed_of(source)  # raises for a source that is no text
    place = str(TINY) if source == "tiny" else source
    backbone = loaded_once("dino", place, device, lambda: _open(source))
    size = min(SIDE, backbone.side) if size is None else size
    patch = backbone.patch
    if type(size) is not int or not patch <= size <= LARGEST or size % patch:
        near = round((min(size, LARGEST) if isinstance(size, int) else SIDE) / patch)
        raise ValueError(
            f"the DINO size is {size!r} pixels but must be a multiple of the patch of "
            f"{source}, {patch}, up to {LARGEST}; take size={max(near, 1) * patch}"
        )
    found = loaded_once(f"dino view {size}", place, device, lambda: View(backbone, size))
    if device is not None:
        found.to(torch.device(device))
    return found


def _open(source: str) -> Backbone:
    if source == "tiny":
        if not (TINY / "config.json").is_file():
            raise ValueError(f"the embedded DINO is missing at {TINY}; reinstall tilt-diffusion")
        source = str(TINY)
    seed = seed_of(source)
    if seed is not None:
        return _open_random(seed)
    path = local(source)
    beside = path.parent / "config.json"
    if path.is_file():
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    else:
        config = json.loads(fetch(source, "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type", config.get("architecture", "unknown")))
    if config and kind not in CLASSES and "dinov2" not in kind:
        raise ValueError(
            f"{source} is a {kind!r} model but DINO needs one of {list(CLASSES)}; give another"
        )
    state = read_state(fetch(source, *FILES))
    if "blocks.0.attn.qkv.weight" in state:
        config, state = from_timm(state, source)
    return _backbone(_built(config, state, source))


def _backbone(model: Any) -> Backbone:
    settings = model.config
    prefix = 1 + getattr(settings, "num_register_tokens", 0)
    return Backbone(model, settings.patch_size, prefix, settings.image_size)


def _open_random(seed: int) -> Backbone:
    from transformers import Dinov2Config, Dinov2Model

    return _backbone(randomise(Dinov2Model(Dinov2Config(**RANDOM_CONFIG)), seed))


def _built(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Any:
    """Return a model of transformers with exactly these weights, float32."""
    import transformers

    if config.get("model_type") not in CLASSES:
        looks = looks_like(state)
        raise ValueError(
            f"{source} has no config.json beside it that names one of {list(CLASSES)}"
            + (f", and it looks like {looks}" if looks else "")
            + "; give a folder that holds both"
        )
    cls: Any = getattr(transformers, CLASSES[config["model_type"]])
    return built(cls, config, state, source)


# names after "blocks.<i>." in timm and in the original code -> names in transformers
RENAMES = {
    r"norm(\d)\.": r"norm\1.",
    r"attn\.proj\.": "attention.output.dense.",
    r"ls(\d)\.gamma$": r"layer_scale\1.lambda1",
    r"mlp\.w12\.": "mlp.weights_in.",
    r"mlp\.w3\.": "mlp.weights_out.",
}


def from_timm(
    state: Mapping[str, Tensor], source: str = "the file"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert DINOv2 weights of timm or the original code to transformers' (config, state).

    Widths and depths are taken from the shapes. Raises ValueError if the weights are no DINOv2.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(
            f"{source} has a vision transformer's names but no {', '.join(missing)}, so it is no "
            "DINOv2; of DINOv3 give transformers' files, as in facebook/dinov3-vitb16-..."
        )
    rest = dict(state)
    cls, position = rest.pop("cls_token"), rest.pop("pos_embed")
    registers = rest.pop("reg_token", rest.pop("register_tokens", None))
    if math.isqrt(position.shape[1]) ** 2 == position.shape[1]:
        # with registers, timm adds the position embedding of the CLS token to the token
        position = torch.cat([torch.zeros_like(cls), position], dim=1)
    width, patch = cls.shape[-1], rest["patch_embed.proj.weight"].shape[-1]
    fc1, fc2 = (rest.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    gated = fc1 is None or (fc2 is not None and len(fc1) != fc2.shape[1])
    config: dict[str, Any] = {
        "model_type": "dinov2" if registers is None else "dinov2_with_registers",
        "hidden_size": width,
        "num_attention_heads": width // HEAD,
        "num_hidden_layers": len({key.split(".")[1] for key in rest if key.startswith("blocks.")}),
        "use_swiglu_ffn": gated,
        "patch_size": patch,
        "image_size": math.isqrt(position.shape[1] - 1) * patch,
        "layer_norm_eps": 1e-6,
    }
    found = {
        "embeddings.cls_token": cls,
        "embeddings.position_embeddings": position,
        "embeddings.mask_token": rest.pop("mask_token", cls.new_zeros(1, width)),
    }
    if registers is not None:
        config["num_register_tokens"] = registers.shape[1]
        found["embeddings.register_tokens"] = registers
    for key, value in rest.items():
        found.update(_renamed(key, value, gated))
    return config, found


def _renamed(key: str, value: Tensor, gated: bool) -> dict[str, Tensor]:
    key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
    key = re.sub(r"^norm\.", "layernorm.", key)
    match = re.fullmatch(r"blocks\.(\d+)\.(.*)", key)
    if match is None:
        return {key: value}
    layer, name = f"encoder.layer.{match[1]}.", match[2]
    if name.startswith("attn.qkv."):
        end = name.removeprefix("attn.qkv.")
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return {f"{layer}attention.attention.{part}.{end}": rows for part, rows in parts}
    if gated:
        name = name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
    for pattern, replacement in RENAMES.items():
        name = re.sub(f"^{pattern}", replacement, name)
    return {layer + name: value}
