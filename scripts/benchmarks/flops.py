"""Floating-point operations of published networks, counted on tensors without values.

A multiplication with its addition is two operations. Only convolutions and matrix products count,
including those of attention, as in torch.utils.flop_counter. Figures without the products of
attention are lower: 0.68 instead of 0.80 TFLOP for Stable Diffusion 1.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from rewards.models import hps, imagereward
from rewards.towers import openclip

from .networks import (
    FLUX_DEV,
    MODELS,
    decoder_of,
    inputs,
    latents_of,
    network_of,
    parameters,
    place,
    preview_of,
    text_encoder,
)

PUBLISHED = MODELS | {"flux-dev": FLUX_DEV}


@dataclass(frozen=True)
class Cost:
    """The parameters that are used, and the operations, both for one picture."""

    parameters: int
    flops: float


def cost(module: nn.Module, call: Callable[[], object]) -> Cost:
    """What `call` costs, which evaluates the module."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return Cost(parameters(module), float(counter.get_total_flops()))


@cache
def of_network(name: str, side: int) -> Cost:
    """One evaluation of one row."""
    model = PUBLISHED[name]
    with torch.device("meta"):
        network, given = network_of(model), inputs(model, 1, side)
    return cost(network, lambda: network(**given))


@cache
def of_decoder(name: str, side: int, preview: bool) -> Cost:
    """One picture, by the pipeline's decoder or by AutoencoderTiny."""
    model = PUBLISHED[name]
    with torch.device("meta"):
        vae = preview_of(model) if preview else decoder_of(model)
        x = latents_of(model, 1, side)
    return cost(vae.decoder, lambda: vae.decode(x))


@cache
def of_texts(name: str) -> Cost:
    """All text encoders, one prompt."""
    found = []
    for text, tokens in PUBLISHED[name].texts:
        with torch.device("meta"):
            encoder = text_encoder(text)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        found.append(cost(encoder, lambda e=encoder, i=ids: e(i)))
    return Cost(sum(c.parameters for c in found), sum(c.flops for c in found))


@cache
def of_reward(name: str) -> Cost:
    """One picture of the reward's own size; prompts are encoded once and do not count."""
    if name == "imagereward":
        return _of_imagereward()
    with torch.device("meta"):
        picture = torch.empty(1, 3, 224, 224)
        if name == "dinov2-l":
            large = Dinov2Config(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518
            )
            tower: Any = Dinov2Model(large).eval()
            return cost(tower, lambda: tower(picture))
        config: Any = hps.CONFIG if name == "vit-h" else open_clip.get_model_config("ViT-L-14")
        clip: Any = openclip.build(config).eval()
    return cost(clip.visual, lambda: clip.encode_image(picture))


def _of_imagereward() -> Cost:
    """Both of its towers, as the text tower attends to the picture."""
    # transformers reads the values of the mask unless tensors are fake, and only the MATH kernel of
    # attention is counted
    with torch.device("meta"):
        network = imagereward.Network(imagereward.PUBLISHED).eval()
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        place(network, torch.float32)
        ids = torch.zeros(1, imagereward.LENGTH, dtype=torch.int64)
        picture, see = torch.empty(1, 3, 224, 224), network.blip["visual_encoder"]
        return cost(network, lambda: network.rate(see(picture).last_hidden_state, ids, ids))


@cache
def of_judge(side: int, question: int) -> tuple[Cost, Cost]:
    """Qwen2.5-VL-7B's vision tower and language model on one picture and a question's tokens.

    Each parameter and token counts as two operations; the products of attention are left out. A
    token of the language model stands for four patches of 14 x 14 pixels.
    """
    language = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    with torch.device("meta"):
        judge: Any = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=False)
        )
    tokens = round(side / 28) ** 2
    sees, layers = (parameters(judge.model.visual), parameters(judge.model.language_model.layers))
    read = Cost(layers + parameters(judge.lm_head), 2.0 * layers * (tokens + question))
    return Cost(sees, 8.0 * sees * tokens), read
