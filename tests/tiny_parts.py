"""Small random-weight parts of pipelines: tokenizers, text encoders, networks, a scheduler."""

# pyright: reportArgumentType=false, reportPrivateImportUsage=false
# diffusers exports lazily and annotates what its pipelines take more narrowly than they do

import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase + string.digits + ".,'-"


def seeded(cls, config, seed=0, from_config=False):
    """An eval-mode network whose weights come from `seed`, leaving the global stream alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (cls(config) if from_config else cls(**config)).eval()


def clip_tokenizer():
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=16,
    )


def clip_text(width=16, projection=False, seed=0):
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return seeded(cls, config, seed, from_config=True)


def t5_text(width=16, seed=0):
    config = T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return seeded(T5EncoderModel, config, seed, from_config=True)


def vae(channels=4, seed=0, **config):
    return seeded(
        AutoencoderKL,
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "sample_size": 16,
            **config,
        },
        seed,
    )


def unet(in_channels=4, width=16, seed=0, **config):
    return seeded(
        UNet2DConditionModel,
        {
            "sample_size": 8,
            "in_channels": in_channels,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": width,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        },
        seed,
    )


def ddim(**config):
    return DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **config,
        }
    )
