"""Tiny networks, text encoders and decoders of sound: what each class needs."""

from typing import Any

from zoo.networks import UNET

__all__ = ["AUDIO"]

_BLOCKS = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_GEMMA = _BLOCKS | {
    "vocab_size": 128,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "sliding_window": 64,
    "layer_types": ["full_attention"],
}
_CLAP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "projection_dim": 8}

AUDIO: dict[str, dict[str, Any]] = {
    "AutoencoderOobleck": {
        "encoder_hidden_size": 6,
        "downsampling_ratios": [1, 2],
        "channel_multiples": [2, 4],
        "decoder_channels": 3,
        "decoder_input_channels": 8,
        "sampling_rate": 16,
    },
    "AutoencoderSAME": {
        "patch_size": 2,
        "encoder_channels": 8,
        "encoder_c_mults": (2,),
        "encoder_strides": (2,),
        "encoder_transformer_depths": (1,),
        "latent_dim": 8,
        "use_differential_attention": False,
        "dim_heads": 4,
        "ff_mult": 2,
        "sampling_rate": 16,
    },
    "StableAudioDiTModel": {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 8,
        "num_key_value_attention_heads": 2,
        "time_proj_dim": 8,
        "global_states_input_dim": 64,
        "cross_attention_dim": 32,
        "cross_attention_input_dim": 32,
    },
    "StableAudioProjectionModel": {
        "text_encoder_dim": 32,
        "conditioning_dim": 32,
        "min_value": 0,
        "max_value": 32,
    },
    "StableAudio3DiTModel": {
        "io_channels": 8,
        "patch_size": 1,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "cond_token_dim": 32,
        "global_cond_dim": 32,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 16,
        "ff_mult": 2,
        "num_memory_tokens": 3,
        "use_differential_attention": False,
    },
    "StableAudio3DurationEmbedder": {"output_dim": 32, "fourier_dim": 16},
    "T5GemmaEncoderModel": {"encoder": _GEMMA, "decoder": _GEMMA, "is_encoder_decoder": False},
    "AceStepTransformer1DModel": _BLOCKS
    | {
        "num_hidden_layers": 1,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "sliding_window": 16,
    },
    "AceStepConditionEncoder": _BLOCKS
    | {
        "text_hidden_dim": 32,
        "timbre_hidden_dim": 8,
        "num_lyric_encoder_hidden_layers": 1,
        "num_timbre_encoder_hidden_layers": 1,
        "sliding_window": 16,
    },
    "AudioLDM2UNet2DConditionModel": UNET | {"cross_attention_dim": (32, 32)},
    "AudioLDM2ProjectionModel": {
        "text_encoder_dim": 8,
        "text_encoder_1_dim": 32,
        "langauge_model_dim": 32,
    },
    "ClapModel": {
        "projection_dim": 8,
        "text_config": _CLAP | {"num_attention_heads": 1, "vocab_size": 128, "pad_token_id": 1},
        "audio_config": _CLAP
        | {
            "spec_size": 8,
            "window_size": 4,
            "num_mel_bins": 8,
            "depths": [1, 1],
            "num_attention_heads": [1, 1],
            "hidden_size": 192,
            "patch_size": 2,
            "patch_stride": 2,
            "patch_embed_input_channels": 4,
        },
    },
    "GPT2LMHeadModel": {
        "n_embd": 32,
        "n_head": 1,
        "n_layer": 1,
        "vocab_size": 128,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_new_tokens": 8,
    },
    "SpeechT5HifiGan": {
        "model_in_dim": 8,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "normalize_before": False,
    },
}
