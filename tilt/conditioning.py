"""The conditioning of the prompts of an online training, and whether it has guidance."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from finetune.conditioning import Conditioning
from finetune.recording import Recorder
from finetune.stored import stored
from steering.manifest import fingerprint

__all__ = ["check_call", "conditioning_of", "recorder_of"]


def check_call(settings: Any) -> None:
    """Raise ValueError for keywords of the pipeline's call that sampling would ignore."""
    own = {name: f"{settings.method}.{name}" for name in ("guidance_scale", "num_inference_steps")}
    own |= {"negative_prompt": "negative_prompt"}
    for name in settings.call:
        if name in own:
            raise ValueError(f"call.{name} has no effect in training; set {own[name]}= instead")


def recorder_of(settings: Any, pipe: Any, call: dict[str, Any], device: torch.device) -> Recorder:
    """Return what encodes prompts, with guidance if its scale is above 1; moves the encoders.

    The scale is the method's guidance_scale, or for pipelines with a true_cfg_scale that of the
    call. Raises ValueError for a scale or a negative prompt that would have no effect.
    """
    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            encoder.to(device)
    kind, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    apart, own = "true_cfg_scale" in known, f"{settings.method}.guidance_scale"
    scale, negative = settings.tuned.guidance_scale, settings.negative_prompt
    given = {} if scale is None else {"guidance_scale": scale}
    given |= {"negative_prompt": negative} if negative else {}
    for name in given:
        if name not in known:
            setting = own if name == "guidance_scale" else name
            raise ValueError(f"{kind} takes no {name}; leave {setting} out")
    strength = call.get("true_cfg_scale") if apart else scale
    found = Recorder(pipe, call | given, guided=strength is not None and strength > 1)
    if apart:
        _check_apart(own, scale, negative, found)
    elif scale == 1 and not found.embedded and found.call["guidance_scale"] != 1:
        raise ValueError(
            f"{own} is 1, with which {kind} still has guidance; set it above 1, or leave it out "
            "for none"
        )
    if negative and not (found.guided and (apart or not found.embedded)):
        name = "call.true_cfg_scale" if apart else own
        raise ValueError(
            f"negative_prompt is {negative!r} but has no effect without guidance; set {name} above "
            "1, or leave it out"
        )
    return found


def _check_apart(own: str, scale: float | None, negative: str, found: Recorder) -> None:
    """Raise ValueError for guidance without effect where a true_cfg_scale sets it."""
    if scale is not None and not found.embedded:
        raise ValueError(
            f"{own} is {scale} but has no effect on {found.kind.__name__}; set call.true_cfg_scale "
            "and negative_prompt, or leave it out"
        )
    if found.guided and not negative:
        raise ValueError(
            f"call.true_cfg_scale is {found.call['true_cfg_scale']} and needs a negative prompt, "
            "which may be a space; set negative_prompt, or leave call.true_cfg_scale out"
        )


def conditioning_of(
    folder: Path, recorder: Recorder, prompts: list[str], accelerator: Any
) -> Conditioning:
    """Return the conditioning of prompts, which all processes map from a folder (`stored`).

    A resumed run takes what is there if prompts, call and weights are the same.
    """
    parts = recorder.pipe.components.items()
    weights = {n: fingerprint(part) for n, part in parts if isinstance(part, torch.nn.Module)}
    made_of = json.dumps([recorder.kind.__name__, recorder.call, recorder.guided, weights])
    return stored(folder, recorder.record, prompts, made_of, accelerator)
