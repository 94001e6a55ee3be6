"""Aesthetic predictors: ratings of images from the image embedding of a CLIP or SigLIP only.

Four kinds of heads were published, which differ in their keys: LAION's version 1, one linear layer
(`weight`, `bias`); LAION's version 2, five linear layers without activations, which is linear as
well (`layers.{0,2,4,6,7}`), and a variant with ReLU (`layers.{0,3,6,9,11}`); and version 2.5 of
discus0434, on a SigLIP, five linear layers without activations (`scoring_head.{0,2,4,6,8}`).

Legend: n images, d the width of the embedding.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..towers.checkpoints import fetch, fit, looks_like, moved, read_state, untouched
from ..towers.dual_encoder import Towers
from ..towers.sources import randomise, seed_of, towers
from .base import Card, NetworkReward

__all__ = ["AestheticHead", "AestheticReward", "collapse", "head_of"]

TINY = Path(__file__).parents[1] / "tiny" / "aesthetic" / "aesthetic.safetensors"
# names of the files on GitHub, where they are published, and on the hub
FILES = (
    "aesthetic.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
    "ava+logos-l14-linearMSE.pth",
    "ava+logos-l14-reluMSE.pth",
    "aesthetic_predictor_v2_5.pth",
    "sa_0_4_vit_l_14_linear.pth",
    "sa_0_4_vit_b_32_linear.pth",
    "sa_0_4_vit_b_16_linear.pth",
)
# SHA-256 -> name of the file, and source of the tower it was trained on
PUBLISHED = {
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0": (
        "sac+logos+ava1-l14-linearMSE.pth",
        "ViT-L-14/openai",
    ),
    "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff": (
        "ava+logos-l14-linearMSE.pth",
        "ViT-L-14/openai",
    ),
    "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4": (
        "ava+logos-l14-reluMSE.pth",
        "ViT-L-14/openai",
    ),
    "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba": (
        "sa_0_4_vit_l_14_linear.pth",
        "ViT-L-14/openai",
    ),
    "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f": (
        "sa_0_4_vit_b_32_linear.pth",
        "ViT-B-32/openai",
    ),
    "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0": (
        "sa_0_4_vit_b_16_linear.pth",
        "ViT-B-16/openai",
    ),
    "a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220": (
        "aesthetic_predictor_v2_5.pth",
        "google/siglip-so400m-patch14-384",
    ),
}
V25 = "scoring_head"  # its name for the layers
# name of the layers and width of the embedding -> the tower of a head that is no published file
TOWERS = {("layers", 768): "ViT-L-14/openai", (V25, 1152): "google/siglip-so400m-patch14-384"}


class AestheticReward(NetworkReward):
    """A head on the unit image embedding of a CLIP or SigLIP; the prompt is ignored.

    The tower is shared with `clip` or `siglip`, so the two together cost one. The reward favours a
    painterly style for any prompt, and versions 1, 2 and 2.5, which are linear, are easy to hack.
    Version 2.5 is published only as a file, models/aesthetic_predictor_v2_5.pth in the repository
    discus0434/aesthetic-predictor-v2-5 on GitHub; its authors compute it in bfloat16, this reward
    in float32.

    Args:
        source: A file, a folder or a hub id that holds a head (the first of `FILES` that exists),
            `tiny`, or `random:<seed>`.
        clip: The tower, see `rewards.towers.sources`; None is the one the head was trained on.
        scale: raw, roughly the raters' 1 to 10, or vbench, roughly 0 to 1.
        batch_size: Number of images evaluated at once.
        device: Device of the models; None follows the images.
    """

    title = "aesthetic"
    # Huang et al. 2024, "VBench"
    scales: ClassVar[Mapping[str, float]] = {"raw": 1.0, "vbench": 0.1}
    card = Card(
        weights="trl-lib/ddpo-aesthetic-predictor on ViT-L-14/openai",
        size="1.7 GB (the head 4 MB)",
        licence="Apache-2.0 (version 2), MIT (version 1), on CLIP's MIT; AGPL-3.0 (version 2.5), "
        "on SigLIP's Apache-2.0",
        range="5 to 6 is usual; version 2 lies in [-12.8, 23.2], version 2.5 in [-23.5, 27.4]",
        citation="Schuhmann et al. 2022, LAION-5B, arXiv:2210.08402 (LAION-Aesthetics); version "
        "2.5: github.com/discus0434/aesthetic-predictor-v2-5",
    )

    def __init__(
        self,
        source: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str | None = None,
        scale: str = "raw",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            "aesthetic", source=source, clip=clip, scale=scale, batch_size=batch_size, device=device
        )
        self.head, trained_on = _open(source)
        self.towers = _tower(self.head, source, clip or trained_on, device)
        if (plane := collapse(self.head)) is not None:
            reach = plane[0].norm().item()
            low, high = (self.scales[scale] * (plane[1].item() + sign * reach) for sign in (-1, 1))
            self.range = (low, high)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        self.towers.to(device)
        moved(self.head, device)
        features = self.towers.image_features(images, self.batch_size)
        with torch.autocast(features.device.type, enabled=False):
            return self.scales[self.scale] * self.head(features).squeeze(-1)


def _tower(
    head: nn.Module, source: str, clip: str | None, device: torch.device | str | None
) -> Towers:
    """Return the CLIP whose embeddings the head takes; ValueError if unknown or it does not fit."""
    width = _width(head)
    if clip is None:
        raise ValueError(
            f"the aesthetic head {source} takes {width} numbers and does not say from which "
            "CLIP; name it, as in aesthetic(clip=ViT-B-32/openai)"
        )
    found = towers(clip, device)
    if width != found.width:
        raise ValueError(
            f"the aesthetic head {source} takes embeddings of {width} numbers but the CLIP "
            f"{clip} gives {found.width}; name the one it was trained on, "
            "as in aesthetic(clip=ViT-L-14/openai)"
        )
    return found


class AestheticHead(nn.Module):
    """Version 2 or 2.5, with the published names of its layers, (n, d) -> (n, 1).

    `kind` is layers or scoring_head, the published name of the layers of version 2 and 2.5.
    """

    def __init__(self, width: int, relu: bool = False, kind: str = "layers") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = (width, 1024, 128, 64, 16, 1)
        dropouts = 4 if kind == V25 else 3
        for i in range(5):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            # Identity replaces dropout, which keeps the published numbers of the layers
            layers += [nn.ReLU()] * (relu and i < 4) + [nn.Identity()] * (i < dropouts)
        self.kind = kind
        self.add_module(kind, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, 1) of embeddings (n, d)."""
        return self.get_submodule(self.kind)(x)


