"""Pipelines of published size with random weights: the cost of a step does not depend on values.

They take embeddings in place of prompts, so that no text encoder is needed.
"""

import inspect
from functools import partial
from typing import Any

import diffusers
import torch

from ..tiny.cards import FOLDERS
from .networks import MODELS, decoder_of, filled, network_of, preview_of

__all__ = ["sized"]

# a pipeline's own numbers of steps and guidance
STEPS = {"sd15": (50, 7.5), "sdxl": (50, 5.0), "sd35m": (28, 7.0)}
SCALES = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd35m": (1.5305, 0.0609)}
WITHOUT = {"sd15": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}


def sized(
    name: str, device: torch.device, dtype: torch.dtype, side: int | None = None
) -> tuple[Any, dict[str, Any], Any]:
    """A pipeline of the size of `name`, the keywords of its call for one prompt, its preview.

    side: of the pictures, in pixels; by default the model's own.
    """
    model = MODELS[name]
    side = side or model.side
    parts = (network_of, decoder_of, preview_of)
    network, vae, preview = (filled(partial(part, model), device, dtype) for part in parts)
    factor, shift = SCALES[name]
    vae.register_to_config(scaling_factor=factor, shift_factor=shift or None)
    # tiny-sd has the betas of Stable Diffusion and SDXL
    scheduler: Any = diffusers.DDIMScheduler.from_pretrained(FOLDERS["tiny-sd"] / "scheduler")
    if name == "sd35m":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind = getattr(diffusers, model.family)
    parameters = inspect.signature(kind).parameters.values()
    missing = {part.name: None for part in parameters if part.default is part.empty}  # no encoders
    part = "unet" if "UNet" in model.network else "transformer"
    own = {part: network, "vae": vae, "scheduler": scheduler}
    pipe = kind(**missing | own | WITHOUT.get(name, {}))
    pipe.set_progress_bar_config(disable=True)
    steps, guidance = STEPS[name]
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": side, "width": side}
    return pipe, call | _embeddings(name, device, dtype), preview


def _embeddings(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draws, made = torch.Generator().manual_seed(0), {}
    keys = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    for side in ("", "negative_"):
        for part, key in keys.items():
            if shape := MODELS[name].given.get(part):
                drawn = torch.randn(1, *shape, generator=draws)
                made[f"{side}{key}"] = drawn.to(device, dtype)
    return made
