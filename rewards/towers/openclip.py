"""CLIP and SigLIP towers of open_clip, from folders, hub repositories and pretrained tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import fetch, fit, hub, read_state
from .dual_encoder import OPENAI_MEAN, OPENAI_STD, Towers

__all__ = [
    "WordTokenizer",
    "bpe_tokenizer",
    "build",
    "open_clip_towers",
    "open_place",
    "open_tag",
]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
POSITION_IDS = (r".*\bposition_ids$",)  # older libraries saved this buffer of 0, 1, 2, ...


@lru_cache
def bpe_tokenizer(context_length: int) -> Any:
    """CLIP's BPE tokenizer, which is part of open_clip: n strings -> ids (n, context_length)."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length)


class WordTokenizer:
    """A word-level `tokenizer.json` of the library tokenizers, padded and truncated to one length.

    Its post-processor adds the start and end tokens, and `<pad>` is the padding. It maps n strings
    to ids (n, context_length), int64.
    """

    def __init__(self, path: str | Path, context_length: int) -> None:
        from tokenizers import Tokenizer

        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self.core = Tokenizer.from_file(str(path))
        pad = self.core.token_to_id("<pad>")
        if pad is None:
            raise ValueError(f"{path} has no <pad> token, which a word tokenizer needs")
        self.core.enable_truncation(context_length)
        self.core.enable_padding(pad_id=pad, pad_token="<pad>", length=context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([item.ids for item in self.core.encode_batch(list(texts))])


def build(config: Mapping[str, Any]) -> Any:
    """Return an untrained, frozen open_clip model from a configuration file or its model_cfg."""
    import open_clip

    settings = dict(config.get("model_cfg", config))
    text = settings["text_cfg"] = dict(settings["text_cfg"])
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False  # or open_clip would download weights
    custom = settings.pop("custom_text", False) or "hf_model_name" in text
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
    _check_quick_gelu(model, bool(settings.get("quick_gelu", False)), "the configuration")
    return model.requires_grad_(False).eval()


def _check_quick_gelu(model: nn.Module, quick: bool, where: str) -> None:
    """Check the activation, because a wrong one changes scores too little to be noticed."""
    from open_clip.transformer import QuickGELU

    if quick != any(isinstance(module, QuickGELU) for module in model.modules()):
        raise ValueError(
            f"{where} says quick_gelu={quick} but the built CLIP disagrees; "
            "use the architecture whose name ends as the weights were trained (-quickgelu)"
        )


def open_place(place: str, config: Mapping[str, Any]) -> Towers:
    """Return the towers of a folder or hub repository with this parsed open_clip_config.json."""
    try:
        model = build(config)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{place} describes no CLIP that open_clip builds: {error}") from error
    path = fetch(place, *FILES)
    state = read_state(path)
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # some files hold a list of one number
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    fit(model, state, path, ignore=POSITION_IDS)
    embed_dim = config.get("model_cfg", config)["embed_dim"]
    preprocess = config.get("preprocess_cfg", {})
    return open_clip_towers(model, _tokenizer(place, config), embed_dim, preprocess)


def _tokenizer(place: str, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    import open_clip

    path = Path(place, "tokenizer.json")
    if path.is_file():
        rules = json.loads(path.read_text(encoding="utf-8"))
        if rules["model"]["type"] == "WordLevel":
            return WordTokenizer(path, config["model_cfg"]["text_cfg"]["context_length"])
    kind = "local-dir" if Path(place).is_dir() else "hf-hub"
    foreign = config.get("model_cfg", config)["text_cfg"].get("hf_tokenizer_name")
    # otherwise tokenizer_kwargs of the configuration could execute code of the folder
    safely: dict[str, Any] = {"trust_remote_code": False} if foreign else {}
    with hub(place):
        return open_clip.get_tokenizer(f"{kind}:{place}", **safely)


def open_tag(name: str, tag: str) -> Towers:
    """Return the towers of an open_clip architecture with the weights of one of its tags."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(
            f"open_clip's {name} has no weights {tag!r}; write {name}/TAG with one of {tags}"
        )
    trained = open_clip.get_pretrained_cfg(name, tag)
    # the activation that the tag was trained with, which may differ from the architecture's
    quick = bool(trained.get("quick_gelu", False))
    with hub(trained.get("hf_hub", "").rstrip("/") or f"{name}/{tag}"):
        model: Any = open_clip.create_model(
            name, tag, force_quick_gelu=quick, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    _check_quick_gelu(model, quick, f"{name}/{tag}")
    settings: Any = open_clip.get_model_config(name)
    return open_clip_towers(model, tokenizer, settings["embed_dim"], trained)


def open_clip_towers(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    width: int,
    preprocess: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Towers:
    """Towers of an open_clip model; values missing in preprocess_cfg are those of OpenAI's CLIP."""

    def encode_text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts).to(model.logit_scale.device))

    given = preprocess or {}
    resize_mode = given.get("resize_mode", "shortest")
    if resize_mode not in ("shortest", "squash"):
        raise ValueError(
            f"this CLIP resizes images by {resize_mode!r}; "
            "only 'shortest' and 'squash' are known, use another model"
        )
    side = model.visual.image_size
    return Towers(
        model,
        model.encode_image,
        encode_text,
        (side, side) if isinstance(side, int) else tuple(side),
        width,
        given.get("mean", OPENAI_MEAN),
        given.get("std", OPENAI_STD),
        given.get("interpolation", "bicubic"),
        mode or resize_mode,
    )
