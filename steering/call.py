"""The keywords of a pipeline's own call: checked before any work, then dealt out to its prompts."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.modules.dropout import _DropoutNd

from steering.arguments import MOST_PIXELS, MOST_STEPS, check_count
from steering.denoiser import networks
from steering.keywords import check_keywords
from steering.refusals import refuse_unsteerable
from steering.settings import FeynmanKac

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["WAYS", "PipelineCall", "check_pipeline", "check_preview"]

_CLASHES = {
    "prompt": "pass the prompts as steer()'s second argument",
    "num_images_per_prompt": "pass particles= instead",
    "num_videos_per_prompt": "pass particles= instead",
    "generator": "pass seed= instead",
    "latents": "each particle starts from the noise of its own generator; pass seed= instead",
    "output_type": "images come back as PIL, latents as Steered.latents",
    "return_dict": "a Steered is returned",
    "eta": "pass FeynmanKac(noise=...) instead",
    "denoising_end": "the filter has to see the run to its end; leave it out",
    "padding_mask_crop": "crop the image and the mask yourself",
}
# one text for all prompts, where a str; others that have prompt in their name mean something else
_TEXTS = re.compile(r"(negative_)?prompt(_\d+)?")
_PICTURES = re.compile(r"image|video|frames|mask|control|condition")
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
WAYS = ("count", "texts", "pictures")  # to ask for rows: by a count, or with these written out


@dataclass(frozen=True)
class PipelineCall:
    """A checked call: `keywords` as given, `names` those that the pipeline knows.

    Raises ValueError, in `check`, for a keyword that is unknown or that steer() sets itself.
    """

    keywords: dict[str, Any]
    defaults: dict[str, Any]  # of every named parameter of the pipeline's call
    prompts: tuple[str, ...]

    @staticmethod
    def check(
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        keywords: dict[str, Any],
        ours: Sequence[str] = (),
    ) -> PipelineCall:
        """`ours` are the names of steer()'s own arguments, for a hint where one is misspelt."""
        parameters = inspect.signature(type(pipe).__call__).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        defaults = {p.name: p.default for p in named if p.name != "self"}
        kind = type(pipe).__name__
        if "prompt" not in defaults:
            raise ValueError(f"{kind} takes no prompt, so there is nothing to steer it by.")
        for name in keywords:
            if name in _CLASHES:
                raise ValueError(f"{name}= clashes with steer(): {_CLASHES[name]}.")
            if name not in defaults:
                hint = _hint(name, [*defaults, *ours]) or f"see help({kind}.__call__)."
                raise ValueError(f"{kind} takes no keyword {name}=; {hint}")
        empty = inspect.Parameter.empty
        missing = [n for n, d in defaults.items() if d is empty and n not in {*keywords, *_CLASHES}]
        if missing:
            raise ValueError(f"{kind} needs {missing[0]}= as well; see help({kind}.__call__).")
        call = PipelineCall(dict(keywords), defaults, tuple(prompts))
        call._check_sizes()
        check_keywords(type(pipe).__call__, keywords, kind)
        for name in call._per_prompt():
            call._check_length(name)
        several = (("controlnet", "nets"), ("adapter", "adapters"))  # with a picture for each
        if not any(hasattr(getattr(pipe, part, None), inner) for part, inner in several):
            call._check_pictures()
        return call

    def value(self, name: str) -> Any:
        """What the pipeline will see for `name`; None where it has no such parameter."""
        default = self.defaults.get(name)
        return self.keywords.get(name, None if default is inspect.Parameter.empty else default)

    def num_steps(self) -> tuple[int, ...]:
        """How many steps may be executed, as far as that can be known beforehand; () where not.

        Of a fraction of the steps some pipelines take the floor (SD) and some the ceiling (SD3).
        """
        for name in ("sigmas", "timesteps"):
            if self.value(name) is not None:
                return (len(self.value(name)),)
        steps, strength = self.value("num_inference_steps"), self.value("strength")
        if steps is None or self.value("denoising_start") is not None:
            return ()
        if strength is None:
            return (steps,)
        floor, ceiling = int(steps * strength), steps - int(steps - steps * strength)
        return tuple({min(floor, steps): None, min(ceiling, steps): None})

    def _check_pictures(self) -> None:
        for name in ("image", "mask_image", "control_image"):
            value = self.keywords.get(name)
            several = list(value) if isinstance(value, list | tuple) else []
            if any(picture is not several[0] for picture in several):
                raise ValueError(
                    f"{name}= holds different pictures, which a pipeline deals out to the "
                    "particles in turn; steer the prompts of each picture in a call of their own."
                )

    def _check_sizes(self) -> None:
        if self.value("num_inference_steps") is not None:
            check_count("num_inference_steps", self.value("num_inference_steps"), MOST_STEPS)
        for name in ("height", "width"):
            if self.keywords.get(name) is not None:
                check_count(name, self.keywords[name], MOST_PIXELS)

    def pictures(self) -> list[str]:
        """The keywords that hold pictures, which a pipeline may encode with each row's noise."""
        return [
            name
            for name, value in self.keywords.items()
            if _PICTURES.search(name) and "prompt" not in name and not _is_plain(value)
        ]

    def check_packing(self, prompts_per_call: int) -> None:
        images = self.pictures()
        if prompts_per_call > 1 and images:
            raise ValueError(
                f"prompts_per_call={prompts_per_call} with {images[0]}=: pipelines pair several "
                "prompts and images in orders of their own; leave prompts_per_call at 1."
            )

    def check_spread(self) -> None:
        images = self.pictures()
        if images:
            raise ValueError(
                f"spread= with {images[0]}=: pipelines encode it with noise of the first particle, "
                "which lives on one of the processes; leave spread= out."
            )

    def check_frames(self) -> None:
        frames = self.value("num_frames")
        if frames not in (None, 1):
            raise ValueError(
                f"num_frames={frames}: a reward scores pictures; pass num_frames=1, or decode=, a "
                "function from latents to one image (3, h, w) in [0, 1] a video."
            )

    def for_prompts(
        self, indices: Sequence[int], k: int, generators: list[Generator], way: int = 0
    ) -> dict[str, Any]:
        """The keywords of the call that makes k particles for each of these prompts.

        `way` is one of `WAYS` to ask for k of them: some pipelines ignore their own count, and some
        of those want a picture a row as well.
        """
        call = dict(self.keywords)
        count = next((name for name in _COUNTS if name in self.defaults), None)
        # several prompts are written out: some pipelines (Sana, PixArt) repeat the attention masks
        # of several prompts in another order than their embeddings; and so are embeddings, which
        # SD3 does not repeat
        written_out = way > 0 or count is None or len(indices) > 1 or "prompt_embeds" in call
        rows = [i for i in indices for _ in range(k)] if written_out else list(indices)
        for name in self._per_prompt():
            call[name] = self._deal(call[name], rows)
        if "prompt_embeds" not in call:
            call["prompt"] = self._deal(list(self.prompts), rows)
        if WAYS[way] == "pictures":
            call |= {name: _a_row(name, value, len(rows)) for name, value in call.items()}
        if count:
            call[count] = 1 if written_out else k
        return call | {"generator": generators, "return_dict": False}

    def resized(self, num: int, to: int) -> PipelineCall:
        """The call with one picture listed `to` times wherever it is listed once a row of `num`."""
        keywords = {
            name: [value[0]] * to
            if isinstance(value, list)
            and len(value) == num
            and not _is_plain(value)
            and all(v is value[0] for v in value)
            else value
            for name, value in self.keywords.items()
        }
        return dataclasses.replace(self, keywords=keywords)

    def changed(self, index: int) -> PipelineCall:
        """A call of two prompts that differ in nothing but their text: prompt `index`, and less."""
        text = self.prompts[index]
        # no more tokens, so nothing is padded further, and not the last, which may be cut off
        shorter = " ".join(text.split()[1:]) if text.strip() else "a"
        keywords = dict(self.keywords)
        for name in self._per_prompt():
            keywords[name] = self._deal(keywords[name], [index, index])
        embeds = keywords.get("prompt_embeds")
        if isinstance(embeds, Tensor):
            keywords["prompt_embeds"] = torch.stack([embeds[0], embeds[1] * 0.5])
        elif isinstance(embeds, list) and isinstance(embeds[1], Tensor):
            keywords["prompt_embeds"] = [embeds[0], embeds[1] * 0.5]
        return dataclasses.replace(self, keywords=keywords, prompts=(text, shorter))

    def _per_prompt(self) -> list[str]:
        return [
            name
            for name, value in self.keywords.items()
            if ("prompt" in name and isinstance(value, list | Tensor))
            or (_TEXTS.fullmatch(name) and isinstance(value, str))
        ]

    def _check_length(self, name: str) -> None:
        value, b = self.keywords[name], len(self.prompts)
        if not isinstance(value, str) and len(value) not in (1, b):
            raise ValueError(
                f"{name}= has {len(value)} entries for {b} prompts; give one, or one a prompt."
            )

    @staticmethod
    def _deal(value: Any, rows: list[int]) -> Any:
        if isinstance(value, Tensor):
            return value[torch.tensor(rows) if len(value) > 1 else [0] * len(rows)]
        if isinstance(value, str):
            value = [value]
        dealt = [value[i if len(value) > 1 else 0] for i in rows]
        # a pipeline wants its prompts to be of one type, all str or all lists
        return dealt[0] if len(dealt) == 1 and isinstance(dealt[0], str) else dealt


