"""Tiny random components of diffusers and transformers, by the name of their class.

A component is built from its class's own parameters: what a parameter is called says how small it
may be (`SIZES`), and what a class needs otherwise stands in `CONFIGS`. All texts are 32 wide.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false
# diffusers exports lazily and annotates more narrowly than it takes

import inspect
import string
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["build"]

_LETTERS = string.ascii_lowercase + string.digits + ".,'-"
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>"),
)
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# parameter -> value, wherever a class has it
SIZES: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "joint_attention_dim": 32,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "pooled_projection_dim": 32,
    "caption_projection_dim": 32,
    "text_embed_dim": 32,
    "text_dim": 32,
    "ffn_dim": 32,
    "time_embed_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 4,
    "max_sequence_length": 16,
    "rope_max_seq_len": 32,
}
_TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
_TOWER = {"image_size": 32, "patch_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 4]}
_SEEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
}
_VL = {
    "text_config": _TEXT | {"rope_parameters": _ROPE},
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "vision_token_id": 5,
    "image_token_id": 5,
    "video_token_id": 6,
}
_QWEN2 = _VL | {"vision_config": _SEEN | {"fullatt_block_indexes": [0]}}
_QWEN3 = _VL | {"vision_config": _SEEN | {"deepstack_visual_indexes": [1]}}
_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
}
_KL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}
_VIDEO_KL = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8)}
_JOY = {"hidden_size": 32, "rope_dim_list": [4, 4, 8]}
_WAN = {"attention_head_dim": 12, "in_channels": 16, "out_channels": 16}
_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "caption_projection_dim": 32,
}
_PACKED = {"in_channels": 16, "patch_size": 1}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# class -> what it needs besides, or otherwise
CONFIGS: dict[str, dict[str, Any]] = {
    # texts
    "CLIPTextModel": _TEXT | {"max_position_embeddings": 77},
    "CLIPTextModelWithProjection": _TEXT | {"max_position_embeddings": 77},
    "CLIPVisionModel": _TEXT | _TOWER,
    "CLIPVisionModelWithProjection": _TEXT | _TOWER,
    "SiglipVisionModel": _TEXT | _TOWER,
    "Siglip2VisionModel": _TEXT | {"num_patches": 16, "patch_size": 8},
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "BertModel": _TEXT,
    "Gemma2Model": _TEXT,
    "GemmaModel": _TEXT,
    "GlmModel": _TEXT | {"pad_token_id": 0},
    "LlamaModel": _TEXT,
    "LlamaForCausalLM": _TEXT,
    "Qwen3Model": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "SmolLM3ForCausalLM": _TEXT,
    "T5GemmaEncoder": _TEXT,
    "Qwen2_5_VLTextModel": _TEXT | {"rope_parameters": _ROPE},
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "Qwen3VLModel": _QWEN3,
    "Qwen2VLForConditionalGeneration": _VL
    | {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}},
    "T5Gemma2Encoder": {
        "text_config": _TEXT | {"dropout_rate": 0.0},
        "vision_config": _TEXT | _TOWER,
        "image_token_index": 5,
    },
    "Mistral3Model": {"text_config": _TEXT, "vision_config": _TEXT | _TOWER},
    "Mistral3ForConditionalGeneration": {"text_config": _TEXT, "vision_config": _TEXT | _TOWER},
    "MultilingualCLIP": _TEXT | {"transformerDimensions": 32, "numDims": 32},
    # decoders
    "AutoencoderKL": _KL | {"shift_factor": 0.1},
    "AutoencoderKLFlux2": _KL,
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    "AutoencoderKLWan": {
        "in_channels": 3,
        "out_channels": 3,
        "base_dim": 3,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
    },
    "AutoencoderKLQwenImage": {
        "input_channels": 3,
        "base_dim": 12,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    },
    "AutoencoderKLQwenImage21": {
        "base_dim": 12,
        "decoder_base_dim": 12,
        "z_dim": 16,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    "AutoencoderKLAllegro": _VIDEO_KL,
    "AutoencoderKLCogVideoX": _VIDEO_KL,
    "AutoencoderKLHunyuanVideo": _VIDEO_KL,
    "AutoencoderKLHunyuanVideo15": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 16),
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 64, 64),
        "spatial_compression_ratio": 8,
        "scaling_factor": 0.476986,
        "sample_size": 16,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
        "in_channels": 15,
        "out_channels": 3,
        "latent_channels": 12,
    },
    "AutoencoderKLLTXVideo": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "timestep_conditioning": False,
        "patch_size": 1,
        "patch_size_t": 1,
        "encoder_causal": True,
        "decoder_causal": False,
    },
    "AutoencoderKLCosmos": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (8,) * 4,
        "decode_block_out_channels": (8,) * 4,
        "attention_resolutions": (8,),
        "resolution": 64,
        "num_layers": 2,
        "patch_size": 4,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLMagvit": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8,) * 4,
        "down_block_types": (
            "SpatialDownBlock3D",
            *("SpatialTemporalDownBlock3D",) * 3,
        ),
        "up_block_types": (
            "SpatialUpBlock3D",
            *("SpatialTemporalUpBlock3D",) * 3,
        ),
        "spatial_group_norm": False,
    },
    "VQModel": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
        "norm_type": "spatial",
    },
    # networks
    "UNet2DConditionModel": _UNET,
    "UNet3DConditionModel": _UNET
    | {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "attention_head_dim": 4,
    },
    "MotionAdapter": {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_mid_block_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 4,
    },
    "ControlNetModel": {
        **{name: _UNET[name] for name in ("block_out_channels", "down_block_types")},
        "conditioning_embedding_out_channels": (4, 8),
        "attention_head_dim": 2,
    },
    "SparseControlNetModel": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
        "conditioning_embedding_out_channels": (4, 8),
        "conditioning_channels": 3,
        "use_simplified_condition_embedding": False,
    },
    "ControlNetUnionModel": {
        **{name: _UNET[name] for name in ("block_out_channels", "down_block_types")},
        "conditioning_embedding_out_channels": (4, 8),
        "attention_head_dim": 2,
        "num_trans_channel": 8,
        "num_trans_head": 2,
        "num_proj_channel": 8,
    },
    "T2IAdapter": {"in_channels": 3, "channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4},
    "SD3Transformer2DModel": _SD3,
    "SD3ControlNetModel": _SD3,
    "FluxTransformer2DModel": _PACKED | {"out_channels": 16, "guidance_embeds": True},
    "FluxControlNetModel": _PACKED | {"guidance_embeds": True},
    "ChromaTransformer2DModel": _PACKED
    | {
        "out_channels": 16,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 16,
    },
    "BriaTransformer2DModel": _PACKED,
    "BriaFiboTransformer2DModel": {
        "in_channels": 16,
        "joint_attention_dim": 64,
        "text_encoder_dim": 32,
    },
    "OvisImageTransformer2DModel": _PACKED | {"out_channels": 16},
    "LongCatImageTransformer2DModel": {"in_channels": 64, "patch_size": 1},
    "JoyImageEditTransformer3DModel": _JOY,
    "JoyImageEditPlusTransformer3DModel": _JOY,
    "QwenImageTransformer2DModel": {"in_channels": 16, "patch_size": 2},
    "QwenImageControlNetModel": {"in_channels": 16, "patch_size": 2, "num_layers": 1},
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 16,
        "patch_size": 2,
        "moe_enabled": False,
        "capacity_factors": [8.0],
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 32,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
    },
    "PixArtTransformer2DModel": {"sample_size": 8, "patch_size": 2, "out_channels": 8},
    "SanaTransformer2DModel": {
        "patch_size": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "sample_size": 32,
    },
    "SanaControlNetModel": {
        "patch_size": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "sample_size": 32,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
    },
    "CogView3PlusTransformer2DModel": {"condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8},
    "CogView4Transformer2DModel": {"condition_dim": 4, "sample_size": 8},
    "HunyuanDiT2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_layers": 2,
        "cross_attention_dim_t5": 32,
        "text_len": 77,
        "text_len_t5": 256,
    },
    "HunyuanDiT2DControlNetModel": {
        "sample_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "transformer_num_layers": 4,
        "cross_attention_dim_t5": 32,
        "text_len": 77,
        "text_len_t5": 256,
    },
    "HunyuanImageTransformer2DModel": {
        "text_embed_2_dim": 32,
        "rope_axes_dim": (8, 8),
        "patch_size": (1, 1),
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 8),
        "cap_feat_dim": 32,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 4,
        "hidden_size": 16,
        "num_attention_heads": 1,
        "num_kv_heads": 1,
        "multiple_of": 16,
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": (4, 4, 8),
        "axes_lens": [256, 32, 32],
    },
    "OmniGenTransformer2DModel": {
        "pad_token_id": 1,
        "hidden_size": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 300,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        "time_step_dim": 4,
    },
    "PRXTransformer2DModel": {
        "patch_size": 1,
        "context_in_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 1,
        "axes_dim": [8, 8],
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 32,
        "injection_layer_ids": (0,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 64,
        "axes_dims": (4, 4, 8),
        "axes_lens": (2048, 64, 64),
    },
    "Kandinsky3UNet": {
        "layers_per_block": 3,
        "time_embedding_dim": 4,
        "groups": 2,
        "attention_head_dim": 4,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 4,
        "encoder_hid_dim": 32,
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4,
        "in_text_dim": 32,
        "in_text_dim2": 32,
        "time_dim": 16,
        "out_visual_dim": 4,
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 8),
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "caption_channels": [32, 32],
        "text_emb_dim": 64,
        "axes_dims_rope": (4, 4, 8),
        "max_resolution": (32, 32),
        "llama_layers": [0, 1],
    },
    # videos
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
    "WanAnimateTransformer3DModel": _WAN | {"in_channels": 36, "image_dim": 32},
    "AnyFlowTransformer3DModel": _WAN,
    "AnyFlowFARTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN | {"vace_layers": [0], "vace_in_channels": 96},
    "SkyReelsV2Transformer3DModel": _WAN,
    "DreamLiteUNetModel": _UNET
    | {
        "block_out_channels": (32, 64),
        "down_block_types": (
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
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
    "LlavaForConditionalGeneration": {
        "text_config": _TEXT,
        "vision_config": _TEXT | _TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
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
    # schedulers
    "DDIMScheduler": _BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "UniPCMultistepScheduler": _FLOW,
}
# annotations that stand for several classes, or for one that the weights decide
_INSTEAD = {
    "KarrasDiffusionSchedulers": "DDIMScheduler",
    "SchedulerMixin": "FlowMatchEulerDiscreteScheduler",
    "Gemma2PreTrainedModel": "Gemma2Model",
    "GemmaPreTrainedModel": "GemmaModel",
    "BaseGuidance": "AdaptiveProjectedGuidance",
    "PreTrainedModel": "Qwen3Model",
    "AsymmetricAutoencoderKL": "AutoencoderKL",
}


def build(name: str, changes: dict[str, Any], cls: Any = None) -> Any:
    """A small component of the class `name`, with `changes` to its config.

    `cls` is the class itself, for those that neither library exports.
    """
    if name in _TOKENIZERS:
        return _TOKENIZERS[name]()
    if name == "CosmosSafetyChecker":
        return Harmless()
    name = _INSTEAD.get(name, name)
    source = transformers if hasattr(transformers, name) else diffusers
    cls = getattr(source, name, cls)
    config = CONFIGS.get(name, {}) | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        if issubclass(cls, transformers.PreTrainedModel):
            made = cls(cls.config_class(**config))
        else:
            known = inspect.signature(cls.__init__).parameters
            sizes = {key: value for key, value in SIZES.items() if key in known}
            if "down_block_types" in config:
                sizes.pop("num_attention_heads", None)  # of a U-Net it means attention_head_dim
            made = cls(**(config if "Scheduler" in name else sizes | config))
        return _awake(made) if isinstance(made, torch.nn.Module) else made


class Harmless:
    """In place of a safety checker whose package is not there."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _awake(network: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, and with values where a layer starts at zero, and would have no effect."""
    for weight in network.parameters():
        if not weight.any() or not weight.isfinite().all():
            torch.nn.init.normal_(weight, std=0.1)
    return network.eval()


