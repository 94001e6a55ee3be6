"""The published networks in their real shapes and without weights.

Configurations are those of the models' own config.json; what these do not state is diffusers' or
transformers' default. Rows are what a network evaluates at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Generator, Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)


@dataclass(frozen=True)
class Published:
    """A published model: its network and decoder by their configurations.

    latents: channels. given: the shapes of a prompt's conditioning, by name. side: of pictures, in
    pixels. guided: the network evaluates a picture twice. texts: its text encoders, and how many
    tokens each reads. decoder: its class and configuration, by default those of Stable Diffusion;
    factor: how many pixels a latent is wide; frames: of the latents, if they have such an axis.
    """

    family: str
    network: str
    config: Mapping[str, Any]
    latents: int
    given: Mapping[str, tuple[int, ...]]
    side: int
    guided: bool = True
    texts: tuple[tuple[str, int], ...] = ()
    decoder: tuple[str, Mapping[str, Any]] | None = None
    factor: int = 8
    frames: int | None = None


SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35M = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FLUX = {"guidance_embeds": True}
# SD3.5's prompts are 77 tokens of the CLIPs and 256 of T5
MODELS = {
    "sd15": Published(
        *("StableDiffusionPipeline", "UNet2DConditionModel", SD15, 4, {"embeds": (77, 768)}, 512),
        texts=(("clip-l", 77),),
    ),
    "sdxl": Published(
        *("StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL, 4),
        {"embeds": (77, 2048), "pooled": (1280,), "time_ids": (6,)},
        1024,
        texts=(("clip-l", 77), ("clip-bigg", 77)),
    ),
    "sd35m": Published(
        *("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35M, 16),
        {"embeds": (333, 4096), "pooled": (2048,)},
        512,
        texts=(("clip-l", 77), ("clip-bigg", 77), ("t5-xxl", 256)),
    ),
}
# guidance is distilled into it, so that it evaluates a picture once
FLUX_DEV = Published(
    *("FluxPipeline", "FluxTransformer2DModel", FLUX, 16),
    {"embeds": (512, 4096), "pooled": (768,)},
    1024,
    guided=False,
    texts=(("clip-l", 77), ("t5-xxl", 512)),
)


def network_of(model: Published) -> Any:
    """The network that is evaluated at every step."""
    return getattr(diffusers, model.network)(**model.config).eval()


def decoder_of(model: Published) -> Any:
    """The autoencoder; those of Stable Diffusion's class differ only in the latents' channels."""
    if model.decoder:
        name, config = model.decoder
        return getattr(diffusers, name)(**config).requires_grad_(False).eval()
    quant = model.latents == 4
    kind: Any = diffusers.AutoencoderKL  # its annotations allow tuples of one size only
    decoder = kind(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=model.latents,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return decoder.requires_grad_(False).eval()


def preview_of(model: Published) -> Any:
    """taesd, taesdxl, taesd3 or taef1: diffusers' defaults except for the latent channels."""
    tiny = diffusers.AutoencoderTiny(latent_channels=model.latents)
    return tiny.requires_grad_(False).eval()


def text_encoder(name: str) -> Any:
    """OpenAI's CLIP ViT-L/14, OpenCLIP's ViT-bigG/14 or the encoder of T5 1.1 XXL."""
    if name == "t5-xxl":
        xxl = T5Config(
            d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
        return T5EncoderModel(xxl).eval()
    if name == "clip-l":
        large = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
        )
        return CLIPTextModel(large).eval()
    huge = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        num_hidden_layers=32,
        projection_dim=1280,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(huge).eval()


def filled(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The module that `build()` makes, with random weights that are drawn on the device.

    It is built without weights first, as a network of two billion parameters takes a minute to
    initialise on the host. Matrices keep the scale of their inputs, norms have gain 1, and biases
    are 0.
    """
    with torch.device("meta"):
        module = build()
    nn.Module.to(module, dtype)  # the model's own .to() warns of layers that it does not have
    module = module.to_empty(device=device)
    generator = Generator(device).manual_seed(0)
    for name, values in (*module.named_parameters(), *module.named_buffers()):
        if values.ndim > 1:
            values.data.normal_(0, values[0].numel() ** -0.5, generator=generator)
        else:
            values.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def parts_of(model: Published, online: bool) -> list[Any]:
    """The network and, if online, the autoencoder and the critic's DINOv2-base."""
    if not online:
        return [network_of(model)]
    tower = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    return [network_of(model), decoder_of(model), tower.requires_grad_(False)]


def inputs(
    model: Published, rows: int, side: int, make: Callable[..., Tensor] = torch.empty
) -> dict[str, Any]:
    """Keywords of one call of the network, of tensors from make(*shape), by default empty ones."""
    shape = (model.latents, side // 8, side // 8)
    if model.family == "FluxPipeline":  # four numbers of each channel are a token
        shape = ((side // 16) ** 2, 4 * model.latents)
    given = {name: make(rows, *shape) for name, shape in model.given.items()}
    return keywords(model, make(rows, *shape), make(rows), given)


def keywords(model: Published, x: Tensor, timesteps: Tensor, given: dict[str, Tensor]) -> dict:
    """The keywords of a call of the network, as the model's pipeline passes them.

    x: latents (n, ...); given: the conditioning by the names of `Published.given`, n rows each.
    """
    found: dict[str, Any] = {"timestep": timesteps, "encoder_hidden_states": given["embeds"]}
    if "UNet" in model.network:
        found["sample"] = x
        if "pooled" in given:
            added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
            found["added_cond_kwargs"] = added
        return found
    found |= {"hidden_states": x, "pooled_projections": given["pooled"]}
    if model.family == "FluxPipeline":
        found["img_ids"] = x.new_zeros(x.shape[1], 3)
        found["txt_ids"] = x.new_zeros(given["embeds"].shape[1], 3)
        found["guidance"] = x.new_zeros(len(x))
    return found


def latents_of(model: Published, rows: int, side: int, dtype: torch.dtype = torch.float32) -> Any:
    """Latents as the decoder takes them, without values."""
    wide = side // model.factor
    frames = () if model.frames is None else (model.frames,)
    return torch.empty(rows, model.latents, *frames, wide, wide, dtype=dtype)


def parameters(module: nn.Module) -> int:
    """How many numbers a module's file holds: parameters, and SD3.5's table of positions."""
    kept = [*module.parameters(), *(b for b in module.buffers() if b.numel() > 1e6)]
    return sum(math.prod(tensor.shape) for tensor in kept)


def place(module: nn.Module, dtype: torch.dtype) -> None:
    """Allocate a module of the meta device under the active mode; trained weights in float32."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=torch.float32 if old.requires_grad else dtype)
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                kept = dtype if old.is_floating_point() else old.dtype
                part._buffers[name] = torch.empty(old.shape, dtype=kept)
        for name, old in vars(part).items():  # tables that are no buffers
            if isinstance(old, Tensor) and old.is_meta:
                vars(part)[name] = torch.empty(old.shape, dtype=old.dtype)
