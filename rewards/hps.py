"""Human preference score, v2 and v2.1 (Wu et al. 2023), differentiable.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .card import Card
from .images import check_inputs
from .openclip import bpe_tokenizer, build, open_clip_towers
from .sources import RANDOM_CONFIG, randomise, seed_of
from .spec import written
from .towers import Towers, check_batch_size, kept
from .weights import fetch, fit, read_state

__all__ = ["CONFIG", "FILES", "HpsReward"]

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
# CLIP ViT-H/14 as open_clip describes it
CONFIG = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
}


class HpsReward:
    """Cosine of picture and prompt in a CLIP ViT-H/14 trained on preferences; no logit scale.

    The whole picture counts: its longest side becomes 224 pixels and black fills it up to a
    square, before normalising, as the authors' code does. They resize float tensors, which
    torchvision antialiases since 0.17; so do we, whatever version is installed. Compare
    pictures of one prompt, and of one version.

    Args: source, a hub id, a folder or a file that holds the version's checkpoint (see FILES;
    or converted to safetensors, with open_clip's keys), or random:<seed>; version, v2 or v2.1;
    batch_size, images evaluated at once; device, where the towers live (None: where the images
    are).
    """

    differentiable = True
    wants_references = False
    card = Card(
        weights="xswu/HPSv2",
        size="3.9 GB",
        licence="Apache-2.0",
        range="[-1, 1]; v2 0.23 to 0.29 and v2.1 0.14 to 0.33 are usual",
        citation="Wu et al. 2023, Human Preference Score v2, arXiv:2306.09341",
    )

    def __init__(
        self,
        source: str = "xswu/HPSv2",
        version: str = "v2.1",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        if version not in FILES:
            raise ValueError(f"the HPS version {version!r} is unknown; take one of {list(FILES)}")
        check_batch_size(batch_size)
        self.name = "hps"
        self.spec = written("hps", HpsReward, source=source, version=version, batch_size=batch_size)
        self.version = version
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        seed_of(source)
        self.towers = kept(f"hps {version}", source, device, lambda: _open(source, version))
        self.range = (-1.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        self.towers.to(self.device or images.device)
        return self.towers.cosines(images, prompts, self.batch_size).to(images.device)


def _open(source: str, version: str) -> Towers:
    seed = seed_of(source)
    if seed is not None:
        model, width = randomise(build(RANDOM_CONFIG), seed), RANDOM_CONFIG["embed_dim"]
    else:
        path = fetch(source, FILES[version], str(Path(FILES[version]).with_suffix(".safetensors")))
        others = {Path(name).stem for name in FILES.values()} - {Path(FILES[version]).stem}
        if path.stem in others:
            raise ValueError(
                f"{path.name} is another version than {version}; write "
                f"hps(version={'v2' if version == 'v2.1' else 'v2.1'})"
            )
        model, width = build(CONFIG), CONFIG["embed_dim"]
        fit(model, read_state(path), path)
    return open_clip_towers(model, bpe_tokenizer(77), width, mode="longest")
