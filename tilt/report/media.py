"""An image of every saved output: of a video its middle frame, of a sound its waveform."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["opened"]

_WAVE = (256, 128)  # pixels
_INK, _PAPER = (31, 119, 180), (255, 255, 255)


def opened(path: Path) -> Image.Image:
    """Return an image in RGB of a saved PNG, WebP or WAV; ValueError if a WAV is damaged."""
    if path.suffix == ".wav":
        return _waveform(path)
    with Image.open(path) as image:
        image.seek((getattr(image, "n_frames", 1) - 1) // 2)
        return image.convert("RGB")


def _waveform(path: Path) -> Image.Image:
    """Draw the loudest sample, upwards and downwards, of each part of a sound."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, content = file.getnchannels(), file.readframes(file.getnframes())
            if file.getsampwidth() != 2:
                raise wave.Error(f"it has {8 * file.getsampwidth()} bits per sample, not 16")
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no readable sound ({error}); write it again") from None
    samples = np.frombuffer(content, dtype="<i2").astype(float).reshape(-1, channels) / 32768
    width, height = _WAVE
    low, high = samples.min(1, initial=0), samples.max(1, initial=0)
    rows = np.linspace(1, -1, height)[:, None]
    ink = np.zeros((height, width), dtype=bool)
    for column, part in enumerate(np.array_split(np.arange(len(samples)), width)):
        ends = (low[part].min(initial=0), high[part].max(initial=0))
        ink[:, column] = ((rows >= ends[0]) & (rows <= ends[1]))[:, 0]
    ink[height // 2] = True
    return Image.fromarray(np.where(ink[..., None], _INK, _PAPER).astype(np.uint8))
