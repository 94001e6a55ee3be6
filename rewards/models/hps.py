"""Human preference score, versions 2 and 2.1 (Wu et al. 2023), differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from ..arguments import check_choice
from ..towers.checkpoints import fetch, fit, read_state
from ..towers.dual_encoder import Towers, shared_towers
from ..towers.openclip import bpe_tokenizer, build, open_clip_towers
from ..towers.sources import RANDOM_CONFIG, randomise, seed_of
from .base import Card, CosineReward, Scale

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


class HpsReward(CosineReward):
    """Cosine of image and prompt in a CLIP ViT-H/14 trained on human preferences.

    As in the authors' code, the longest side of the whole image is resized to 224 pixels, and the
    image is padded with black to a square before it is normalised. The authors resize float
    tensors, which torchvision has antialiased since version 0.17; this reward always does. Scores
    are comparable only between images of one prompt and for one version.

    Args:
        source: A hub id, a folder or a file that holds the checkpoint of the version (see
            `FILES`, or the same in safetensors with open_clip's keys), or `random:<seed>`.
        version: v2 or v2.1.
        batch_size: Number of images evaluated at once.
        device: Device of the towers; None follows the images.
    """

    title = "HPS"
    scales: ClassVar[Mapping[str, Scale]] = {"cosine": lambda cosine, t, b: cosine}
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
        check_choice("the HPS version", version, FILES)
        super().__init__(
            "hps", source=source, version=version, batch_size=batch_size, device=device
        )
        self.version, self.scale = version, "cosine"
        seed_of(source)  # refuses a source that is no text
        kind = f"hps {version}"
        self._use(shared_towers(kind, source, device, lambda: _open(source, version)))


def _open(source: str, version: str) -> Towers:
    seed = seed_of(source)
    if seed is not None:
        model, width = randomise(build(RANDOM_CONFIG), seed), RANDOM_CONFIG["embed_dim"]
    else:
        path = fetch(source, FILES[version], str(Path(FILES[version]).with_suffix(".safetensors")))
        others = {Path(name).stem for name in FILES.values()} - {Path(FILES[version]).stem}
        if path.stem in others:
            raise ValueError(
                f"{path.name} is not version {version}; use "
                f"hps(version={'v2' if version == 'v2.1' else 'v2.1'})"
            )
        model, width = build(CONFIG), CONFIG["embed_dim"]
        fit(model, read_state(path), path)
    return open_clip_towers(model, bpe_tokenizer(77), width, mode="longest")
