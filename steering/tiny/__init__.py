"""The embedded models: real diffusers pipelines of a few million parameters, for demos."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

__all__ = ["NAMES", "call_defaults", "load", "preview"]

FOLDER = Path(__file__).parent
NAMES = ("tiny-sd3", "tiny-sd")
# The stock SD3 call appends 256 T5 tokens, which are zeros here and which the tiny transformer was
# trained to ignore. Keeping only one gives the same images in a third of the time.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny-sd3": {"num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": 1},
    "tiny-sd": {"num_inference_steps": 20, "guidance_scale": 2.0},
}


def load(name: str, **options: Any) -> Any:
    """Load the embedded pipeline `name` ("tiny-sd3" or "tiny-sd"), float32 on the CPU.

    Same as `DiffusionPipeline.from_pretrained(folder, **options)`; ValueError for other names.
    """
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(_folder(name)), local_files_only=True, **options)


def preview() -> Any:
    """Load the AutoencoderTiny that decodes both pipelines' latents, for scores during a run."""
    import torch
    from diffusers import AutoencoderTiny

    decoder: Any = AutoencoderTiny.from_pretrained(str(FOLDER / "preview"), local_files_only=True)
    return decoder.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def call_defaults(name: str) -> dict[str, Any]:
    """Return keywords of the pipeline's call that suit the embedded model `name`."""
    _folder(name)
    return dict(_DEFAULTS[name])


def _folder(name: str) -> Path:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.3)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"no embedded model {name!r}{hint}: it is one of {', '.join(NAMES)}")
    return FOLDER / name