def _is_plain(value: Any) -> bool:
    """Numbers, names and switches, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, str | int | float | type(None)) for one in values)


def _a_row(name: str, value: Any, rows: int) -> Any:
    """A picture, or a video, once for each row; anything else as it is."""
    if isinstance(value, Image.Image):
        return [value] * rows
    if isinstance(value, Tensor) and value.ndim >= 3 and len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        if "video" in name:
            return [value] * rows
        return value * rows if len(value) == 1 else value
    return value


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raise ValueError where a network would draw noise of its own."""
    from diffusers import DiffusionPipeline  # here, so that importing steering imports no models

    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"steer() got a {type(pipe).__name__}; pass a diffusers pipeline, such as "
            "DiffusionPipeline.from_pretrained(...) returns."
        )
    refuse_unsteerable(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(map(_drops_out, part.modules())):
            raise ValueError(
                f"pipe.{name} is in training mode, where dropout draws noise of its own; "
                f"call pipe.{name}.eval() first."
            )


def _drops_out(module: torch.nn.Module) -> bool:
    # not `training` alone: wrappers and LoRA layers are made in training mode and left there
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def check_preview(pipe: Any, preview: Any) -> None:
    """Raise ValueError where `preview` cannot decode the pipeline's latents, or to another size."""
    if preview is None:
        return
    if not isinstance(preview, torch.nn.Module) or not hasattr(preview, "decode"):
        raise ValueError(
            f"preview= is a {type(preview).__name__}; pass a decoder, such as "
            "AutoencoderTiny.from_pretrained(...) returns, or none."
        )
    own = getattr(pipe, "vae", None)
    if own is None:
        raise ValueError(f"{type(pipe).__name__} has no vae that preview= could stand in for.")
    ours, theirs = _traits(own), _traits(preview)
    for what in ours:
        if None not in (ours[what], theirs[what]) and ours[what] != theirs[what]:
            raise ValueError(
                f"preview= decodes latents of {theirs[what]} {what} but this pipeline's have "
                f"{ours[what]}; pass the AutoencoderTiny that was trained for its decoder, or none."
            )
    dtypes = {part.dtype for part in (own, *networks(pipe).values())}
    if getattr(preview, "dtype", own.dtype) not in dtypes:
        raise ValueError(
            f"preview= is {preview.dtype} but this pipeline is {own.dtype}; pass "
            f"preview.to({own.dtype})."
        )


def _traits(vae: Any) -> dict[str, int | None]:
    """What two decoders of the same latents share, where it is known."""
    config = getattr(vae, "config", {})
    for name in ("decoder_block_out_channels", "block_out_channels"):
        if config.get(name):
            scale = config.get("upsampling_scaling_factor", 2) ** (len(config[name]) - 1)
            break
    else:
        scale = None
    return {"channels": config.get("latent_channels"), "pixels a side": scale}


def _hint(name: str, known: Sequence[str]) -> str:
    """What a keyword that nobody knows was probably meant to be; empty where nothing is near."""
    fields = [field.name for field in dataclasses.fields(FeynmanKac)]
    near = difflib.get_close_matches(name, [*known, *fields], n=1)
    if not near:
        return ""
    if near[0] in fields:
        field = near[0]
        return f"{field} is a field of FeynmanKac: settings=FeynmanKac({field}=...)."
    return f"did you mean {near[0]}=?"
