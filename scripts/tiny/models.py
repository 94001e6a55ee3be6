"""The architectures of the embedded models: small instances of the real diffusers classes."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .world import COLOURS, NUMBERS, SHAPES

LATENT_CHANNELS = 8
TOKENS = 16
_SPECIAL = ("<pad>", "<unk>", "<start>")
_ENTITIES = (*COLOURS, "black", "white", *SHAPES, *(f"{s}s" for s in SHAPES), "crosses", *NUMBERS)
_GLUE = ("the", "word", "and", "in", "an", "left", "right", "above", "below", "of")
_WORDS = (*_ENTITIES, *_GLUE)

# Stable Diffusion's own, and SDXL's
SD_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tokenizer() -> Any:
    """Known words are tokens; everything else is spelled, one token a character.

    `<end>` has the highest id, which is how CLIP text towers find the end of the prompt.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789\"'.,!?-"
    names = (*_SPECIAL, *letters, *_WORDS, "<end>")
    vocabulary = {name: i for i, name in enumerate(names)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex("[“”]"), '"')]
    )
    words = "|".join(sorted(_WORDS, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\b(?:{words})\b|\S"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=TOKENS,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    )


def vae() -> Any:
    """An AutoencoderKL, 64x64x3 <-> 16x16x8."""
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 8,
        "sample_size": 64,
        "mid_block_add_attention": False,
        "force_upcast": False,
    }
    return AutoencoderKL(**config)


def preview() -> Any:
    """An AutoencoderTiny: a cheaper decoder of the same latents, for scores in mid-run."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(3, 2, 0),
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
    )


def text_config(width: int, tok: Any) -> CLIPTextConfig:
    """A two-layer CLIP text tower of the given width over our vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def silent_t5(width: int) -> tuple[T5EncoderModel, Any]:
    """A T5 encoder whose last norm is 0, so all it says is zeros, and its tokenizer.

    `from_pretrained` wants the component, and where it is absent the stock pipeline puts zeros in
    its place. A prompt is a single token, which fits any max_sequence_length from 1 on.
    """
    core = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=2,
            d_model=width,
            d_kv=8,
            d_ff=8,
            num_layers=1,
            num_heads=1,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder, tok


def tiny_sd3(autoencoder: Any) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline (rectified flow) with two CLIP towers and a silent T5."""
    tok = tokenizer()
    widths = (128, 64)
    t5, t5_tok = silent_t5(sum(widths))
    encoders = [CLIPTextModelWithProjection(text_config(width, tok)) for width in widths]
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=sum(widths),
        caption_projection_dim=192,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    parts: dict[str, Any] = {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": autoencoder,
        "text_encoder": encoders[0],
        "tokenizer": tok,
        "text_encoder_2": encoders[1],
        "tokenizer_2": tok,
        "text_encoder_3": t5,
        "tokenizer_3": t5_tok,
    }
    return StableDiffusion3Pipeline(**parts)


def tiny_sd(autoencoder: Any) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline (epsilon prediction, scaled-linear betas)."""
    tok = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 112),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler: Any = DDIMScheduler(**SD_NOISE, timestep_spacing="leading")
    parts: dict[str, Any] = {
        "vae": autoencoder,
        "text_encoder": CLIPTextModel(text_config(128, tok)),
        "tokenizer": tok,
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)
