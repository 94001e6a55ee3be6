"""Decode latents to images or videos by the pipeline's own code, or to anything by `decode=`.

`Decoder` calls the same pipeline again with no steps left, its head replayed from a `Tape` and the
latents replaced. So the code after the loop (the tail) is the stock one, and nothing is encoded
twice.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from steering.axes import joined, picked
from steering.denoiser import Rows
from steering.frames import Frames
from steering.networks import StandIn, out_of_memory
from steering.outputs import from_levels, levels, to_levels
from steering.schedulers import Chain
from steering.settings import is_count
from steering.tape import SHARED, Tape, view_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Decoder",
    "Undecodable",
    "do_nothing",
    "in_float32",
]

CHUNK_AREA = 64 * 64  # latent positions of an image of 512 x 512 pixels


class Undecodable(ValueError):
    """The latents cannot be decoded to what a reward could score."""


class Decoder:
    """Decodes the latents of a pipeline call of `num` rows, `chunk` of 512 x 512 pixels at a time.

    `images(latents)` returns float (n, 3, h, w) in [0, 1], made by `preview` if given, else by the
    pipeline's own decoder, without safety checker and watermark, with sides `preview_size` times
    the image's. `finals(latents)` returns the PIL images that the pipeline would return. precise:
    the result of `in_float32` for the pipeline's decoder.

    For videos, `images` returns (n, m, 3, h, w), the m frames that `frames` chooses, and `finals`
    lists of all frames; for sounds, waveforms (n, channels, samples) and `Sound`s. first_alone:
    whether `images` decodes only the first latent frame, since its image depends on no other and
    no other is scored; `check` finds this out.

    The tail always gets as many rows as the head prepared, because some tails combine the two. If
    fewer are live (`rows` after a funnel), only those are decoded, and copied to the other rows.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: Any,
        tape: Tape,
        call: dict[str, Any],
        num: int,
        *,
        preview: Any = None,
        preview_size: float = 1.0,
        decode: Callable[[Tensor], Any] | None = None,
        precise: Any = None,
        chunk: int = 8,
        frames: Frames = Frames(),  # noqa: B008 (frozen)
        first_alone: bool = False,
    ):
        self._pipe, self._tape, self._call, self._num = pipe, tape, call, num
        self._frames, self.first_alone = frames, first_alone
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
                self._preview[name] = _passing(getattr(pipe, name))

    def check(self, x0: Tensor, scored: bool, funnel: bool = False) -> None:
        """Decode one of the rows x0 as the run will, at a quarter of its sides if possible.

        scored: whether images are also scored during the run; funnel: whether rows will be dropped.
        Raises ValueError if decoding fails.
        """
        if self._decode is not None:
            few = x0[: min(2, self._at_once(x0))]  # two, to see that each latent has a result
            self.chosen(_decoded(self._decode, few)[0])
            if funnel and self._mixes(x0):
                raise ValueError(
                    f"{type(self._pipe).__name__} mixes the rows of a call after its last step, so "
                    "those that a funnel drops would still affect its latents; leave funnel "
                    "out."
                )
            return
        if not self._tape.prepared:
            raise self._refused("it has no prepare_latents(), through which they are passed")
        if self._mixes(x0):
            raise self._refused("it mixes the rows of a call after its last step")
        first = Rows(num=self._num)
        first.keep(torch.zeros(1, dtype=torch.int64, device=x0.device), self._num)
        final = lambda x0, rows: self.chosen(levels(self.finals(x0, rows)))  # noqa: E731
        ways = [final, self.images] if scored else [final]
        for way in ways:
            if x0.ndim in (4, 5) and min(x0.shape[-2:]) >= 8:
                with contextlib.suppress(Exception):
                    way(_smaller(x0[:1], 0.25), first)
                    continue
            try:
                way(x0[:1], first)
            except Exception as error:
                if isinstance(error, Undecodable) or out_of_memory(error):
                    raise
                raise self._refused(f"it fails on latents {tuple(x0.shape)} ({error})") from error
        if scored and self._frames.which == "first":
            self._try_first(x0[:1], first)

    def _try_first(self, x0: Tensor, row: Rows) -> None:
        """Set `first_alone`: whether the first latent frame alone gives the first frame."""
        whole, self.first_alone = self.images(x0, row), True
        alone = None
        with contextlib.suppress(Exception):
            alone = self.images(x0, row)
        if alone is None or alone.shape != whole.shape:
            self.first_alone = False
        else:
            self.first_alone = (alone - whole).abs().max().item() < 1 / 255

    def _mixes(self, x0: Tensor) -> bool:
        """Return whether the tail's result for a row depends on the other rows."""
        alike = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        try:
            tails = (self._tail(x, self._ended, "latent", None) for x in (x0, x0[alike]))
            beside, alone = (latents[0].float() for latents in tails)
            gap = (beside - alone).abs().max().item()
        except Exception:  # no tensor, or a failure, which decoding will report
            return False
        # equal numbers of rows, so rounding hardly differs; NaN compares as no gap
        return gap > max(1e-5, 2 * torch.finfo(x0.dtype).eps) * alone.abs().max().item()

    def taken(self, returned: Any, last: Any) -> Tensor:
        """Return the latents that the tail expects: those `returned`, or the `last` of the loop.

        Some pipelines unpack or rescale the latents that they return; their tail would repeat that.
        """
        if _same(returned, last):
            return last
        if self._decode is not None:
            return returned if getattr(returned, "shape", None) == last.shape else last
        for latents in (returned, last):
            with contextlib.suppress(Exception):
                if _same(self._tail(latents, self._ended, "latent", None), returned):
                    return latents
        raise self._refused("the latents that it returns are not those that it decodes")

    def images(self, latents: Tensor, rows: Rows | None = None) -> Tensor:
        if self._decode is not None:
            return self.chosen(self._decoded(latents)[0])
        images = self._tail(_smaller(latents, self._size), self._preview, "pt", rows)
        if isinstance(images, np.ndarray) and images.ndim == 4:  # T2I-Adapter: (n, h, w, 3)
            images = torch.from_numpy(images).permute(0, 3, 1, 2).to(latents.device)
        if not isinstance(images, Tensor) or len(images) != self._num:
            raise self._refused('its output_type="pt" returns no tensor with one image per row')
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise self._refused(
                f'its output_type="pt" returns {tuple(images.shape)}, not (n, 3, h, w) or (n, '
                "frames, 3, h, w)"
            )
        if images.ndim == 5 and images.shape[1] == 1 and not self.first_alone:
            images = images.squeeze(1)  # (n, frames, 3, h, w)
        images = images if rows is None or rows.live is None else images[rows.live]
        return self.chosen(images).float()

    def finals(self, latents: Tensor, rows: Rows | None = None) -> list[Any]:
        if self._decode is not None:
            values, rate = self._decoded(latents)
            return from_levels(to_levels(values), rate)
        images = self._tail(latents, self._ended, "pil", rows)
        if len(images) != self._num:
            raise self._refused(f"it returns {len(images)} images for {self._num} rows")
        alive = range(self._num) if rows is None or rows.live is None else rows.live.tolist()
        images = [images[i] for i in alive]
        return [one[0] if isinstance(one, list) and len(one) == 1 else one for one in images]

    def chosen(self, outputs: Tensor) -> Tensor:
        """Return what the reward sees: images and sounds as they are, of videos some frames."""
        try:
            self._frames.check(outputs.shape[1] if outputs.ndim == 5 else None)
        except ValueError as error:
            raise Undecodable(str(error)) from None
        return self._frames.chosen(outputs) if outputs.ndim == 5 else outputs

    def _decoded(self, latents: Tensor) -> tuple[Tensor, int]:
        """Return the result of decode= for all latents, and the sampling rate of sounds, else 0."""
        decode: Any = self._decode
        parts = [_decoded(decode, part) for part in latents.split(self._at_once(latents))]
        kinds = list(dict.fromkeys((tuple(values.shape[1:]), rate) for values, rate in parts))
        if len(kinds) > 1:
            said = " and ".join(
                f"{shape} at {rate} Hz" if rate else f"{shape}" for shape, rate in kinds
            )
            raise ValueError(
                f"decode= returned {said} in one run; return one shape and one sampling rate for "
                "all latents."
            )
        return torch.cat([values for values, _ in parts]), parts[0][1]

    def _refused(self, why: str) -> Undecodable:
        return Undecodable(
            f"{type(self._pipe).__name__} cannot decode latents here: {why}. Pass decode=, a "
            "function from latents to images in [0, 1]."
        )

    def _at_once(self, latents: Tensor) -> int:
        """Return the chunk size, smaller for large images to bound the decoder's memory."""
        packed = latents.ndim == 3  # (n, tokens, channels), each token 2 x 2 positions
        area = latents.shape[1] * 4 if packed else math.prod(latents.shape[2:])
        return max(1, min(self._chunk, self._chunk * CHUNK_AREA // area))

    def _tail(
        self, latents: Tensor, replaced: dict[str, Any], output_type: str, rows: Rows | None
    ) -> Any:
        if (
            self._precise is not None
            and replaced["vae"] is self._precise
            and output_type != "latent"
        ):
            latents = latents.float()
        if rows is not None and rows.source is not None:
            latents = latents[rows.source.to(latents.device)]
        parts: dict[str, Any] = self._pipe.components | replaced
        cut = self.first_alone and replaced is self._preview
        decoders: dict[str, Any] = {
            name: StandIn(part, decode=self._by_parts(part, rows, cut))
            for name, part in parts.items()
            if isinstance(part, torch.nn.Module) and hasattr(part, "decode")
        }
        with SHARED:
            view = view_of(self._pipe, **replaced | decoders)
            vars(view).update(self._tape.players(view, latents))
            # One generator, in case the tail draws noise for another number of rows.
            generator = Generator().manual_seed(0)
            call = self._call | {"generator": generator, "output_type": output_type}
            return view(**call)[0]

    def _by_parts(self, part: Any, rows: Rows | None, cut: bool) -> Callable[..., Any]:
        """Return a `part.decode` that decodes only the live rows, `chunk` at a time.

        cut: whether to decode only the first frame of videos.
        """
        decode = part.decode

        def by_parts(z: Any, *args: Any, **kwargs: Any) -> Any:
            more = any(isinstance(one, Tensor) and one.ndim for one in (*args, *kwargs.values()))
            if not isinstance(z, Tensor) or len(z) != self._num or more:
                return decode(z, *args, **kwargs)
            alive = z if rows is None or rows.live is None else z[rows.live.to(z.device)]
            alive = alive[:, :, :1] if cut and z.ndim == 5 else alive
            some = lambda few: decode(few, *args, **kwargs)  # noqa: E731
            try:
                out = _split(some, alive, self._at_once(alive))
            except Exception as error:
                if len(alive) == 1 or self._chunk == 1 or out_of_memory(error):
                    raise
                out = _split(some, alive, 1)  # HunyuanVideo 1.5 decodes only one row per call
                self._chunk = 1
            if rows is None or rows.source is None:
                return out
            return picked("the decoder", out, rows.source)

        return by_parts


def _split(decode: Callable[[Tensor], Any], z: Tensor, at_once: int) -> Any:
    """Return `decode` of z, computed `at_once` rows at a time."""
    few = z.split(at_once)
    parts = [decode(one) for one in few]
    return joined("the decoder", parts, [len(one) for one in few]) if len(few) > 1 else parts[0]


def _passing(checker: Any) -> Any:
    """Return a checker that passes everything, for previews: None, or a stand-in for Cosmos."""
    if not hasattr(checker, "check_video_safety"):
        return None
    allow = {"check_text_safety": lambda text: True, "check_video_safety": lambda video: video}
    return StandIn(checker, do_nothing, to=do_nothing, **allow)


def in_float32(pipe: DiffusionPipeline) -> Any:
    """Return a float32 copy of a decoder that overflows in float16, None for any other.

    The pipeline (SDXL) would otherwise cast it to float32 and back at every decoding. A decoder
    that is offloaded on demand is not copied.
    """
    vae: Any = getattr(pipe, "vae", None)
    overflows = hasattr(pipe, "upcast_vae") and getattr(vae, "dtype", None) == torch.float16
    if not overflows or not vae.config.get("force_upcast") or _comes_on_demand(vae):
        return None
    return copy.deepcopy(vae).to(torch.float32)


def _comes_on_demand(part: torch.nn.Module) -> bool:
    """Return whether a part, or its layers, are offloaded; copies would call the same hooks."""
    layers = part.modules()
    return hasattr(part, "_hf_hook") or any(hasattr(one, "_diffusers_hook") for one in layers)


def _same(a: Any, b: Any) -> bool:
    """Return whether two results are equal, treating NaN as equal to NaN."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def _smaller(latents: Tensor, size: float) -> Tensor:
    if size == 1:
        return latents
    if latents.ndim not in (4, 5):
        raise ValueError(
            f"preview_size={size}: this pipeline's latents, {tuple(latents.shape)}, are not 4-D "
            "or 5-D, so they cannot be made smaller; leave preview_size= out."
        )
    sides = [max(1, round(side * size)) for side in latents.shape[-2:]]
    planes = latents.float() if latents.ndim == 4 else latents.float().flatten(0, 1)
    smaller = torch.nn.functional.interpolate(planes, sides, mode="area").to(latents.dtype)
    return smaller if latents.ndim == 4 else smaller.unflatten(0, latents.shape[:2])


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces the call that frees the networks, which the run frees itself at its end."""


def _decoded(decode: Callable[[Tensor], Any], latents: Tensor) -> tuple[Tensor, int]:
    """Return what decode= makes of the latents, and the sampling rate of sounds, 0 for others."""
    made, n = decode(latents), len(latents)
    pair = isinstance(made, tuple) and len(made) == 2
    values: Any = made[0] if pair else made
    rate: Any = made[1] if pair else 0
    fits = isinstance(values, Tensor) and values.ndim > 0 and len(values) == n
    if pair:
        fits = fits and values.ndim == 3 and is_count(rate)
    else:
        fits = fits and values.ndim in (4, 5) and values.shape[-3] == 3
    if not fits:
        raise ValueError(
            f"decode= returned {_form(made)} for {n} latents; return one image for each, "
            f"({n}, 3, h, w) in [0, 1], or one video, ({n}, frames, 3, h, w), or a pair of "
            f"waveforms in [-1, 1], ({n}, channels, samples), and their sampling rate."
        )
    if not values.is_floating_point():
        raise ValueError(
            f"decode= returned values of {values.dtype}; return floats, images in [0, 1] and "
            "waveforms in [-1, 1]."
        )
    return values.squeeze(1) if values.ndim == 5 and values.shape[1] == 1 else values, rate


def _form(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(map(_form, made))})"
    if isinstance(made, Tensor):
        return str(tuple(made.shape))
    return repr(made) if isinstance(made, int | float | None) else type(made).__name__
