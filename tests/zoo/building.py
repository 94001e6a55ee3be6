"""A small pipeline of any class, and the keywords of a call that suits it."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from zoo.parts import build

__all__ = ["Animal", "call_of", "half_mask", "picture", "pipeline_of", "squashed"]

_NONE = {"safety_checker", "feature_extractor", "watermarker", "image_encoder", "image_processor"}
_WANTED = re.compile(r"(text_encoder|tokenizer)(_\d)?|transformer|vae|unet|scheduler")
_TOKENIZER_OF = {
    "CLIP": "CLIPTokenizer",
    "T5Gemma": "GemmaTokenizer",
    "T5": "T5Tokenizer",
    "UMT5": "T5Tokenizer",
    "Gemma": "GemmaTokenizer",
    "Llama": "LlamaTokenizer",
    "Bert": "BertTokenizer",
}


@dataclass(frozen=True)
class Animal:
    """What one class needs besides what follows from its signatures.

    `parts`: slot -> class name, or changes to the config, or both as (name, changes), or None;
    `more`: other arguments of its constructor; `call`: keywords of its call, None leaves one out;
    `steer`: arguments of steer(); `attributes`: set on the made pipeline; `patches`: names in its
    module that are replaced.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)
    steer: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, str] = ("a red cube", "two dots")


def squashed(latents: torch.Tensor) -> torch.Tensor:
    """A picture (n, 3, 2, 2) of any latents, for videos and decoders that cannot be called."""
    return latents.float().flatten(1)[:, :12].unflatten(1, (3, 2, 2)).sigmoid()


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy())


def half_mask(size: int = 16) -> Image.Image:
    return Image.fromarray(
        np.repeat(np.arange(size)[None] * 2 >= size, size, 0).astype("uint8") * 255
    )


# keyword -> value, wherever a call has it
_CALL: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 6,
    "guidance_scale": 4.0,
    "true_cfg_scale": 3.0,
    "negative_prompt": "blue",
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "num_frames": 1,
    "video_length": 1,
    "frames": 1,
    "strength": 0.7,
    "mask_image": half_mask(),
    "control_mask": half_mask(),
    "conditioning_frames": [picture(1)],
    "control_video": [picture(1)],
    "video": [picture()],
    "control_image": picture(1),
}
_WITH_IMAGE = re.compile(
    r"Img2Img|I2I|I2V|ImageToVideo|Inpaint|Edit|Pix2Pix|Kontext|Fill|Adapter|Depth2|Upscale"
)


_WITH_VIDEO = re.compile(r"VideoToVideo|V2V")
_ABSENT = inspect.Parameter("video", inspect.Parameter.KEYWORD_ONLY, default=None)


def pipeline_of(name: str, animal: Animal) -> Any:
    """A small pipeline of the class `name` that prints no progress."""
    cls = getattr(diffusers, name)
    made = cls(**_components(cls, animal), **animal.more)
    for key, value in animal.attributes.items():
        setattr(made, key, value)
    for key, value in animal.patches.items():
        setattr(sys.modules[cls.__module__], key, value)
    made.set_progress_bar_config(disable=True)
    return made


def call_of(name: str, animal: Animal) -> dict[str, Any]:
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    call = {key: value for key, value in _CALL.items() if key in known}
    if "image" in known and (_WITH_IMAGE.search(name) or known["image"].default is inspect._empty):
        call["image"] = picture()
    if not (_WITH_VIDEO.search(name) or known.get("video", _ABSENT).default is inspect._empty):
        call.pop("video", None)
    call |= animal.call
    return {key: value for key, value in call.items() if value is not None or key in _CALL}


def _components(cls: type, animal: Animal) -> dict[str, Any]:
    made: dict[str, Any] = {}
    slots = inspect.signature(cls.__init__).parameters
    kinds = {slot: _kind(p.annotation) for slot, p in slots.items() if slot != "self"}
    names = {slot: getattr(kind, "__name__", kind) for slot, kind in kinds.items()}
    for slot, name in names.items():
        optional = slots[slot].default is not inspect.Parameter.empty
        wanted = animal.parts.get(slot, ...)
        if wanted is ... and slot in _NONE:
            wanted = None
        if wanted is ... and optional and not _WANTED.fullmatch(slot):
            continue
        if wanted is None:
            made[slot] = None
            continue
        changes: dict[str, Any] = {}
        if isinstance(wanted, dict):
            changes = wanted
        elif isinstance(wanted, tuple):
            name, changes = wanted
        elif isinstance(wanted, str):
            name = wanted
        if name in ("AutoTokenizer", "PreTrainedTokenizerBase", "T5TokenizerFast"):
            name = _tokenizer(
                made.get(slot.replace("tokenizer", "text_encoder")), slot, names, animal
            )
        if "XL" in cls.__name__ and slot in ("unet", "controlnet"):
            changes = _xl() | changes
        made[slot] = build(name, changes, kinds[slot])
    if "requires_safety_checker" in slots:
        made["requires_safety_checker"] = False
    if "add_watermarker" in slots:
        made["add_watermarker"] = False
    return made


def _xl() -> dict[str, Any]:
    return {
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }


def _tokenizer(encoder: Any, slot: str, names: dict[str, str], animal: Animal) -> str:
    if encoder is not None:
        kind = type(encoder).__name__
    else:
        other = slot.replace("tokenizer", "text_encoder")
        kind = animal.parts.get(other, names.get(other, ""))
        kind = kind[0] if isinstance(kind, tuple) else kind if isinstance(kind, str) else ""
    return next(
        (t for start, t in _TOKENIZER_OF.items() if kind.startswith(start)), "Qwen2Tokenizer"
    )


def _kind(annotation: Any) -> Any:
    """The first class in an annotation, or its name."""
    return next(_kinds(annotation), "")


def _kinds(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, str):
        yield from re.findall(r"[A-Z]\w+", annotation)[:1]
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for part in typing.get_args(annotation):
            yield from _kinds(part)
    elif isinstance(annotation, type) and annotation is not type(None):
        yield annotation