def _clip() -> Any:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(c + "</w>" for c in _LETTERS)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


def _qwen() -> Any:
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *sorted(ByteLevel.alphabet())])}
    made = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], model_max_length=512, additional_special_tokens=list(_SPECIAL)
    )
    made.chat_template = _TEMPLATE
    return made


def _gemma() -> Any:
    vocab = {p: i for i, p in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[])


def _llama() -> Any:
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", "▁", *_LETTERS])}
    made = transformers.LlamaTokenizer(vocab=vocab, merges=[])
    made.pad_token = "</s>"
    return made


def _bert() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {p: i for i, p in enumerate([*special, *_LETTERS, *("##" + c for c in _LETTERS)])}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=77)


def _xlmr() -> Any:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *_LETTERS, "<mask>"]
    return transformers.XLMRobertaTokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)])


def _sees(processor: str, patch: int) -> Any:
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2
    )
    videos = getattr(transformers, processor.replace("Processor", "VideoProcessor"))()
    cls = getattr(transformers, processor)
    return cls(images, _qwen(), video_processor=videos, chat_template=_TEMPLATE)


_TOKENIZERS = {
    "CLIPTokenizer": _clip,
    "T5Tokenizer": _t5,
    "Qwen2Tokenizer": _qwen,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _llama,
    "BertTokenizer": _bert,
    "XLMRobertaTokenizer": _xlmr,
    "CLIPImageProcessor": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=32
    ),
    "SiglipImageProcessor": lambda: transformers.SiglipImageProcessor(
        size={"height": 32, "width": 32}
    ),
    "ByT5Tokenizer": lambda: transformers.ByT5Tokenizer(),
    "Qwen2VLProcessor": lambda: _sees("Qwen2VLProcessor", 14),
    "Qwen3VLProcessor": lambda: _sees("Qwen3VLProcessor", 16),
}
