"""From latents to images through the pipeline's own tail.

A pipeline's call has a head (encode the prompt, prepare latents, images and masks), a loop and a
tail (unpack, decode, safety checker, watermark). `Tape` records what the head returned while the
pipeline runs; `Decoder` then calls the same pipeline again with no steps left, the head played back
and the latents replaced, so that exactly the stock tail runs, and nothing is encoded twice.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from steering.schedulers import Chain

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Decoder", "Tape", "do_nothing", "in_float32", "to_pil", "to_tensor", "view_of"]

CHUNK_AREA = 64 * 64  # latent places of 512 x 512 pixels
_HEAD = re.compile(r"_?(encode|prepare)_(?!extra_step_kwargs)\w+")

# Pipelines shared by threads: fast tokenizers, causal video decoders and the upcast of the SDXL
# decoder keep state in the object while they work.
_SHARED = threading.RLock()


def view_of(pipe: DiffusionPipeline, **replaced: Any) -> Any:
    """A shallow copy of a pipeline with some attributes replaced; `pipe` itself never sees them."""
    view = copy.copy(pipe)
    for name, value in replaced.items():
        vars(view)[name] = value  # not setattr, which would re-register the pipeline's config
    return view


class Tape:
    """What the head of one pipeline call returned, in the order of the calls."""

    def __init__(self) -> None:
        self._results: dict[str, list[Any]] = {}
        self._depth = 0

    def record(self, view: Any) -> None:
        """Let the head's methods of a pipeline keep what they return; `view` must be a copy."""
        for name in dir(type(view)):
            if _HEAD.fullmatch(name):
                self._results[name] = []
                vars(view)[name] = self._recorder(name, getattr(view, name))

    def _recorder(self, name: str, method: Callable) -> Callable:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with _SHARED:
                self._depth += 1
                try:
                    result = method(*args, **kwargs)
                finally:
                    self._depth -= 1
            if self._depth == 0:  # a method that another one calls is not played back
                self._results[name].append(result)
            return result

        return recorded

    def players(self, latents: Tensor) -> dict[str, Callable]:
        """Methods that return what was recorded, with `latents` in place of the prepared ones."""
        if not self._results.get("prepare_latents"):
            raise ValueError(
                "This pipeline has no prepare_latents() of its own, so latents cannot be handed to "
                "its decoder; pass decode=, a function from latents to images in [0, 1]."
            )
        return {name: self._player(name, latents) for name in self._results}

    def _player(self, name: str, latents: Tensor) -> Callable:
        results = iter(list(self._results[name]))

        def play(*args: Any, **kwargs: Any) -> Any:
            result = next(results)
            if name != "prepare_latents":
                return result
            return (latents, *result[1:]) if isinstance(result, tuple) else latents

        return play


