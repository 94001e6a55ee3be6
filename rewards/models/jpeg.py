"""The size of an image as a JPEG file (Black et al. 2023, "DDPO").

Legend: n images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..arguments import check_choice
from ..images import check_inputs, to_uint8
from ..spec import written
from .base import Card

__all__ = ["JpegReward"]

# the last three are Pillow's defaults, with which the published scores were made
JPEG: dict[str, Any] = {
    "quality": 95,
    "subsampling": "4:2:0",
    "optimize": False,
    "progressive": False,
}
LARGEST = 65500  # pixels of a side, the limit of libjpeg
SIGNS = {"compressibility": -1.0, "incompressibility": 1.0}
# Flow-GRPO divides only compressibility by 500
SCALES = {
    "kilobytes": {"compressibility": 1.0, "incompressibility": 1.0},
    "flow_grpo": {"compressibility": 1 / 500, "incompressibility": 1.0},
}


class JpegReward:
    """-KB (compressibility) or +KB (incompressibility) at quality 95, where 1 KB is 1000 bytes.

    The scale is kilobytes, as in DDPO, or flow_grpo, where compressibility is -KB/500. The size
    depends on the JPEG library of Pillow, so compare scores of one installation only.
    """

    differentiable = False
    wants_references = False
    card = Card(
        weights="",
        size="",
        licence="no weights",
        range="(-inf, 0] or [0, inf)",
        citation="Black et al. 2023, DDPO",
    )

    def __init__(self, mode: str = "compressibility", scale: str = "kilobytes") -> None:
        check_choice("the JPEG mode", mode, SIGNS)
        check_choice("the JPEG scale", scale, SCALES)
        self.name = "jpeg"
        self.spec = written("jpeg", JpegReward, mode=mode, scale=scale)
        self.mode, self.scale = mode, scale
        self.range: tuple[float | None, float | None] = (
            (None, 0.0) if mode == "compressibility" else (0.0, None)
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        height, width = images.shape[2:]
        if max(height, width) > LARGEST:
            raise ValueError(
                f"an image of {width} × {height} pixels cannot be a JPEG, whose sides have at "
                f"most {LARGEST}; pass a smaller one"
            )
        sizes = [_kilobytes(picture) for picture in to_uint8(images)]
        factor = SIGNS[self.mode] * SCALES[self.scale][self.mode]
        return factor * torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _kilobytes(picture: Any) -> float:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", **JPEG)
    return buffer.tell() / 1000
