"""Folders of small CLIPs with random weights, in open_clip's and in transformers' form."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rewards.towers.openclip import build
from rewards.towers.sources import RANDOM_CONFIG, randomise

WORDS = ["<pad>", "<unk>", "<start>", "a", "red", "blue", "circle", "star", "<end>"]


def word_rules() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])],
    )
    return core


def pictures(n: int, height: int, width: int) -> list[Image.Image]:
    """Smooth pictures with an edge, on the grid of bytes."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    found = []
    for array in small:
        picture = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        picture.paste((250, 10, 10), (width // 3, 0, width // 2, height // 2))
        found.append(picture)
    return found


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names for a CLIP's weights -> transformers'."""
    block = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    block |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    direct = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    found = {}
    for name, value in state.items():
        stem, _, end = name.rpartition(".")
        if name in direct:
            found[direct[name]] = value
        elif name in ("visual.proj", "text_projection"):
            found[name.replace("visual.proj", "visual_projection") + ".weight"] = value.T
        elif stem in norms:
            found[f"{norms[stem]}.{end}"] = value
        else:
            tower = "vision" if name.startswith("visual") else "text"
            number, _, rest = name.partition("resblocks.")[2].partition(".")
            layer = f"{tower}_model.encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                for key, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{key}_proj.{rest.removeprefix('attn.in_proj_')}"] = (
                        part
                    )
            else:
                found[f"{layer}.{block[rest.rpartition('.')[0]]}.{end}"] = value
    return {name: value.contiguous() for name, value in found.items()}


@lru_cache
def clip_tokenizer() -> Any:
    """transformers' tokenizer of CLIP, from the vocabulary that open_clip brings along."""
    from transformers import CLIPTokenizer

    core = open_clip.SimpleTokenizer()
    merges = sorted(core.bpe_ranks, key=lambda pair: core.bpe_ranks[pair])
    vocabulary = dict(core.encoder)
    for old, new in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[new] = vocabulary.pop(old)
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=77)


def twin_folders(path: Path, quick_gelu: bool) -> tuple[Path, Path, Any]:
    """The same random weights as open_clip and as transformers store them, and the latter's."""
    from transformers import CLIPConfig, CLIPModel

    ours, theirs = path / "open_clip", path / "transformers"
    ours.mkdir()
    config = {"model_cfg": {**RANDOM_CONFIG, "quick_gelu": quick_gelu}, "preprocess_cfg": {}}
    (ours / "open_clip_config.json").write_text(json.dumps(config))
    model = build(config)
    randomise(model, 3)
    for name, parameter in model.named_parameters():
        if "proj" in name or "fc" in name:
            parameter.mul_(2)  # so that the activation's bend counts
    torch.save(model.state_dict(), ours / "open_clip_pytorch_model.bin")
    act = "quick_gelu" if quick_gelu else "gelu"
    shared = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2, "projection_dim": 32, "hidden_act": act}
    text = shared | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    vision = shared | {"image_size": 32, "patch_size": 8}
    twin: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    twin.load_state_dict(as_transformers(model.state_dict()))
    twin.eval().requires_grad_(False).save_pretrained(theirs)
    clip_tokenizer().save_pretrained(theirs)
    return ours, theirs, twin
