"""The video pipelines that need more than their signatures say."""

from zoo.building import Animal, squashed

__all__ = ["ANIMALS"]

_LTX = Animal(call={"height": 32, "width": 32})
_DECODE = {"decode": squashed}
_KARRAS = {"scheduler": {"use_karras_sigmas": True}}
_SAFE = {"safety_checker": "CosmosSafetyChecker"}

ANIMALS: dict[str, Animal] = {
    "ChronoEditPipeline": Animal(
        {
            "image_encoder": "CLIPVisionModel",
            "image_processor": "CLIPImageProcessor",
        },
        call={"num_frames": 5},
    ),
    "CogVideoXFunControlPipeline": Animal({"transformer": {"in_channels": 8}}),
    "CogVideoXImageToVideoPipeline": Animal({"transformer": {"in_channels": 8}}),
    "AllegroPipeline": Animal(call={"height": 32, "width": 32}, steer=_DECODE),
    "Cosmos2TextToImagePipeline": Animal(
        _SAFE | _KARRAS | {"transformer": {"in_channels": 16, "out_channels": 16}}
    ),
    "Cosmos2VideoToWorldPipeline": Animal(
        _SAFE | _KARRAS | {"transformer": {"in_channels": 17, "out_channels": 16}}
    ),
    "Cosmos2_5_PredictBasePipeline": Animal(
        _SAFE | _KARRAS | {"transformer": {"in_channels": 17, "out_channels": 16}}
    ),
    "CosmosTextToWorldPipeline": Animal(_SAFE),
    "CosmosVideoToWorldPipeline": Animal(_SAFE | {"transformer": {"in_channels": 5}}),
    "HunyuanSkyreelsImageToVideoPipeline": Animal({"transformer": {"in_channels": 8}}),
    "LTXConditionPipeline": _LTX,
    "LTXImageToVideoPipeline": Animal(
        call={"height": 32, "width": 32, "num_frames": 9}, steer=_DECODE
    ),
    "LTXI2VLongMultiPromptPipeline": Animal(
        call={"height": 32, "width": 32, "negative_prompt": None}
    ),
    "LTXPipeline": _LTX,
    "Cosmos2_5_TransferPipeline": Animal(
        _SAFE | _KARRAS | {"transformer": {"in_channels": 17, "out_channels": 16}}
    ),
    "HunyuanVideo15ImageToVideoPipeline": Animal(
        {"image_encoder": "SiglipVisionModel", "feature_extractor": "SiglipImageProcessor"}
    ),
    "HunyuanVideoFramepackPipeline": Animal(
        {"image_encoder": "SiglipVisionModel", "feature_extractor": "SiglipImageProcessor"}
    ),
    "HunyuanVideoImageToVideoPipeline": Animal({"image_processor": "CLIPImageProcessor"}),
    "WanImageToVideoPipeline": Animal(
        {
            "image_encoder": "CLIPVisionModel",
            "image_processor": "CLIPImageProcessor",
            "transformer": {"in_channels": 36, "image_dim": 32},
        }
    ),
    "WanAnimatePipeline": Animal(
        {"image_processor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModel"}
    ),
    "SanaImageToVideoPipeline": Animal(
        {"vae": "AutoencoderKLWan"},
        call={"height": 32, "width": 32, "frames": 9},
    ),
    "SanaVideoPipeline": Animal({"vae": "AutoencoderKLWan"}, call={"height": 32, "width": 32}),
    "SkyReelsV2ImageToVideoPipeline": Animal(
        {
            "image_encoder": "CLIPVisionModelWithProjection",
            "image_processor": "CLIPImageProcessor",
            "transformer": {"in_channels": 36, "image_dim": 32},
        }
    ),
    "Kandinsky5I2VPipeline": Animal(call={"num_frames": 21}, steer=_DECODE),
    "LucyEditPipeline": Animal({"transformer": {"in_channels": 32}}, call={"image": None}),
    "EasyAnimateControlPipeline": Animal({"transformer": {"in_channels": 8}}),
}
