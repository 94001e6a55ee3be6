"""Larger published networks in their real shapes and without weights, for the memory of training.

FLUX.2-klein-4B and Wan2.2-TI2V-5B have the numbers of diffusers' conversion scripts. Qwen-Image and
Z-Image have diffusers' defaults, which others quote as their config.json; the files themselves were
not seen. The decoders of FLUX.2 and Qwen-Image are diffusers' defaults too and were compared with
nothing. The numbers of parameters agree with the models' cards (tests/test_configs.py).
Legend: n rows, l tokens of a text.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .networks import FLUX_DEV, Published, inputs, latents_of

KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
WAN = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
WAN_DECODER = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
# Texts of FLUX and Wan are padded to 512 tokens. Those of Qwen-Image and Z-Image have their own
# length, of which 128 is assumed. The video has 33 frames of about as many pixels as 480 x 832.
LARGER = {
    "flux-dev": FLUX_DEV,
    "klein-4b": Published(
        *("Flux2KleinPipeline", "Flux2Transformer2DModel", KLEIN, 32),
        {"embeds": (512, 7680)},
        1024,
        guided=False,
        decoder=("AutoencoderKLFlux2", {}),
    ),
    "z-image": Published(
        *("ZImagePipeline", "ZImageTransformer2DModel", {}, 16), {"embeds": (128, 2560)}, 1024
    ),
    "qwen-image": Published(
        *("QwenImagePipeline", "QwenImageTransformer2DModel", {}, 16),
        {"embeds": (128, 3584)},
        1024,
        decoder=("AutoencoderKLQwenImage", {}),
        frames=1,
    ),
    "wan22-5b": Published(
        *("WanPipeline", "WanTransformer3DModel", WAN, 48),
        {"embeds": (512, 4096)},
        640,
        decoder=("AutoencoderKLWan", WAN_DECODER),
        frames=9,
        factor=16,
    ),
}
LARGER["wan22-5b-image"] = replace(LARGER["wan22-5b"], frames=1)

# The setting with the number of a network's blocks, of which all are alike, and that number.
BLOCKS = {
    "flux-dev": ("num_single_layers", 38),
    "klein-4b": ("num_single_layers", 20),
    "z-image": ("n_layers", 30),
    "qwen-image": ("num_layers", 60),
    "wan22-5b": ("num_layers", 30),
    "wan22-5b-image": ("num_layers", 30),
}


def klein(model: Published, x: Tensor, embeds: Tensor) -> dict[str, Any]:
    n, tokens = len(x), x.shape[-1] * x.shape[-2] // 4
    return {
        "hidden_states": x.new_empty(n, tokens, 4 * model.latents),
        "encoder_hidden_states": embeds,
        "timestep": x.new_empty(n),
        "guidance": None,
        "img_ids": x.new_zeros(n, tokens, 4),
        "txt_ids": x.new_zeros(n, embeds.shape[1], 4),
    }


def qwen(model: Published, x: Tensor, embeds: Tensor) -> dict[str, Any]:
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    return {
        "hidden_states": x.new_empty(len(x), rows * columns, 4 * model.latents),
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": None,  # as of texts of one length
        "timestep": x.new_empty(len(x)),
        "img_shapes": [[(1, rows, columns)]] * len(x),
    }


def z_image(model: Published, x: Tensor, embeds: Tensor) -> dict[str, Any]:
    return {"x": list(x[:, :, None]), "t": x.new_empty(len(x)), "cap_feats": list(embeds)}


def wan(model: Published, x: Tensor, embeds: Tensor) -> dict[str, Any]:
    tokens = x[0, 0].numel() // 4  # each of which has a time
    times = x.new_empty(len(x), tokens)
    return {"hidden_states": x, "encoder_hidden_states": embeds, "timestep": times}


KEYWORDS: dict[str, Callable[[Published, Tensor, Tensor], dict[str, Any]]] = {
    "Flux2KleinPipeline": klein,
    "QwenImagePipeline": qwen,
    "ZImagePipeline": z_image,
    "WanPipeline": wan,
}


def asked(model: Published, rows: int) -> dict[str, Any]:
    """Keywords of one call of a network, as the model's pipeline passes them; tensors are empty."""
    if model.family not in KEYWORDS:
        return inputs(model, rows, model.side)
    embeds = torch.empty(rows, *model.given["embeds"])
    return KEYWORDS[model.family](model, latents_of(model, rows, model.side), embeds)


class _Unpacked(torch.autograd.Function):
    """A product with packed weights, which are unpacked to bfloat16 in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, x.dtype
        weight = torch.empty(shape, dtype=torch.bfloat16)
        return nn.functional.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = torch.empty(ctx.shape, dtype=torch.bfloat16)
        return (grads[0].to(weight.dtype) @ weight).to(ctx.dtype), None, None, None


# Bytes of a weight, and of a row of weights: int8 of torchao with a scale for each row; NF4 of
# bitsandbytes with a float32 for each block of 64.
BASES = {"8bit": (1.0, 2), "4bit": (0.5 + 4 / 64, 0)}


def pack(network: nn.Module, base: str) -> None:
    """Hold the frozen linear layers in 8 or 4 bits, as bytes without values."""
    each, row = BASES[base]
    for module in network.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            shape = module.weight.shape
            size = int(each * shape.numel() + row * shape[0])
            packed = torch.empty(size, dtype=torch.int8)
            module.weight = nn.Parameter(packed, requires_grad=False)
            vars(module)["forward"] = _product(module, shape)


def _product(module: nn.Linear, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        found: Any = _Unpacked.apply(x, module.weight, module.bias, shape)
        return found

    return product