class Decoder:
    """Decodes the latents of one pipeline call, `chunk` rows of 512 x 512 pixels at a time.

    `images(latents)` are float (n, 3, h, w) in [0, 1], by `preview` instead of the pipeline's own
    decoder where there is one, without safety checker and watermark, their sides `preview_size` of
    the image's; `finals(latents)` are the PIL images that the pipeline returns. `precise` is what
    `in_float32` made of the pipeline's decoder.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: Any,
        tape: Tape,
        call: dict[str, Any],
        *,
        preview: Any = None,
        preview_size: float = 1.0,
        decode: Callable[[Tensor], Tensor] | None = None,
        precise: Any = None,
        chunk: int = 8,
    ):
        self._pipe, self._tape, self._call = pipe, tape, call
        self._decode, self._chunk, self._size = decode, chunk, preview_size
        self._precise = precise
        ended = copy.deepcopy(scheduler)
        ended.chain = Chain(noise=ended.chain.noise, finished=True)
        self._ended = {
            "scheduler": ended,
            "maybe_free_model_hooks": do_nothing,
            "_progress_bar_config": {"disable": True},
        }
        if precise is not None:
            self._ended["vae"] = precise
        self._preview = dict(self._ended)
        if preview is not None:
            self._preview["vae"] = preview
        for name in ("safety_checker", "watermark"):
            if hasattr(pipe, name):
                self._preview[name] = None

    def images(self, latents: Tensor) -> Tensor:
        return torch.cat([self._images(part) for part in latents.split(self._at_once(latents))])

    def _images(self, latents: Tensor) -> Tensor:
        if self._decode is not None:
            return _decoded(self._decode, latents)
        images = self._tail(_smaller(latents, self._size), self._preview, "pt")
        if images.ndim == 5:  # (n, frames, 3, h, w)
            images = images.squeeze(1)
        return images.float()

    def finals(self, latents: Tensor) -> list[Image.Image]:
        images = []
        for part in latents.split(self._at_once(latents)):
            if self._decode is not None:
                images += to_pil(_decoded(self._decode, part))
            else:
                images += self._tail(part, self._ended, "pil")
        return [image[0] if isinstance(image, list) else image for image in images]

    def _at_once(self, latents: Tensor) -> int:
        """Fewer of large pictures: eight of 1024 x 1024 take more memory than the network does."""
        packed = latents.ndim == 3  # (n, tokens, channels), each token 2 x 2 places
        area = latents.shape[1] * 4 if packed else math.prod(latents.shape[2:])
        return max(1, min(self._chunk, self._chunk * CHUNK_AREA // area))

    def _tail(self, latents: Tensor, replaced: dict[str, Any], output_type: str) -> Any:
        if self._precise is not None and replaced["vae"] is self._precise:
            latents = latents.float()
        with _SHARED:
            view = view_of(self._pipe, **replaced, **self._tape.players(latents))
            # a tail that draws noise would do so for n rows; a generator a row might not fit them
            generator = Generator().manual_seed(0)
            call = self._call | {"generator": generator, "output_type": output_type}
            return view(**call)[0]


def in_float32(pipe: DiffusionPipeline) -> Any:
    """A float32 copy of a decoder that overflows in float16, None for any other.

    Its pipeline (SDXL) would cast it there and back at every decoding. One that is moved between
    devices on demand is left to that.
    """
    vae: Any = getattr(pipe, "vae", None)
    overflows = hasattr(pipe, "upcast_vae") and getattr(vae, "dtype", None) == torch.float16
    if not overflows or not vae.config.get("force_upcast") or hasattr(vae, "_hf_hook"):
        return None
    return copy.deepcopy(vae).to(torch.float32)


def _smaller(latents: Tensor, size: float) -> Tensor:
    if size == 1:
        return latents
    if latents.ndim != 4:
        raise ValueError(
            f"preview_size={size}: this pipeline's latents, {tuple(latents.shape)}, are no plane "
            "that could be made smaller; leave preview_size= out."
        )
    sides = [max(1, round(side * size)) for side in latents.shape[2:]]
    smaller = torch.nn.functional.interpolate(latents.float(), sides, mode="area")
    return smaller.to(latents.dtype)


def to_pil(images: Tensor) -> list[Image.Image]:
    """float (n, 3, h, w) in [0, 1] -> 8-bit images, rounded as diffusers rounds them."""
    arrays = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in arrays.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: list[Image.Image], device: torch.device | str) -> Tensor:
    """8-bit images of one size -> float32 (n, 3, h, w) in [0, 1]: what a saved PNG holds."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).to(device).permute(0, 3, 1, 2).float().div(255)


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of freeing the networks: the run goes on, and frees them itself at its end."""


def _decoded(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    images, n = decode(latents), len(latents)
    shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.ndim != 4 or shape[:2] != (n, 3):
        raise ValueError(
            f"decode= returned {shape} for {n} latents; return one image each, ({n}, 3, h, w) "
            "in [0, 1]."
        )
    return images
