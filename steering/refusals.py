"""Checks that refuse pipelines which steer() cannot steer, each with one sentence."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["refuse_unsteerable"]

_SOUND = re.compile("audio|sound")
_DRAW = ("unet", "transformer", "decoder", "image_unet")


def refuse_unsteerable(pipe: DiffusionPipeline) -> None:
    """Raise ValueError if steering the scheduler's latents would not steer the image."""
    from diffusers import DiffusionPipeline

    kind = type(pipe).__name__
    inner = [name for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)]
    if inner:
        raise ValueError(
            f"{kind} runs other pipelines ({', '.join(inner)}), whose schedulers steer() cannot "
            "replace, so nothing would be steered; steer the one that draws the image."
        )
    parts = inspect.signature(type(pipe).__init__).parameters
    keywords = inspect.signature(type(pipe).__call__).parameters
    if "Audio" in kind or any(_SOUND.search(name) for name in (*parts, *keywords)):
        raise ValueError(
            f"{kind} generates sound, which rewards cannot score and the filter would not "
            "resample; use a pipeline that generates only images."
        )
    if not any(name in parts for name in _DRAW):
        raise ValueError(
            f"{kind} generates no images (it has none of {', '.join(_DRAW)}), so there is nothing "
            "to score; steer the pipeline that uses its output."
        )
    if "original_inference_steps" in keywords:
        raise ValueError(
            f"{kind} sets its timesteps by original_inference_steps=, which DDIM and Euler do not "
            "support; steer StableDiffusionPipeline, or its image-to-image, with its components."
        )
    if "causal_block_size" in keywords:
        raise ValueError(
            f"{kind} gives each frame its own timestep and scheduler, which the filter cannot "
            "weigh; use a pipeline with one timestep per step."
        )
    _refuse_learned_variance(pipe)


def _refuse_learned_variance(pipe: Any) -> None:
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    if config.get("variance_type") in ("learned", "learned_range"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} takes its variance from the network "
            f"(variance_type={config['variance_type']!r}), but the filter needs to know it "
            "before the step; set pipe.scheduler to one with a fixed variance."
        )
