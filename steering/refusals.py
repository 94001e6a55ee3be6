"""Checks that refuse pipelines which steer() cannot steer, each with one sentence."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["refuse_momentum", "refuse_unsteerable"]

_SOUND = re.compile("audio|sound")
_DRAW = ("unet", "transformer", "decoder", "image_unet")


def refuse_unsteerable(pipe: DiffusionPipeline, decodes: bool = False) -> None:
    """Raise ValueError if steering the scheduler's latents would not steer the image or sound.

    decodes: whether decode= was given, which sounds need.
    """
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
        if "height" in keywords:
            raise ValueError(
                f"{kind} generates sound beside images, with latents of its own that the filter "
                "would not resample; use a pipeline that generates one of them alone."
            )
        if not decodes:
            raise ValueError(
                f"{kind} generates sound; pass steer() decode=, a function from latents to a "
                "pair of waveforms in [-1, 1], (n, channels, samples), and their sampling rate, "
                "and a reward of such waveforms."
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


def refuse_momentum(pipe: DiffusionPipeline, guidance_scale: Any) -> None:
    """Raise ValueError if the call keeps a momentum of guidance where the filter cannot reach it.

    That of a guider follows the particles; ACE-Step's is a variable of its call.
    """
    own = hasattr(sys.modules[type(pipe).__module__], "MomentumBuffer")
    guided = isinstance(guidance_scale, int | float) and guidance_scale > 1
    if own and guided and not getattr(pipe, "is_turbo", False):  # turbo models use no guidance
        raise ValueError(
            f"{type(pipe).__name__} keeps a momentum of its guidance from step to step, which "
            "would not follow the particles that are resampled; pass guidance_scale=1.0, or "
            "FeynmanKac(min_ess=0), which is best-of-k."
        )


def _refuse_learned_variance(pipe: Any) -> None:
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    if config.get("variance_type") in ("learned", "learned_range"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} takes its variance from the network "
            f"(variance_type={config['variance_type']!r}), but the filter needs to know it "
            "before the step; set pipe.scheduler to one with a fixed variance."
        )
