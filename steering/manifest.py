"""The manifest of a run, with what repeats it: settings, seed, versions, model, reward.

The noise of a particle depends only on the seed, its prompt's text, how often that text came before
and its index (`steering.generators`). So one prompt can be repeated without the others of its run:
pass steer_each() the text `occurrence + 1` times, with `only=[occurrence]`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steering.keywords import is_per_prompt
from steering.settings import FeynmanKac

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["PER_PROMPT", "describe", "fingerprint", "join", "select", "versions"]

PER_PROMPT = ("prompts", "occurrences", "references")  # lists with one entry per prompt
_PACKAGES = (
    "tilt-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors",
    "open_clip_torch", "rapidocr", "onnxruntime", "Pillow", "torchao",
    "bitsandbytes",
)  # fmt: skip
_SAMPLE = 256  # number of values per tensor that a fingerprint reads


def describe(
    pipe: DiffusionPipeline,
    settings: FeynmanKac,
    keywords: dict[str, Any],
    keys: Sequence[tuple[str, int]],
    references: Sequence[Any] | None = None,
    preview: Any = None,
    **run: Any,
) -> dict[str, Any]:
    """Return the manifest of a whole run, of JSON values; `select` restricts it to some prompts.

    keys: every prompt's text, and how often it came before; references: None or one per prompt;
    run: the other arguments of steer(). This reads the weights, so call it once per run.
    """
    modules = {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weighed = modules if preview is None else modules | {"preview": preview}
    return {
        "prompts": [text for text, _ in keys],
        "occurrences": [before for _, before in keys],
        "references": None if references is None else [_jsonable(item) for item in references],
        "model": pipe.config.get("_name_or_path") or None,
        "pipeline": type(pipe).__name__,
        "weights": {name: fingerprint(module) for name, module in weighed.items()},
        "adapters": [entry for n, module in modules.items() for entry in _adapters(n, module)],
        "attention": {n: found for n, module in modules.items() if (found := _attention(module))},
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": _config(pipe.scheduler),
        "settings": _jsonable(dataclasses.asdict(settings)),
        **_jsonable(run),
        "preview": None if preview is None else _source(preview),
        "pipeline_keywords": {name: _keyword(name, value) for name, value in keywords.items()},
        "device": str(pipe._execution_device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def select(manifest: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Return the manifest of only the prompts with these indices."""
    b = len(manifest["prompts"])

    def chosen(values: Any) -> Any:
        return None if values is None else [values[i] for i in indices]

    keywords = {
        name: chosen(value) if _is_dealt(name, value, b) else value
        for name, value in manifest["pipeline_keywords"].items()
    }
    own = {name: chosen(manifest[name]) for name in PER_PROMPT}
    return manifest | own | {"pipeline_keywords": keywords}