def head_of(state: Mapping[str, Tensor], where: str | Path) -> nn.Module:
    """Return the frozen head of a state dict, recognised by its keys; ValueError if unknown."""
    if set(state) == {"weight", "bias"} and state["weight"].ndim == 2:
        head: nn.Module = nn.Linear(state["weight"].shape[1], 1)
    elif (first := _matrix(state, "layers")) is not None:
        head = AestheticHead(first.shape[1], relu="layers.11.weight" in state)
    elif (first := _matrix(state, V25)) is not None:
        head = AestheticHead(first.shape[1], kind=V25)
    else:
        keys, kind = list(state), looks_like(state)
        raise ValueError(
            f"{where} is not an aesthetic head: it holds {', '.join(keys[:3])}"
            + (f" and {len(keys) - 3} more" if keys[3:] else "")
            + (f"; it looks like {kind}" if kind else "")
        )
    fit(head, state, where)
    return head.requires_grad_(False).eval()


def _matrix(state: Mapping[str, Tensor], kind: str) -> Tensor | None:
    """Return the weights of the first layer under the name `kind`, if there are any."""
    found = state.get(f"{kind}.0.weight")
    return found if found is not None and found.ndim == 2 else None


def collapse(head: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return w (d,) and b of a linear head w·x + b, float64; None for a head with ReLU."""
    if any(isinstance(module, nn.ReLU) for module in head.modules()):
        return None
    w = torch.eye(_width(head), dtype=torch.float64)
    b = w.new_zeros(len(w))
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.double().cpu()
            w, b = weight @ w, weight @ b + layer.bias.double().cpu()
    return w[0], b[0]


def _width(head: nn.Module) -> int:
    return next(module for module in head.modules() if isinstance(module, nn.Linear)).in_features


@untouched()
def _open(source: str) -> tuple[nn.Module, str | None]:
    """Return the head, and the source of the tower it was trained on (None if unknown)."""
    seed = seed_of(source)
    if seed is not None:
        return randomise(nn.Linear(32, 1), seed), source
    if source == "tiny":
        if not TINY.is_file():
            raise ValueError(
                f"the embedded aesthetic head is missing at {TINY}; reinstall tilt-diffusion, or "
                "give a file, aesthetic(source=/path/to/head.pth)"
            )
        return head_of(read_state(TINY), TINY), "tiny"
    path = fetch(source, *FILES)
    head = head_of(read_state(path), path)
    name, tower = PUBLISHED.get(hashlib.sha256(path.read_bytes()).hexdigest(), (None, None))
    if name is None and path.name in {published for published, _ in PUBLISHED.values()}:
        warnings.warn(
            f"{path} is not the file that was published under that name (its SHA-256 differs)",
            stacklevel=3,
        )
    return head, tower or TOWERS.get((getattr(head, "kind", "layers"), _width(head)))
