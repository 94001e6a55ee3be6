"""Sources of CLIP and SigLIP towers.

`towers(source)` loads the towers once for all rewards that use them; `source` is

    tiny                        the embedded 64x64 model of the rendered world, without a network
    a folder, org/name          open_clip_config.json, or config.json of a transformers
                                CLIPModel or SiglipModel; hf-hub:org/name is the same
    ViT-B-32/laion2b_s34b_b79k  an open_clip architecture and its pretrained tag
    random:<seed>               a small untrained model, for tests

Every constant of the preprocessing is defined in these modules or in a file beside the weights;
none is a default of the installed libraries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import openclip, transformers_clip
from .checkpoints import find, local
from .dual_encoder import Towers, shared_towers
from .openclip import bpe_tokenizer, build, open_clip_towers

__all__ = ["RANDOM_CONFIG", "TINY", "open_source", "randomise", "seed_of", "towers"]

TINY = Path(__file__).parents[1] / "tiny" / "clip"
RANDOM_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def towers(source: str, device: torch.device | str | None = None) -> Towers:
    """Return the towers of a source, loaded once for all rewards that use them.

    Raises ValueError for a source that does not exist, or that is neither a CLIP nor a SigLIP.
    """
    seed_of(source)  # raises for a source that is no text
    place = str(TINY) if source == "tiny" else source
    return shared_towers("", place, device, lambda: open_source(source))


def open_source(source: str) -> Towers:
    """Return a new copy of the towers of a source; raises ValueError as in `towers`."""
    seed = seed_of(source)
    if seed is not None:
        return _open_random(seed)
    folder = TINY if source == "tiny" else local(source)
    if folder.is_dir():
        return _open_place(str(folder))
    if source == "tiny":
        raise ValueError(f"the embedded CLIP is missing at {TINY}; reinstall tilt-diffusion")
    if source.startswith(("/", ".", "~")):
        raise ValueError(f"there is no CLIP folder {source!r}; give one that exists")
    return _open_remote(source.removeprefix("hf-hub:"))


def seed_of(source: str) -> int | None:
    """Return the seed of a source `random:<seed>`, or None for any other source."""
    if not isinstance(source, str):
        raise ValueError(f"the source is {source!r}; give its name as text, as in clip(tiny)")
    kind, _, text = source.partition(":")
    if kind != "random":
        return None
    if not text.isdecimal():
        raise ValueError(f"the source {source!r} needs a whole number, as in random:0")
    return int(text)


def randomise(model: nn.Module, seed: int) -> Any:
    """Fill a model's weights from a new generator of this seed, and freeze it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.ndim:
            parameter.data.zero_()
        elif parameter.ndim > 1 or name.endswith("embedding"):
            width = parameter.shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return model.requires_grad_(False).eval()


def _open_random(seed: int) -> Towers:
    return open_clip_towers(randomise(build(RANDOM_CONFIG), seed), bpe_tokenizer(77), 32)


def _open_place(place: str) -> Towers:
    """Open a folder or a hub id."""
    if (path := find(place, "open_clip_config.json")) is not None:
        return openclip.open_place(place, json.loads(path.read_text(encoding="utf-8")))
    if (path := find(place, "config.json")) is not None:
        return transformers_clip.open_place(place, json.loads(path.read_text(encoding="utf-8")))
    raise ValueError(
        f"{place} is no CLIP folder: it holds neither open_clip_config.json nor config.json"
    )


def _open_remote(source: str) -> Towers:
    import open_clip

    name, _, tag = source.partition("/")
    if name in open_clip.list_models():
        return openclip.open_tag(name, tag)
    if source.count("/") != 1:
        raise ValueError(
            f"CLIP source {source!r} is neither tiny, a folder that exists, an open_clip "
            "ARCHITECTURE/TAG, a hub id ORGANISATION/NAME nor random:SEED; give one of these"
        )
    return _open_place(source)
