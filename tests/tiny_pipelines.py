"""Small random-weight instances of the real diffusers classes, built offline in a second."""

# pyright: reportArgumentType=false, reportPrivateImportUsage=false
# diffusers exports lazily and annotates what its pipelines take more narrowly than they do

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tiny_parts import (
    LETTERS,
    clip_text,
    clip_tokenizer,
    ddim,
    seeded,
    t5_text,
    t5_tokenizer,
    unet,
    vae,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from zoo.decoders import DECODERS


def sd(cls=StableDiffusionPipeline, scheduler=None, in_channels=4, **more):
    return cls(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(in_channels),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def sd3(scheduler=None):
    transformer = seeded(
        SD3Transformer2DModel,
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "out_channels": 4,
        },
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True, seed=1),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(32),
        tokenizer_3=t5_tokenizer(),
    )


def sd2():
    """v-prediction with an Euler scheduler, as SD 2.1 ships: replaced by DDIM of its config."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config = {"prediction_type": "v_prediction", "steps_offset": 1, **betas}
    return sd(scheduler=EulerDiscreteScheduler(**config))


def sdxl(scheduler=None):
    network = unet(
        width=32,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True, seed=1),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scheduler or ddim(),
        add_watermarker=False,
    )


def steps_where_stock_ddim_is_nan():
    """A number of steps at which 1 - ᾱ' - σ² rounds below 0 at zero terminal SNR and eta 1.

    Which ones do depends on the processor: 20 on some, 16 to 19 on others.
    """
    scheduler = sdxl_zero_snr().scheduler
    x = torch.ones(1, 1, 1, 1)
    for steps in range(20, 60):
        scheduler.set_timesteps(steps)
        move = scheduler.step(x, int(scheduler.timesteps[0]), x, eta=1.0, variance_noise=x)
        if move.prev_sample.isnan().any():
            return steps
    raise AssertionError("stock DDIM is finite at every number of steps: nothing to compare with")


def sdxl_zero_snr():
    """v-prediction with zero terminal SNR: stock DDIM at eta 1 and 20 steps gives NaN."""
    return sdxl(
        ddim(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
    )


def flux():
    transformer = seeded(
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        },
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(32),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def controlnet():
    network = seeded(
        ControlNetModel,
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "cross_attention_dim": 16,
            "conditioning_embedding_out_channels": (4, 8),
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
    )
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():  # its output layers start at zero, where it would have no effect
        for layer in [*network.controlnet_down_blocks, network.controlnet_mid_block]:
            layer.weight.normal_(0, 0.1, generator=noise)
    return sd(StableDiffusionControlNetPipeline, controlnet=network)


def img2img():
    return sd(StableDiffusionImg2ImgPipeline)


def inpaint():
    """Four channels: the known region is renoised by the pipeline after every step."""
    return sd(StableDiffusionInpaintPipeline)


def inpaint9():
    """Nine channels: the network sees the mask and the masked image."""
    return sd(StableDiffusionInpaintPipeline, in_channels=9)


def pixart():
    transformer = seeded(
        PixArtTransformer2DModel,
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 16,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana():
    transformer = seeded(
        SanaTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 32,
        },
    )
    decoder = seeded(AutoencoderDC, DECODERS["AutoencoderDC"] | {"latent_channels": 4})
    text = Gemma2Config(
        head_dim=16,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=128,
    )
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]),
        text_encoder=seeded(Gemma2Model, text, from_config=True),
        vae=decoder,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def wan():
    transformer = seeded(
        WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 16,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        },
    )
    decoder = seeded(
        AutoencoderKLWan,
        {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    )
    text = UMT5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(UMT5EncoderModel, text, from_config=True),
        vae=decoder,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )


def picture(seed=0, size=16):
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy())


def half_mask(size=16):
    return Image.fromarray(
        np.repeat(np.arange(size)[None] * 2 >= size, size, 0).astype("uint8") * 255
    )


_SIZE = {"height": 16, "width": 16}


# name -> (builder, keywords of its call)
FAMILIES = {
    "sd": (sd, {}),
    "sd2": (sd2, {}),
    "sdxl": (sdxl, {}),
    "sdxl-zero-snr": (sdxl_zero_snr, {"guidance_rescale": 0.7}),
    "sd3": (sd3, {}),
    "flux": (flux, _SIZE),
    "flux-true-cfg": (flux, {"true_cfg_scale": 3.0, "negative_prompt": "blue", **_SIZE}),
    "controlnet": (controlnet, {"image": picture()}),
    "img2img": (img2img, {"image": picture(), "strength": 0.75}),
    "inpaint": (
        inpaint,
        {"image": picture(), "mask_image": half_mask(), "height": 16, "width": 16},
    ),
    "inpaint9": (
        inpaint9,
        {"image": picture(), "mask_image": half_mask(), "height": 16, "width": 16},
    ),
    "pixart": (
        pixart,
        {"use_resolution_binning": False, "clean_caption": False, **_SIZE},
    ),
    "sana": (
        sana,
        {
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "max_sequence_length": 16,
        },
    ),
    "wan": (wan, {"num_frames": 1, "max_sequence_length": 16, **_SIZE}),
}


def family(name):
    """A pipeline that prints no progress, and the keywords of its call at 6 steps."""
    builder, keywords = FAMILIES[name]
    pipe = builder()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 6, "guidance_scale": 4.0, **keywords}
