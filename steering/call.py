"""Check the keywords of a pipeline's own call, and distribute them over its prompts."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.modules.dropout import _DropoutNd

from steering.arguments import MOST_FRAMES, MOST_PIXELS, MOST_STEPS, check_count
from steering.frames import Frames
from steering.keywords import SUNG, check_keywords, is_per_prompt
from steering.networks import networks
from steering.refusals import refuse_unsteerable
from steering.settings import FeynmanKac

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "COUNTS_OF_FRAMES",
    "WAYS",
    "PipelineCall",
    "check_frames",
    "check_pipeline",
    "check_preview",
    "frames_of",
    "refuse_videos",
]

_CLASHES = {
    "prompt": "pass the prompts as steer()'s second argument",
    "num_images_per_prompt": "pass particles= instead",
    "num_videos_per_prompt": "pass particles= instead",
    "num_waveforms_per_prompt": "pass particles= instead",
    "generator": "pass seed= instead",
    "latents": "each particle starts from the noise of its own generator; pass seed= instead",
    "output_type": "images are returned as PIL images, latents as Steered.latents",
    "return_dict": "a Steered is returned",
    "eta": "pass FeynmanKac(noise=...) instead",
    "denoising_end": "the filter needs the run to finish; leave it out",
    "padding_mask_crop": "crop the image and the mask yourself",
}
# keywords whose str is one text for all prompts; other keywords with "prompt" in their name differ
_TEXTS = re.compile(r"(negative_)?prompt(_\d+)?")
_PICTURES = re.compile(r"image|video|audio|frames|mask|control|condition")
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
COUNTS_OF_FRAMES = ("num_frames", "frames", "video_length")  # SanaVideo and Latte have others
WAYS = ("count", "texts", "pictures")  # to request rows: by a count, or by repeating these


@dataclass(frozen=True)
class PipelineCall:
    """The checked keywords of a pipeline's call.

    `check` raises ValueError for a keyword that is unknown or that steer() sets itself.
    """

    keywords: dict[str, Any]
    defaults: dict[str, Any]  # for every named parameter of the pipeline's call
    prompts: tuple[str, ...]

    @staticmethod
    def check(
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        keywords: dict[str, Any],
        ours: Sequence[str] = (),
    ) -> PipelineCall:
        """Check `keywords`; ours: the names of steer()'s arguments, for hints on misspellings."""
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
        several = (("controlnet", "nets"), ("adapter", "adapters"))  # which take one image each
        if not any(hasattr(getattr(pipe, part, None), inner) for part, inner in several):
            call._check_pictures()
        return call

    def value(self, name: str) -> Any:
        """Return the value that the pipeline gets for `name`; None if it has no such parameter."""
        default = self.defaults.get(name)
        return self.keywords.get(name, None if default is inspect.Parameter.empty else default)

    def num_steps(self) -> tuple[int, ...]:
        """Return the possible numbers of executed steps; () if they are unknown before the run.

        With `strength`, some pipelines round the number down (SD) and some round it up (SD3).
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
                    f"{name}= holds different images, which a pipeline assigns to the particles "
                    "in turn; steer the prompts of each image in a separate call."
                )

    def _check_sizes(self) -> None:
        if self.value("num_inference_steps") is not None:
            check_count("num_inference_steps", self.value("num_inference_steps"), MOST_STEPS)
        sizes = {"height": MOST_PIXELS, "width": MOST_PIXELS}
        for name, most in (sizes | dict.fromkeys(COUNTS_OF_FRAMES, MOST_FRAMES)).items():
            if self.keywords.get(name) is not None:
                check_count(name, self.keywords[name], most)

    def pictures(self) -> list[str]:
        """Return the keywords that hold images, which a pipeline may encode with per-row noise."""
        return [
            name
            for name, value in self.keywords.items()
            if _PICTURES.search(name) and "prompt" not in name and not _is_plain(value)
        ]

    def reference(self, name: str) -> Any:
        """Return the image of this keyword, or the list of its images if they differ."""
        images = self.pictures()
        if name not in images:
            held = f"this call's are {images}" if images else "this call has none"
            raise ValueError(
                f"references={name!r:.80}: pass a list, one entry per prompt, or the name of a "
                f"keyword that holds an image; {held}."
            )
        value = self.keywords[name]
        several = list(value) if isinstance(value, list | tuple) else [value]
        return several[0] if all(one is several[0] for one in several) else several

    def check_packing(self, prompts_per_call: int) -> None:
        images = self.pictures()
        if prompts_per_call > 1 and images:
            raise ValueError(
                f"prompts_per_call={prompts_per_call} with {images[0]}=: pipelines pair several "
                "prompts and images in different orders; leave prompts_per_call at 1."
            )

    def check_spread(self) -> None:
        images = self.pictures()
        if images:
            raise ValueError(
                f"spread= with {images[0]}=: pipelines encode it with the noise of the first "
                "particle, which only one of the processes holds; leave spread= out."
            )

    def for_prompts(
        self, indices: Sequence[int], k: int, generators: list[Generator], way: int = 0
    ) -> dict[str, Any]:
        """Return the keywords of the call that makes k particles for each of these prompts.

        way: index into `WAYS`. Some pipelines ignore their own count, and some of those also need
        one image per row.
        """
        call = dict(self.keywords)
        count = next((name for name in COUNTS if name in self.defaults), None)
        # Several prompts are repeated here, since some pipelines (Sana, PixArt) repeat their
        # attention masks in another order than their embeddings. So are embeddings, which SD3 does
        # not repeat.
        written_out = way > 0 or count is None or len(indices) > 1 or "prompt_embeds" in call
        rows = [i for i in indices for _ in range(k)] if written_out else list(indices)
        for name in self._per_prompt():
            call[name] = self._deal(self.value(name), rows)
        if "prompt_embeds" not in call:
            call["prompt"] = self._deal(list(self.prompts), rows)
        if WAYS[way] == "pictures":
            call |= {name: _a_row(name, value, len(rows)) for name, value in call.items()}
        if count:
            call[count] = 1 if written_out else k
        return call | {"generator": generators, "return_dict": False}

    def resized(self, num: int, to: int) -> PipelineCall:
        """Return the call with every image that is listed `num` times listed `to` times instead."""
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
        """Return a call of prompt `index` and a shorter text, equal in everything else."""
        text = self.prompts[index]
        # Dropping the first word adds no padding; the last word may be truncated in both.
        shorter = " ".join(text.split()[1:]) if text.strip() else "a"
        keywords = dict(self.keywords)
        for name in self._per_prompt():
            keywords[name] = self._deal(self.value(name), [index, index])
        embeds = keywords.get("prompt_embeds")
        if isinstance(embeds, Tensor):
            keywords["prompt_embeds"] = torch.stack([embeds[0], embeds[1] * 0.5])
        elif isinstance(embeds, list) and isinstance(embeds[1], Tensor):
            keywords["prompt_embeds"] = [embeds[0], embeds[1] * 0.5]
        return dataclasses.replace(self, keywords=keywords, prompts=(text, shorter))

    def _per_prompt(self) -> list[str]:
        sung = [name for name in SUNG if isinstance(self.value(name), str)]
        return sung + [
            name
            for name, value in self.keywords.items()
            if (is_per_prompt(name) and isinstance(value, list | Tensor))
            or (_TEXTS.fullmatch(name) and isinstance(value, str))
        ]

    def _check_length(self, name: str) -> None:
        value, b = self.value(name), len(self.prompts)
        if not isinstance(value, str) and len(value) not in (1, b):
            raise ValueError(
                f"{name}= has {len(value)} entries for {b} prompts; pass one, or one per prompt."
            )

    @staticmethod
    def _deal(value: Any, rows: list[int]) -> Any:
        if isinstance(value, Tensor):
            return value[torch.tensor(rows) if len(value) > 1 else [0] * len(rows)]
        if isinstance(value, str):
            value = [value]
        dealt = [value[i if len(value) > 1 else 0] for i in rows]
        # a pipeline requires its prompts to be of one type, all str or all lists
        return dealt[0] if len(dealt) == 1 and isinstance(dealt[0], str) else dealt


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a number, str, bool or None, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, str | int | float | type(None)) for one in values)


def _a_row(name: str, value: Any, rows: int) -> Any:
    """Repeat an image or a video once per row; return anything else as it is."""
    if isinstance(value, Image.Image):
        return [value] * rows
    if isinstance(value, Tensor) and value.ndim >= 3 and len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        if "video" in name:
            return [value] * rows
        return value * rows if len(value) == 1 else value
    return value


def check_pipeline(pipe: DiffusionPipeline, decodes: bool = False) -> None:
    """Raise ValueError for a pipeline that cannot be steered, or with active dropout.

    decodes: whether decode= was given.
    """
    from diffusers import DiffusionPipeline  # here, so that importing steering imports no models

    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"steer() got a {type(pipe).__name__}; pass a diffusers pipeline, such as one that "
            "DiffusionPipeline.from_pretrained(...) returns."
        )
    refuse_unsteerable(pipe, decodes)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(map(_drops_out, part.modules())):
            raise ValueError(
                f"pipe.{name} is in training mode, in which its dropout draws noise; "
                f"call pipe.{name}.eval() first."
            )


def _drops_out(module: torch.nn.Module) -> bool:
    # `training` alone does not show it: wrappers and LoRA layers stay in training mode
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def frames_of(kind: type, keywords: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the name and the value of the number of frames that a call of a class asks for.

    The value is 1 for images; None, the default of CogVideoX, means as many as its network was
    trained on.
    """
    parameters = inspect.signature(kind.__call__).parameters
    for name in COUNTS_OF_FRAMES:
        if name in parameters:
            return name, keywords.get(name, parameters[name].default)
    return "", 1


