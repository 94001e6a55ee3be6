"""What it takes to repeat a run: settings, seeds, versions, model, reward."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from steering.settings import FeynmanKac

__all__ = ["describe"]

_PACKAGES = ("tilt-diffusion", "torch", "diffusers", "transformers")


def describe(
    pipe: DiffusionPipeline,
    settings: FeynmanKac,
    keywords: dict[str, Any],
    preview: Any = None,
    **run: Any,
) -> dict[str, Any]:
    """A manifest of JSON values; `run` holds the rest of steer()'s arguments."""
    return {
        "model": pipe.config.get("_name_or_path") or None,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "adapters": _adapters(pipe),
        "settings": _jsonable(dataclasses.asdict(settings)),
        **_jsonable(run),
        "preview": None if preview is None else _source(preview),
        "pipeline_keywords": _jsonable(keywords),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
    }


def _source(model: Any) -> str:
    return model.config.get("_name_or_path") or type(model).__name__


def _adapters(pipe: Any) -> list[str]:
    """The LoRAs in use, where the pipeline can have any."""
    try:
        return list(pipe.get_active_adapters())
    except (AttributeError, ValueError):  # no LoRA for this pipeline, or no peft
        return []


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = None
    return found


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, Image.Image):
        return f"image {value.size} sha256 {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return repr(value)
