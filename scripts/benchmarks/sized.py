"""Pipelines of published size with random weights: what a step costs does not depend on values.

They take embeddings in place of prompts, so that no text encoder is needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from ..tiny.models import SD_NOISE
from .networks import MODELS, decoder_of, filled, network_of, preview_of

__all__ = ["DTYPES", "sized"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a pipeline's own numbers of steps and guidance
STEPS = {"sd15": (50, 7.5), "sdxl": (50, 5.0), "sd35m": (28, 7.0)}
SCALES = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd35m": (1.5305, 0.0609)}


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
    none: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer"))
    kinds: Any = diffusers  # its annotations leave out that parts may be missing
    scheduler: Any
    if name == "sd35m":
        more = {f"{part}_{i}": None for part in none for i in (2, 3)}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe: Any = kinds.StableDiffusion3Pipeline(
            transformer=network, vae=vae, scheduler=scheduler, **none, **more
        )
    else:
        scheduler = kinds.DDIMScheduler(**SD_NOISE)
        if name == "sdxl":
            pipe = kinds.StableDiffusionXLPipeline(
                unet=network,
                vae=vae,
                scheduler=scheduler,
                text_encoder_2=None,
                tokenizer_2=None,
                add_watermarker=False,
                **none,
            )
        else:
            pipe = kinds.StableDiffusionPipeline(
                unet=network,
                vae=vae,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **none,
            )
    pipe.set_progress_bar_config(disable=True)
    steps, guidance = STEPS[name]
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": side, "width": side}
    return pipe, call | _embeddings(name, device, dtype), preview


def _embeddings(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    given = MODELS[name].given

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(1, *shape, generator=draws).to(device, dtype)

    made = {}
    for side in ("", "negative_"):
        made[f"{side}prompt_embeds"] = drawn(given["embeds"])
        if "pooled" in given:
            made[f"{side}pooled_prompt_embeds"] = drawn(given["pooled"])
    return made
