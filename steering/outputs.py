"""What pipelines generate (images, videos and sounds), and how it is saved.

n outputs are one tensor: images (n, 3, h, w), videos (n, f, 3, h, w), or waveforms (n, channels,
samples). A reward scores exactly what is saved: 8 bits per pixel, 16 bits per sample.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

__all__ = [
    "Output", "Sound", "from_levels", "levels", "save", "scaled", "shown", "still", "to_levels",
    "to_pil", "to_tensor",
]  # fmt: skip

_FRAMES_PER_SECOND = 16  # of the animation that is saved beside a video's frames


@dataclass(frozen=True, eq=False)
class Sound:
    """A waveform of 16 bits per sample, and its sampling rate in Hz."""

    waveform: Tensor  # (channels, samples) float32 on the CPU, multiples of 1/32768 in [-1, 1)
    rate: int

    def save(self, path: str | Path) -> None:
        """Write the waveform as WAV."""
        samples = to_levels(self.waveform[None])[0].T.contiguous().numpy()
        with wave.open(str(path), "wb") as file:
            file.setparams((samples.shape[1], 2, self.rate, len(samples), "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())


Output = Image.Image | list[Image.Image] | Sound  # a list holds the frames of a video


def to_levels(values: Tensor) -> Tensor:
    """Quantise images and videos in [0, 1] to uint8 as diffusers does, waveforms to int16."""
    values = values.float()
    if values.ndim == 3:
        return (values * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def scaled(values: Tensor) -> Tensor:
    """Return quantised values as float32, in [0, 1] or [-1, 1); values in float as they are."""
    if values.is_floating_point():
        return values
    return values.float().div(32768 if values.dtype == torch.int16 else 255)


def from_levels(values: Tensor, rate: int = 0) -> list[Any]:
    """Return quantised outputs as PIL images, lists of PIL images, or `Sound`s of this `rate`."""
    if values.ndim == 3:
        return [Sound(row, rate) for row in scaled(values).cpu()]
    if values.ndim == 5:
        return [from_levels(video) for video in values]
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def levels(outputs: list[Any]) -> Tensor:
    """Return outputs of one kind and size as one quantised tensor on the CPU."""
    if isinstance(outputs[0], Sound):
        return to_levels(torch.stack([sound.waveform for sound in outputs]))
    if isinstance(outputs[0], list):
        return torch.stack([levels(video) for video in outputs])
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in outputs])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def to_pil(images: Tensor) -> list[Any]:
    """Convert float images (n, 3, h, w) in [0, 1] to 8-bit images, rounded as in diffusers."""
    return from_levels(to_levels(images))


def to_tensor(images: list[Any], device: torch.device | str) -> Tensor:
    """Convert 8-bit images of one size, as saved PNGs hold, to float32 (n, 3, h, w) in [0, 1]."""
    return scaled(levels(images).to(device))


def shown(outputs: Tensor) -> Tensor | None:
    """Return an image (n, 3, h, w) of each output, of a video its middle frame; None for sounds."""
    if outputs.ndim == 3:
        return None
    return outputs if outputs.ndim == 4 else outputs[:, (outputs.shape[1] - 1) // 2]


def still(output: Image.Image | list[Image.Image]) -> Image.Image:
    """Return an image, or the middle frame of a video."""
    return output[(len(output) - 1) // 2] if isinstance(output, list) else output


def save(folder: Path, stem: str, output: Output, about: str) -> str:
    """Write an output into the folder, and return the name of its file.

    An image is a PNG and a sound is a WAV. A video is a folder of PNG frames, from which it can be
    scored again, and an animation, lossy, which is the file that is returned. about: text that is
    written into every PNG.
    """
    if isinstance(output, Sound):
        output.save(folder / f"{stem}.wav")
        return f"{stem}.wav"
    text = PngInfo()
    text.add_itxt("parameters", about)
    if isinstance(output, Image.Image):
        output.save(folder / f"{stem}.png", pnginfo=text)
        return f"{stem}.png"
    (folder / stem).mkdir(exist_ok=True)
    for i, frame in enumerate(output):
        frame.save(folder / stem / f"{i:04d}.png", pnginfo=text)
    each: dict[str, Any] = {"duration": round(1000 / _FRAMES_PER_SECOND), "loop": 0}
    first, *others = output
    first.save(
        folder / f"{stem}.webp", save_all=True, append_images=others, quality=80, method=2, **each
    )
    return f"{stem}.webp"
