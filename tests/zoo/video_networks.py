"""Tiny networks of videos, and others: what each class needs besides the usual sizes."""

from typing import Any

from zoo.networks import UNET

__all__ = ["VIDEO_NETWORKS"]

_WAN = {"attention_head_dim": 12, "in_channels": 16, "out_channels": 16}

VIDEO_NETWORKS: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": {
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 8,
    },
    "CogVideoXTransformer3DModel": {
        "sample_width": 2,
        "sample_height": 2,
        "sample_frames": 9,
        "max_text_seq_length": 16,
    },
    "CosmosTransformer3DModel": {"mlp_ratio": 2, "adaln_lora_dim": 4, "max_size": (4, 32, 32)},
    "HunyuanVideoTransformer3DModel": {
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "rope_axes_dim": (4, 4, 8),
    },
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 9,
        "mlp_ratio": 2.0,
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "rope_axes_dim": (4, 4, 8),
        "target_size": 16,
        "task_type": "t2v",
        "patch_size": 1,
        "patch_size_t": 1,
    },
    "LTXVideoTransformer3DModel": {"in_channels": 8, "out_channels": 8},
    "LatteTransformer3DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
    },
    "MochiTransformer3DModel": {"in_channels": 12, "out_channels": 12, "num_layers": 2},
    "MotifVideoTransformer3DModel": {
        "in_channels": 33,
        "out_channels": 16,
        "attention_head_dim": 12,
        "patch_size": 1,
        "patch_size_t": 1,
        "rope_axes_dim": (4, 4, 4),
    },
    "SanaVideoTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "qk_norm": "rms_norm_across_heads",
    },
    "WanTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN | {"in_channels": 36, "image_dim": 32},
    "WanAnimateTransformer3DModel": _WAN
    | {"in_channels": 36, "latent_channels": 16, "image_dim": 32},
    "AnyFlowTransformer3DModel": _WAN,
    "AnyFlowFARTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN | {"vace_layers": [0], "vace_in_channels": 96},
    "SkyReelsV2Transformer3DModel": _WAN,
    "DreamLiteUNetModel": UNET
    | {
        "block_out_channels": (32, 64),
        "down_block_types": (
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        "addition_embed_type": "time",  # of the height and the width
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 2 * 4,
        "attention_head_dim": 8,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32,
        "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 32,
        "rope_axes_dim": (4, 4, 8),
    },
    "QwenImage21Transformer2DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "context_in_dim": 32,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": 4,
        "dim": 32,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    },
    "StableUnCLIPImageNormalizer": {"embedding_dim": 32},
    "PriorTransformer": {"embedding_dim": 32, "num_embeddings": 77},
    "CosmosControlNetModel": {
        "n_controlnet_blocks": 1,
        "in_channels": 18,
        "model_channels": 32,
        "mlp_ratio": 2,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "img_context_dim_in": None,
    },
    "EasyAnimateTransformer3DModel": {
        "mmdit_layers": 1,
        "text_embed_dim_t5": None,
        "patch_size": 2,
        "sample_width": 8,
        "sample_height": 8,
    },
}
