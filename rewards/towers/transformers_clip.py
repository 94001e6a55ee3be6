"""CLIP and SigLIP towers of transformers: a CLIPModel or SiglipModel from a folder or the hub."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import fetch, find, fit, hub, read_state
from .dual_encoder import OPENAI_MEAN, OPENAI_STD, Towers

__all__ = [
    "HALF",
    "POSITION_IDS",
    "canonical",
    "check_hidden_act",
    "load_tokenizer",
    "lower",
    "open_place",
    "transformers_towers",
]

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
POSITION_IDS = (r".*\bposition_ids$",)  # older libraries saved this buffer of 0, 1, 2, ...
HALF = (0.5, 0.5, 0.5)
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's constants, as in preprocessing files
GEMMA_WORDS = 256_000  # size of SigLIP 2's vocabulary; those of SigLIP have 32k or 250k
PUNCTUATION = str.maketrans("", "", string.punctuation)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def open_place(place: str, config: Mapping[str, Any]) -> Towers:
    """Return the towers of a folder or hub repository with this parsed config.json."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    kind = str(config.get("model_type"))
    if kind not in ("clip", "siglip"):
        hint = "; take one of a fixed size, as google/siglip2-base-patch16-224"
        raise ValueError(
            f"{place} is a {kind!r} model but a CLIPModel, a SiglipModel or open_clip's is needed"
            + (hint if kind == "siglip2" else "")
        )
    model: Any = (
        CLIPModel(CLIPConfig.from_dict(dict(config)))
        if kind == "clip"
        else SiglipModel(SiglipConfig.from_dict(dict(config)))
    ).float()
    check_hidden_act(model, config, "quick_gelu" if kind == "clip" else "gelu_pytorch_tanh", place)
    fit(model, _state(place), place, ignore=POSITION_IDS)
    tokenizer = load_tokenizer(place)
    path = find(place, "preprocessor_config.json", "processor_config.json")
    given = json.loads(path.read_text(encoding="utf-8")) if path else {}
    given = given.get("image_processor", given)
    if kind == "clip":
        return transformers_towers(model, tokenizer, given, OPENAI_MEAN, OPENAI_STD)
    gemma = model.config.text_config.vocab_size == GEMMA_WORDS
    given = {"size": {"height": None}, "resample": 2 if gemma else 3} | given
    clean = lower if gemma else canonical
    return transformers_towers(model, tokenizer, given, HALF, HALF, clean)


def _state(place: str) -> dict[str, Tensor]:
    """Return the tensors of a transformers model, from one file or the files of an index."""
    path = fetch(place, *FILES)
    if path.suffix != ".json":
        return read_state(path)
    parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    return {k: v for part in parts for k, v in read_state(fetch(place, part)).items()}


def load_tokenizer(place: str) -> Any:
    """Return the tokenizer of a folder or hub repository."""
    from transformers import AutoTokenizer

    with hub(place):
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:
            if "sentencepiece" in str(error).lower():
                raise ValueError(
                    f"the tokenizer of {place} needs SentencePiece: pip install sentencepiece"
                ) from error
            raise


def check_hidden_act(
    model: nn.Module, config: Mapping[str, Any], default: str, where: object
) -> None:
    """Require that a model's activations are those that its configuration names."""
    x = torch.linspace(-4, 4, 33)
    for part in ("text", "vision"):
        settings = config.get(f"{part}_config") or {}
        name = settings.get("hidden_act", default)
        if name not in ACTIVATIONS:
            raise ValueError(
                f"the {part} tower of {where} has hidden_act {name!r} but one of "
                f"{list(ACTIVATIONS)} is known; use another model"
            )
        tower = getattr(model, f"{part}_model")
        found = [m for key, m in tower.named_modules() if key.endswith("activation_fn")]
        same = (torch.allclose(m(x), ACTIVATIONS[name](x), atol=1e-5) for m in found)
        if not found or not all(same):
            raise ValueError(
                f"the {part} tower of {where} has hidden_act {name!r} but the built model computes "
                "another; the installed transformers does not match these weights"
            )


def lower(prompt: str) -> str:
    """Convert to lower case, as in the training of SigLIP 2 (Tschannen et al. 2025, §2).

    The tokenizer files on the hub are Gemma's, which do not.
    """
    return prompt.lower()


def canonical(prompt: str) -> str:
    """Lower case, no punctuation, single spaces, as by SigLIP's tokenizer."""
    return " ".join(prompt.lower().translate(PUNCTUATION).split())


def transformers_towers(
    model: Any,
    tokenizer: Any,
    given: Mapping[str, Any],
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    clean: Callable[[str], str] = str,
) -> Towers:
    """Towers of a CLIPModel or SiglipModel with the entries of its preprocessing file.

    Missing entries default to `mean`, `std`, bicubic and the shortest side. Text is padded on the
    right to the model's length, as both families were trained; SigLIP reads the last position.
    `clean` is applied before the tokenizer.
    """
    length = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size

    def encode_image(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixels).pooler_output

    def encode_text(prompts: list[str]) -> Tensor:
        rows = tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            padding_side="right",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return model.get_text_features(rows.input_ids.to(model.device)).pooler_output

    return Towers(
        model,
        encode_image,
        encode_text,
        (side, side),
        getattr(model.config, "projection_dim", None) or model.config.text_config.projection_size,
        given.get("image_mean") or mean,
        given.get("image_std") or std,
        FILTERS[given.get("resample", 3)],
        _resize_mode(given, side),
        floor=True,
    )


def _resize_mode(given: Mapping[str, Any], side: int) -> str:
    """Return the resize mode of a preprocessing file; ValueError if `prepare` does not have it."""
    size, crop = given.get("size", side), given.get("crop_size", side)
    sides = {
        pixels
        for entry in (size, crop)
        for pixels in (entry.values() if isinstance(entry, Mapping) else [entry])
    }
    squash = isinstance(size, Mapping) and "height" in size
    if sides - {side, None} or (given.get("do_center_crop") is False and not squash):
        raise ValueError(
            f"a CLIP that resizes to {size} and crops to {crop} (do_center_crop "
            f"{given.get('do_center_crop')}) for a tower of {side} pixels is not supported; resize "
            "the shortest side or both sides to that many, with a centre crop"
        )
    return "squash" if squash else "shortest"
