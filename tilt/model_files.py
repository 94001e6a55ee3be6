"""What the folder of a pipeline, or its repository on the hub, holds, before weights are loaded."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steering.attention import shield
from steering.hub import one_sentence

__all__ = ["files_of", "index_of", "variant_of"]

# a part's file of weights; a variant stands before or after the number of the shard
_WEIGHTS = re.compile(
    r"(\w+)/(?:diffusion_pytorch_model|pytorch_model|model)(\.\w+?)?(?:-\d{5}-of-\d{5})?(\.\w+)?"
    r"\.(?:safetensors|bin)"
)


def index_of(name: str, path: str, offline: bool) -> Any:
    """Return the model_index.json of a pipeline.

    Raises ValueError if a package is missing without which the libraries lack one of its classes.
    """
    shield()
    with one_sentence(f"the model {name}", path, offline):
        import diffusers
        import transformers

        index: Any = diffusers.DiffusionPipeline.load_config(path, local_files_only=offline)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = [about for about in index.values() if isinstance(about, list) and len(about) == 2]
    missing: dict[str, None] = {}
    for library, kind in [("diffusers", index.get("_class_name")), *parts]:
        source: Any = libraries.get(library)
        with warnings.catch_warnings(action="ignore"):  # Kolors is imported with torch.jit.script
            needed = getattr(getattr(source, str(kind), None), "_backends", ())
        for package in needed:
            if not getattr(source.utils, f"is_{package}_available", lambda: True)():
                missing[package] = None
    if missing:
        names = " ".join(missing)
        raise ValueError(
            f"the model {name} needs {names}, which is not installed: pip install {names}"
        )
    return index


def variant_of(index: Mapping[str, Any], files: Iterable[str]) -> str | None:
    """Return the variant to load, None unless a part has no other weights (Kolors: fp16).

    It holds for all parts, so those that have both load it as well. Raises ValueError if there are
    several.
    """
    found: dict[str, set[str]] = {}
    for file in files:
        match = _WEIGHTS.fullmatch(file)
        if match is not None and (index.get(match[1]) or [None])[0]:
            found.setdefault(match[1], set()).add((match[2] or match[3] or "").lstrip("."))
    without = [variants for variants in found.values() if "" not in variants]
    common = sorted(set.intersection(*without)) if without else []
    if len(common) > 1:
        raise ValueError(
            f"it has weights in the variants {', '.join(common)} alone; give a folder with one of "
            "them"
        )
    return common[0] if common else None


def files_of(path: str, offline: bool) -> list[str]:
    """Return the names of a pipeline's files; of a hub id without a connection, those kept here."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if os.path.isdir(path):
        folder = Path(path)
    elif not offline:
        return [file.rfilename for file in HfApi().model_info(path, timeout=10).siblings or []]
    else:
        kept = try_to_load_from_cache(path, "model_index.json")
        if not isinstance(kept, str):
            return []
        folder = Path(kept).parent
    return [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]
