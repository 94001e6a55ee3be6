"""How small or how large a picture is as a JPEG file (Black et al. 2023, "DDPO").

Legend: n images.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import check_inputs, to_uint8
from .spec import written

__all__ = ["JpegReward"]

QUALITY = 95
SIGNS = {"compressibility": -1.0, "incompressibility": 1.0}


class JpegReward:
    """-KB (compressibility) or +KB (incompressibility) at quality 95; 1 KB is 1000 bytes.

    The size depends on the JPEG library that Pillow was built with, so compare it with itself.
    """

    differentiable = False
    wants_references = False

    def __init__(self, mode: str = "compressibility") -> None:
        if mode not in SIGNS:
            raise ValueError(f"the JPEG mode {mode!r} is unknown; take one of {list(SIGNS)}")
        self.name = "jpeg"
        self.spec = written("jpeg", JpegReward, mode=mode)
        self.mode = mode
        self.range: tuple[float | None, float | None] = (
            (None, 0.0) if mode == "compressibility" else (0.0, None)
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        sizes = [_kilobytes(picture) for picture in to_uint8(images)]
        return SIGNS[self.mode] * torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _kilobytes(picture: Any) -> float:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
