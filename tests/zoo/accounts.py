"""What becomes of every pipeline that diffusers exports: it runs, is refused, or a reason."""

# pyright: reportPrivateImportUsage=false

import inspect
import re
import warnings
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline

from zoo.audio import ANIMALS as SOUNDS
from zoo.building import Animal, pipeline_of
from zoo.image import ANIMALS as IMAGES
from zoo.video import ANIMALS as VIDEOS

__all__ = ["ANIMALS", "REASONS", "REFUSED", "bare", "exported", "reason", "refusal"]

ANIMALS: dict[str, Animal] = IMAGES | VIDEOS | SOUNDS

# class -> how steer() refuses it
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "IFPipeline",
            "IFImg2ImgPipeline",
            "IFImg2ImgSuperResolutionPipeline",
            "IFInpaintingPipeline",
            "IFInpaintingSuperResolutionPipeline",
            "IFSuperResolutionPipeline",
        ),
        "takes its variance from the network",
    ),
    **dict.fromkeys(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        "sets its timesteps by original_inference_steps=",
    ),
    **dict.fromkeys(
        (
            "LongCatAudioDiTPipeline",
            "StableAudioPipeline",
            "Kandinsky6TI2VAPipeline",
            "LTX2Pipeline",
            "LTX2ConditionPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
            "LTX2HDRPipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2InContextPipeline",
            "Cosmos3OmniPipeline",
        ),
        "generates sound",
    ),
    **dict.fromkeys(
        (
            "KandinskyPriorPipeline",
            "KandinskyV22PriorPipeline",
            "KandinskyV22PriorEmb2EmbPipeline",
            "FluxPriorReduxPipeline",
            "ShapEPipeline",
            "LLaDA2Pipeline",
            "DiffusionGemmaPipeline",
            "StableCascadePriorPipeline",
        ),
        "generates no images",
    ),
    **dict.fromkeys(
        (
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintCombinedPipeline",
        ),
        "runs other pipelines",
    ),
    **dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        "each frame its own timestep and scheduler",
    ),
    "CosmosTextToWorldPipeline": "is no flow-matching scheduler and has no betas",
    "CosmosVideoToWorldPipeline": "is no flow-matching scheduler and has no betas",
    "AnyFlowFARPipeline": "is no flow-matching scheduler and has no betas",
    "AnyFlowPipeline": "is no flow-matching scheduler and has no betas",
}
# class -> why it is neither built nor refused here
REASONS: dict[str, str] = {
    "ChromaInpaintPipeline": "its own call fails: it asks for a field that Chroma's config lacks",
    **dict.fromkeys(
        (
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
            "EasyAnimateInpaintPipeline",
            "GlmImagePipeline",
            "HunyuanImageRefinerPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "Ideogram4Pipeline",
            "Kandinsky5I2IPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyPipeline",
            "LDMTextToImagePipeline",
            "OmniGenPipeline",
            "QwenImageLayeredPipeline",
            "SanaSprintPipeline",
            "SanaSprintImg2ImgPipeline",
            "SanaWMPipeline",
            "WanAnimatePipeline",
        ),
        "no tiny instance of it is right yet",
    ),
    "LongCatImagePipeline": "its texts of 512 tokens take too long here",
    "JoyImageEditPipeline": "it makes every picture 1024 pixels wide, which takes too long here",
    "EasyAnimateControlPipeline": "its own call fails: encode_prompt() takes no text_encoder_index",
}
_MEDIA = {
    "sound": r"AudioDiffusion|Spectrogram|DanceDiffusion",
}


def exported() -> list[str]:
    """The names that diffusers exports for pipelines, modular ones too."""
    with warnings.catch_warnings(action="ignore"):  # Kolors is imported with torch.jit.script
        return sorted(name for name in dir(diffusers) if "Pipeline" in name and _is_one(name))


def _is_one(name: str) -> bool:
    try:
        cls = getattr(diffusers, name)
    except AttributeError:
        return True
    known = (DiffusionPipeline, ModularPipeline)
    return inspect.isclass(cls) and (issubclass(cls, known) or hasattr(cls, "_backends"))


def reason(name: str) -> str | None:
    """Why `name` is not tried at all; None where it is."""
    if name in REASONS:
        return REASONS[name]
    for made, pattern in _MEDIA.items():
        if re.search(pattern, name):
            return f"it makes {made}"
    try:
        cls: Any = getattr(diffusers, name)
    except AttributeError:
        return "diffusers exports the name alone"
    missing = [b for b in getattr(cls, "_backends", ()) if not _available(b)]
    if missing or "Onnx" in name:
        return f"it needs {', '.join(missing) or 'onnx'}"
    if name in ("DiffusionPipeline", "ModularPipeline"):
        return "it is a base class"
    if getattr(cls, "_last_supported_version", None) or ".deprecated." in cls.__module__:
        return "diffusers has deprecated it"
    return None


def refusal(name: str) -> str | None:
    """How steer() refuses `name`, as a pattern; None where it should run."""
    cls: Any = getattr(diffusers, name)
    if issubclass(cls, ModularPipeline):
        return "pass a diffusers pipeline"
    if "prompt" not in inspect.signature(cls.__call__).parameters:
        return "takes no prompt|generates no images"
    return REFUSED.get(name)


def bare(name: str) -> Any:
    """An instance without components: what is refused by its class needs no more."""
    cls: Any = getattr(diffusers, name)
    if re.search(
        "Combined|AnyFlow|ToWorld", name
    ):  # what they are refused by is made by their parts
        return pipeline_of(name, ANIMALS.get(name, Animal()))
    made = cls.__new__(cls)
    if issubclass(cls, DiffusionPipeline):
        modules, _ = cls._get_signature_keys(cls)
        made.register_modules(**dict.fromkeys(modules))
    if name.startswith("IF"):
        made.scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    return made


def _available(backend: str) -> bool:
    return getattr(diffusers.utils, f"is_{backend}_available")()