def join(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the manifests of several parts of a run; halvings is their maximum."""
    first = manifests[0]
    sizes = [len(part["prompts"]) for part in manifests]

    def chained(lists: Sequence[Any]) -> Any:
        return None if lists[0] is None else [value for values in lists for value in values]

    keywords = {}
    for name, value in first["pipeline_keywords"].items():
        values = [part["pipeline_keywords"][name] for part in manifests]
        dealt = all(_is_dealt(name, v, b) for v, b in zip(values, sizes, strict=True))
        keywords[name] = chained(values) if dealt else value
    together = {name: chained([part[name] for part in manifests]) for name in PER_PROMPT}
    halvings = max(part["halvings"] for part in manifests)
    return first | together | {"pipeline_keywords": keywords, "halvings": halvings}


def fingerprint(module: torch.nn.Module) -> str:
    """Return 16 hex digits that differ if the weights of a module do, its LoRAs included.

    They are a sha256 of the name, shape, dtype and a sample of the values of every entry of the
    state dict. Tensors on the meta device, as under sequential offload, have no values to read.
    """
    module = getattr(module, "_orig_mod", module)  # unwrap torch.compile()
    entries = module.state_dict().items()
    named = [(name, value) for name, value in entries if isinstance(value, Tensor)]
    with torch.no_grad():
        samples = [_sample(value) for _, value in named]
    values, digest = _read(samples), hashlib.sha256()
    for (name, value), sample in zip(named, samples, strict=True):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        for _ in sample:
            digest.update(next(values))
    return digest.hexdigest()[:16]


def _sample(tensor: Tensor) -> list[Tensor]:
    """Return a sample of the values, on their device."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:  # a tensor subclass: a quantised weight, or a shard
        parts = (getattr(tensor, name) for name in inner()[0])
        return [p for part in parts if isinstance(part, Tensor) for p in _sample(part)]
    if tensor.is_meta:
        return []
    # odd, so that it reaches every column of a matrix whose width is a power of two
    stride = -(-tensor.numel() // _SAMPLE) | 1
    if tensor.is_contiguous():
        return [tensor.view(-1)[::stride]]
    which = torch.arange(0, tensor.numel(), stride, device=tensor.device)  # avoids a full copy
    return [tensor[torch.unravel_index(which, tensor.shape)]]


def _read(samples: list[list[Tensor]]) -> Iterator[memoryview]:
    """Yield the bytes of each part, in order, with one device copy per device and dtype."""
    parts = [part for sample in samples for part in sample]
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in parts:
        together.setdefault((part.device, part.dtype), []).append(part)
    read = {key: memoryview(_bytes(torch.cat(same))) for key, same in together.items()}
    for part in parts:
        key, size = (part.device, part.dtype), part.numel() * part.element_size()
        yield read[key][:size]
        read[key] = read[key][size:]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return b"" if tensor.is_meta else _as_bytes(tensor.detach().cpu()).numpy().tobytes()


def _adapters(component: str, module: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the active LoRAs with their scales: one number, or a sorted list if layers differ."""
    scales: dict[str, set[float]] = {}
    for layer in module.modules():
        scaling = getattr(layer, "scaling", None)  # of peft's layers; weight * alpha / rank
        if isinstance(scaling, dict) and not getattr(layer, "disable_adapters", False):
            for name in getattr(layer, "active_adapters", ()):
                if name in scaling:
                    scales.setdefault(name, set()).add(float(scaling[name]))
    return [
        {"name": name, "component": component, "scale": min(s) if len(s) == 1 else sorted(s)}
        for name, s in scales.items()
    ]


def _attention(module: torch.nn.Module) -> list[str]:
    """Return the attention processors of a diffusers module, or transformers' implementation."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    found = set()
    for layer in module.modules():
        processor = getattr(layer, "processor", None)
        if processor is not None:
            name = type(processor).__name__
            if hasattr(processor, "_attention_backend"):  # None means the global backend
                own = processor._attention_backend
                backend = own or _AttentionBackendRegistry.get_active_backend()[0]
                name += f" {getattr(backend, 'value', backend)}"
            found.add(name)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return sorted(found) or ([implementation] if implementation else [])


def _config(scheduler: Any) -> dict[str, Any]:
    public = {name: v for name, v in scheduler.config.items() if not name.startswith("_")}
    return _jsonable(public)


def _source(model: Any) -> str:
    return model.config.get("_name_or_path") or type(model).__name__


def _keyword(name: str, value: Any) -> Any:
    """Return the JSON value of a keyword; prompt embeddings are described row by row."""
    if "prompt" in name and isinstance(value, Tensor):
        return [_jsonable(row) for row in value]
    return _jsonable(value)


def _is_dealt(name: str, value: Any, b: int) -> bool:
    """Return whether a keyword of the pipeline has one entry for each of b prompts."""
    return is_per_prompt(name) and isinstance(value, list) and len(value) == b


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the images, as a new dict."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Look up the versions once, skipping packages that are not installed.

    A checkout of this package need not be installed either.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no infinity
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {_digest(_bytes(value))}"
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype} {_digest(value.tobytes())}"
    if isinstance(value, Image.Image):
        return f"image {value.size} {_digest(value.tobytes())}"
    return repr(value)


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
