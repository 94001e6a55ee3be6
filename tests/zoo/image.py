"""The text-to-image and image pipelines that need more than their signatures say."""

import torch

from zoo.building import Animal, picture, squashed

__all__ = ["ANIMALS"]

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_SANA = Animal(
    {"scheduler": ("DPMSolverMultistepScheduler", _FLOW)}, call={"height": 32, "width": 32}
)
_DECODE = Animal(steer={"decode": squashed})
_ADAPTER = Animal(
    {
        "adapter": {"downscale_factor": 2},
        "unet": {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    }
)
_FLUX_CONTROL = Animal({"transformer": {"in_channels": 32}})
_KONTEXT = Animal(call={"max_area": 256, "_auto_resize": False})
_EIGHT = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_KLEIN = Animal(call={"text_encoder_out_layers": (1,)}, steer={"decode": squashed})
_CONTROL = Animal(call={"image": picture(1)})
# as published: 1100 timesteps, texts projected to the network's width, their sum beside the sizes
_KOLORS = Animal(
    {
        "scheduler": (
            "EulerDiscreteScheduler",
            {
                "beta_start": 0.00085,
                "beta_end": 0.014,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1100,
                "steps_offset": 1,
                "timestep_spacing": "leading",
            },
        ),
        "unet": {
            "cross_attention_dim": 16,
            "encoder_hid_dim": 32,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
    }
)

ANIMALS: dict[str, Animal] = {
    "BriaFibo2Pipeline": Animal(
        {"transformer": {"cap_feat_dim": 96}},
        attributes={"text_encoder_out_layers": ((0, 1, 2), (0, 1, 2))},
    ),
    "BriaFiboEditPipeline": Animal(
        prompts=(
            '{"short_description": "a", "edit_instruction": "a red cube"}',
            '{"short_description": "a", "edit_instruction": "two dots"}',
        )
    ),
    "HunyuanDiTControlNetPipeline": Animal({"transformer": {"num_layers": 4}}),
    "JoyImageEditPipeline": Animal({"transformer": {"in_channels": 16, "out_channels": 16}}),
    "JoyImageEditPlusPipeline": Animal({"transformer": {"in_channels": 16, "out_channels": 16}}),
    "Lumina2Pipeline": Animal(call={"max_sequence_length": 16}),
    "CogView4ControlPipeline": Animal({"transformer": {"in_channels": 8}}),
    "Flux2KleinInpaintPipeline": _KLEIN,
    "Flux2KleinKVPipeline": Animal(call={"text_encoder_out_layers": (1,), "image": picture(0, 64)}),
    "Flux2KleinPipeline": _KLEIN,
    "Flux2Pipeline": Animal(
        {"tokenizer": "Qwen2VLProcessor"}, call={"text_encoder_out_layers": (1,)}
    ),
    "FluxControlImg2ImgPipeline": _FLUX_CONTROL,
    "FluxControlInpaintPipeline": _FLUX_CONTROL,
    "FluxControlPipeline": _FLUX_CONTROL,
    "FluxFillPipeline": Animal({"transformer": {"in_channels": 48}}),
    "FluxKontextInpaintPipeline": _KONTEXT,
    "FluxKontextPipeline": _KONTEXT,
    **{
        name: Animal(
            {
                "text_encoder_3": {"d_model": 64},
                "transformer": {"num_layers": 2},
                "controlnet": {"extra_conditioning_channels": int("Inpaint" in name)},
            }
        )
        for name in (
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3PAGImg2ImgPipeline",
            "StableDiffusion3PAGPipeline",
            "StableDiffusion3Pipeline",
        )
    },
    # it takes a network of 16 channels, or one of 33 for latents, mask and masked picture
    "StableDiffusion3InpaintPipeline": Animal(
        {
            "text_encoder_3": {"d_model": 64},
            "transformer": {"num_layers": 2, "in_channels": 16, "out_channels": 16},
            "vae": {"latent_channels": 16},
        }
    ),
    **{f"Kolors{task}Pipeline": _KOLORS for task in ("", "Img2Img", "PAG")},
    "HiDreamImagePipeline": Animal({"tokenizer_4": "LlamaTokenizer"}),
    "Ideogram4Pipeline": Animal(
        {"text_encoder": "Qwen3VLModel"},
        call={"max_sequence_length": 64, "guidance_scale": None, "guidance_schedule": [4.0] * 6},
    ),
    "IFPipeline": Animal({"unet": {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": 32}}),
    "Kandinsky5I2IPipeline": Animal(
        {"vae": _EIGHT},
        call={"max_sequence_length": 512},
        attributes={"resolutions": [(16, 16)]},
    ),
    "Kandinsky5T2IPipeline": Animal({"vae": _EIGHT}, attributes={"resolutions": [(16, 16)]}),
    "Krea2Pipeline": Animal(more={"text_encoder_select_layers": (0, 1, 2)}),
    "NucleusMoEImagePipeline": Animal(call={"return_index": -1}),
    "PRXPipeline": Animal(
        {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2Tokenizer", "vae": "AutoencoderKL"}
    ),
    "PRXPixelPipeline": Animal({"transformer": {"in_channels": 3}}),  # of pixels
    "PixArtSigmaPAGPipeline": Animal({"transformer": {"num_layers": 2}}),
    # its decoder makes pictures with transparency
    "QwenImage21Pipeline": Animal(call={"height": 32, "width": 32}, steer={"decode": squashed}),
    "LongCatImagePipeline": Animal({"vae": {"latent_channels": 16}}),
    "LongCatImageEditPipeline": Animal(
        {"vae": {"latent_channels": 16}},
        patches={"calculate_dimensions": lambda area, ratio: (16, 16)},
    ),
    **{
        name: Animal(patches={"calculate_dimensions": lambda area, ratio: (16, 16, 1)})
        for name in ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline")
    },
    "QwenImageEditPlusPipeline": Animal(
        patches={"calculate_dimensions": lambda area, ratio: (32, 32)}
    ),
    "QwenImageControlNetInpaintPipeline": Animal({"controlnet": {"extra_condition_channels": 4}}),
    "HunyuanImagePipeline": Animal(
        {
            "guider": (
                "AdaptiveProjectedMixGuidance",
                {"adaptive_projected_guidance_start_step": 1},
            )
        }
    ),
    "ErnieImagePipeline": _DECODE,
    "SanaPipeline": _SANA,
    "SanaPAGPipeline": _SANA,
    "SanaControlNetPipeline": _SANA,
    "SanaSprintPipeline": _SANA,
    "SanaSprintImg2ImgPipeline": _SANA,
    "StableDiffusionInstructPix2PixPipeline": Animal({"unet": {"in_channels": 8}}),
    "StableDiffusionXLInstructPix2PixPipeline": Animal({"unet": {"in_channels": 8}}),
    "StableDiffusionControlNetPipeline": _CONTROL,
    "StableDiffusionControlNetPAGPipeline": _CONTROL,
    "StableDiffusionXLControlNetPipeline": _CONTROL,
    "StableDiffusionXLControlNetPAGPipeline": _CONTROL,
    **{
        f"StableDiffusionXLControlNetUnion{task}Pipeline": Animal(
            call={"control_image": [picture(1)], "control_mode": [0]}
        )
        for task in ("", "Img2Img", "Inpaint")
    },
    "StableDiffusionXLAdapterPipeline": _ADAPTER,
    "StableDiffusionAdapterPipeline": _ADAPTER,
    "StableDiffusionDepth2ImgPipeline": Animal(
        {"unet": {"in_channels": 5}, "depth_estimator": None},
        call={"depth_map": torch.linspace(0, 1, 256).reshape(1, 16, 16)},
    ),
    "StableUnCLIPImg2ImgPipeline": Animal(
        {
            "image_encoder": "CLIPVisionModelWithProjection",
            "feature_extractor": "CLIPImageProcessor",
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64},
        }
    ),
    "StableUnCLIPPipeline": Animal(
        {"unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}}
    ),
    "QwenImageLayeredPipeline": Animal(
        {"vae": {"input_channels": 4}},
        call={"image": picture(0, 32)},
        patches={"calculate_dimensions": lambda area, ratio: (32, 32)},
    ),
    "ZImageControlNetInpaintPipeline": Animal({"controlnet": {"control_in_dim": 9}}),
    "StableDiffusionUpscalePipeline": Animal(
        {"unet": {"in_channels": 7, "num_class_embeds": 1000}}
    ),
    "StableDiffusionLatentUpscalePipeline": Animal({"unet": {"in_channels": 8}}),
}
