"""Load a LoRA into a pipeline, and refuse one of which only a part fits.

diffusers itself skips tensors that do not fit, and only writes a line to its log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.hub import one_sentence, where
from steering.networks import networks

__all__ = ["check_lora", "load_lora", "unload_lora"]


def check_lora(lora: str | None) -> tuple[str, bool] | None:
    """Return the location of a LoRA, as `hub.where` does, or None; ValueError if it is invalid."""
    if lora is None:
        return None
    if not lora.strip():
        raise ValueError(
            f"the LoRA is {lora!r}: name a folder, a file or a hub id, or leave it out"
        )
    path, offline = where(lora)
    if Path(path).is_dir():
        _check_folder(Path(path), lora)
    return path, offline


def _check_folder(folder: Path, lora: str) -> None:
    files = sorted(f.name for kind in ("safetensors", "bin") for f in folder.glob(f"*.{kind}"))
    known = {"pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"}
    if not files:
        raise ValueError(f"the LoRA {lora} is a folder without weights (.safetensors)")
    if len(files) > 1 and not known.intersection(files):
        raise ValueError(f"the LoRA {lora} holds {', '.join(files[:5])}: name one of these files")


def load_lora(pipe: Any, lora: str) -> None:
    """Load a LoRA of any format that diffusers supports into the pipeline.

    Raises ValueError if the LoRA is missing, is damaged, holds values that are not finite, or holds
    a tensor that matches no layer. (diffusers would silently load only a part of a LoRA of another
    model.)
    """
    found = check_lora(lora)
    if found is None:
        return
    path, offline = found
    if not _has_loader(pipe):
        _load_by_peft(pipe, Path(path), lora)
        return
    stored: list[dict[str, Tensor]] = []
    read, before = pipe.lora_state_dict, set(_loaded(pipe))

    def recorded(*args: Any, **keywords: Any) -> Any:
        told = read(*args, **keywords)
        stored.append(dict(told[0] if isinstance(told, tuple) else told))
        _check_finite(stored[-1], lora)
        return told

    pipe.lora_state_dict = recorded  # the loader reads and renames tensors through this method
    try:
        with one_sentence(f"the LoRA {lora}", path, offline):
            pipe.load_lora_weights(path, local_files_only=offline)
    except ValueError as error:  # prefer the cause if this module raised it
        raise (error.__cause__ if isinstance(error.__cause__, _Refused) else error) from None
    finally:
        del pipe.lora_state_dict
    names = [name for state in stored for name in _names(pipe, state)]
    names += _left_out(Path(path))
    _check_fit(names, set(_loaded(pipe)) - before, f"the LoRA {lora}", type(pipe).__name__)


def unload_lora(pipe: Any) -> None:
    """Remove the LoRAs that were loaded into the pipeline, also by `load_lora` without a loader."""
    from diffusers.utils import recurse_remove_peft_layers

    if _has_loader(pipe):
        pipe.unload_lora_weights()
        return
    for module in _modules(pipe).values():
        if hasattr(module, "peft_config"):
            recurse_remove_peft_layers(module)
            del module.peft_config


def _has_loader(pipe: Any) -> bool:
    """Return whether diffusers can load a LoRA into one of the pipeline's networks."""
    loadable = getattr(pipe, "_lora_loadable_modules", ())
    return any(
        n in loadable and hasattr(net, "load_lora_adapter") for n, net in networks(pipe).items()
    )


def _load_by_peft(pipe: Any, path: Path, lora: str) -> None:
    """Load a LoRA that finetune saved into a pipeline for which diffusers has no loader."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    kind, what = type(pipe).__name__, f"the LoRA {lora}"
    try:
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be read ({error}); {kind} takes a local file") from None
    _check_finite(state, lora)
    part = next(iter(state), "").partition(".")[0]
    network = _modules(pipe).get(part)
    if network is None or f"{part}.r" not in about:
        raise ValueError(f"{what} was not saved for {kind}, which takes a LoRA of its own training")
    layers = {name.removeprefix(f"{part}.").partition(".lora_")[0] for name in state}
    config = LoraConfig(
        r=about[f"{part}.r"],
        lora_alpha=about[f"{part}.lora_alpha"],
        target_modules=sorted(layers & {name for name, _ in network.named_modules()}),
    )
    before = set(_loaded(pipe))
    inject_adapter_in_model(config, network, "default_0")
    own = {name.removeprefix(f"{part}."): value for name, value in state.items()}
    set_peft_model_state_dict(network, own, "default_0")
    _check_fit(list(state), set(_loaded(pipe)) - before, what, kind)


class _Refused(ValueError):
    """An error that this module raises while diffusers loads."""


def _check_finite(state: dict[str, Tensor], lora: str) -> None:
    bad = [n for n, v in state.items() if isinstance(v, Tensor) and not v.isfinite().all()]
    if bad:
        raise _Refused(
            f"the LoRA {lora} has values that are not finite in {len(bad)} of {len(state)} "
            f"tensors, such as {bad[0]}: its training diverged, or the file is damaged"
        )


def _check_fit(names: Sequence[str], loaded: set[str], what: str, kind: str) -> None:
    if not names:
        raise ValueError(f"{what} holds no weights: it is empty")
    rest = [name for name in names if name not in loaded]
    if rest:
        shown = ", ".join(rest[:3]) + (", ..." if rest[3:] else "")
        raise ValueError(
            f"{what} does not fit {kind}: {len(names) - len(rest)} of its {len(names)} tensors "
            f"match a layer, but {shown} do not; pass a LoRA that was trained for this model"
        )


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _loaded(pipe: Any) -> Iterator[str]:
    """Yield the names of all adapter tensors in the pipeline, as "unet.layer.lora_A.weight"."""
    from peft.utils import get_peft_model_state_dict

    for part, module in _modules(pipe).items():
        for adapter in getattr(module, "peft_config", {}):
            for name in get_peft_model_state_dict(module, adapter_name=adapter):
                yield f"{part}.{name.replace('text_model.', '')}"


def _names(pipe: Any, state: dict[str, Tensor]) -> Iterator[str]:
    """Yield the names that the loaded tensors have in the pipeline."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    rest, modules = dict(state), _modules(pipe)
    for part, module in modules.items():
        own = {n.removeprefix(f"{part}."): rest.pop(n) for n in state if n.startswith(f"{part}.")}
        if own and part.startswith("text_encoder"):
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        elif own and "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        weights = module.state_dict().keys() if own else ()
        for name in own:
            # a control LoRA also holds norms, which replace the network's own
            if name not in weights and not name.endswith("alpha"):
                yield f"{part}.{name.replace('text_model.', '')}"
    yield from rest


def _left_out(path: Path) -> list[str]:
    """Return the names of the tensors in a local file that the loaders of diffusers drop."""
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return []
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return [name for name in stored.keys() if "dora_scale" in name]  # noqa: SIM118
