"""Quantised weights of a frozen base: which parts, by which package, and what that needs.

8bit is torchao's int8 weights with a scale for each row, 4bit is NF4 of bitsandbytes (Dettmers et
al. 2023), both through diffusers. Layers of a LoRA are not quantised.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping
from typing import Any

import torch

from finetune.ranges import one_of
from steering.networks import NETWORKS

__all__ = ["ABOUT_QUANTIZE", "QUANTIZE", "check", "config_of"]

QUANTIZE = one_of("none", "8bit", "4bit")
ABOUT_QUANTIZE = (
    "hold the linear layers of the denoising network, and of text encoders other than CLIP, in 8 "
    "bits (needs torchao) or 4 bits (needs bitsandbytes and a GPU)"
)
_PACKAGES = {"8bit": ("torchao", (0, 15)), "4bit": ("bitsandbytes", (0, 46))}  # oldest versions


def check(quantize: str) -> None:
    """Raise ValueError if what "8bit" or "4bit" needs is missing; "none" needs nothing."""
    if quantize == "none":
        return
    package, oldest = _PACKAGES[quantize]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"quantize is {quantize!r}, which needs {package}: pip install {package}"
        ) from None
    if tuple(int(digits) for digits in version.split(".")[:2]) < oldest:
        raise ValueError(
            f"quantize is {quantize!r}, which needs {package} {'.'.join(map(str, oldest))} or "
            f"later, not {version}: pip install -U {package}"
        )
    if quantize == "4bit" and torch.accelerator.current_accelerator(check_available=True) is None:
        raise ValueError(
            "quantize is '4bit', which diffusers does on a GPU alone, and there is none; set "
            "quantize=8bit"
        )


def config_of(
    quantize: str, dtype: torch.dtype, index: Mapping[str, Any], without: Collection[str] = ()
) -> Any:
    """Return the PipelineQuantizationConfig for a pipeline of this model_index.json.

    dtype: that of the other layers, in which quantised ones compute; without: parts that are not
    loaded. None if there is nothing to quantise. Raises ValueError as `check` does.
    """
    check(quantize)
    if quantize == "none":
        return None
    from diffusers import PipelineQuantizationConfig

    made = {
        part: _made(quantize, library, dtype)
        for part, library in _libraries(index).items()
        if part not in without
    }
    return PipelineQuantizationConfig(quant_mapping=made) if made else None


def _libraries(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the library of each part that is quantised."""
    found = {}
    for part, about in index.items():
        library, kind = about if isinstance(about, list) and len(about) == 2 else (None, None)
        encodes = part.startswith("text_encoder") and not str(kind).startswith("CLIP")
        if library is not None and (part in NETWORKS or encodes):
            found[part] = "transformers" if encodes else library  # kolors has ChatGLM, of theirs
    return found


def _made(quantize: str, library: str, dtype: torch.dtype) -> Any:
    """Return the configuration of one part, which each library takes as a class of its own."""
    import diffusers
    import transformers

    source: Any = transformers if library == "transformers" else diffusers
    if quantize == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

        return source.TorchAoConfig(Int8WeightOnlyConfig())
    return source.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