def check_frames(frames: Frames, kind: type, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError if it is known that a call of a class does not generate these frames."""
    _, number = frames_of(kind, keywords)
    if number is not None:
        frames.check(None if number == 1 else number)


def refuse_videos(kind: type, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError if a call of a class generates several frames per row."""
    name, frames = frames_of(kind, keywords)
    if frames != 1:
        raise ValueError(
            f"{name}={frames!r:.80}: this call generates videos, but images are needed here; pass "
            f"{name}=1."
        )


def check_preview(pipe: Any, preview: Any) -> None:
    """Raise ValueError if `preview` cannot decode the pipeline's latents to the right size."""
    if preview is None:
        return
    if not isinstance(preview, torch.nn.Module) or not hasattr(preview, "decode"):
        raise ValueError(
            f"preview= is a {type(preview).__name__}; pass a decoder, such as the one that "
            "AutoencoderTiny.from_pretrained(...) returns, or None."
        )
    own = getattr(pipe, "vae", None)
    if own is None:
        raise ValueError(f"{type(pipe).__name__} has no vae that preview= could replace.")
    ours, theirs = _traits(own), _traits(preview)
    for what in ours:
        if None not in (ours[what], theirs[what]) and ours[what] != theirs[what]:
            raise ValueError(
                f"preview= decodes latents of {theirs[what]} {what} but this pipeline's have "
                f"{ours[what]}; pass the AutoencoderTiny that was trained for its decoder, or None."
            )
    dtypes = {part.dtype for part in (own, *networks(pipe).values())}
    if getattr(preview, "dtype", own.dtype) not in dtypes:
        raise ValueError(
            f"preview= is {preview.dtype} but this pipeline is {own.dtype}; pass "
            f"preview.to({own.dtype})."
        )


def _traits(vae: Any) -> dict[str, int | None]:
    """Return the traits that all decoders of the same latents share; None where unknown."""
    config = getattr(vae, "config", {})
    for name in ("decoder_block_out_channels", "block_out_channels"):
        if config.get(name):
            scale = config.get("upsampling_scaling_factor", 2) ** (len(config[name]) - 1)
            break
    else:
        scale = None
    return {"channels": config.get("latent_channels"), "pixels per side": scale}


def _hint(name: str, known: Sequence[str]) -> str:
    """Return a hint on what an unknown keyword was probably meant to be, or ""."""
    fields = [field.name for field in dataclasses.fields(FeynmanKac)]
    if name in COUNTS_OF_FRAMES:
        other = next((count for count in COUNTS_OF_FRAMES if count in known), None)
        return f"did you mean {other}=?" if other else "it generates no videos."
    near = difflib.get_close_matches(name, [*known, *fields], n=1)
    if not near:
        return ""
    if near[0] in fields:
        field = near[0]
        return f"{field} is a field of FeynmanKac: settings=FeynmanKac({field}=...)."
    return f"did you mean {near[0]}=?"
