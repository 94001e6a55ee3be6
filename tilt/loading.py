"""Loading of pipelines by name, embedded, from a folder or from the hub, and of their parts."""

import difflib
import os
import textwrap
import warnings
from dataclasses import replace
from typing import Any

import torch

from finetune.ranges import one_of
from steering import tiny
from steering.adapters import check_lora, load_lora
from steering.attention import set_attention, shield
from steering.hub import HUB_ID, one_sentence, where
from tilt import offloading, quantization
from tilt.model_files import files_of, index_of, variant_of

__all__ = [
    "ABOUT_DTYPE",
    "DTYPE",
    "DTYPES",
    "PREVIEWS",
    "check_name",
    "check_trainable",
    "empty_network",
    "load_pipeline",
    "load_preview",
    "pick_device",
    "pick_dtype",
    "pick_preview",
    "resolved",
    "set_attention",
    "tune",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE = one_of("auto", *DTYPES)  # what the option --dtype may be, and its help
ABOUT_DTYPE = "dtype of the networks; auto is float32 on a CPU, else half precision"
# (latent channels, scaling factor) of an AutoencoderKL -> the AutoencoderTiny for its latents:
# Stable Diffusion 1 and 2, SDXL, SD3 and 3.5, Flux, and other models with their VAEs.
# https://github.com/madebyollin/taesd
PREVIEWS = {
    (4, 0.18215): "madebyollin/taesd",
    (4, 0.13025): "madebyollin/taesdxl",
    (16, 1.5305): "madebyollin/taesd3",
    (16, 0.3611): "madebyollin/taef1",
}
_EMBEDDED = "tiny"  # the preview decoder of tiny.NAMES


def check_name(name: str) -> None:
    """Raise ValueError, without heavy imports, if `name` cannot be a pipeline."""
    path = os.path.expanduser(name)
    if name in tiny.NAMES or os.path.isfile(os.path.join(path, "model_index.json")):
        return
    known = f"a folder that pipe.save_pretrained() wrote, a hub id, or {' or '.join(tiny.NAMES)}"
    if name and os.path.exists(path):
        raise ValueError(f"{name} is not a pipeline (it has no model_index.json): give {known}")
    if not HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(name, tiny.NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {known}"
        shown = name if name.strip() else repr(name)
        raise ValueError(f"there is no model {shown:.80}: {hint}")


def load_pipeline(
    name: str,
    dtype: torch.dtype,
    lora: str | None = None,
    quantize: str = "none",
    **components: Any,
) -> Any:
    """Load the pipeline `name`, embedded, a folder or a hub id (in this order), on the CPU
    in `dtype`.

    quantize: "none", "8bit" or "4bit" (`tilt.quantization`), which loads to the GPU; components:
    modules that replace the stored ones. Raises ValueError if the name does not exist or is not a
    pipeline, and if the LoRA does not fit completely (`load_lora`).
    """
    check_name(name)
    path, offline = (name, True) if name in tiny.NAMES else where(name)
    check_lora(lora)
    index = index_of(name, str(tiny.FOLDER / name) if name in tiny.NAMES else path, offline)
    with one_sentence(f"the model {name}", path, offline):
        from diffusers import DiffusionPipeline

        if quantize != "none":
            made = quantization.config_of(quantize, dtype, index, components)
            components["quantization_config"] = made
        if name in tiny.NAMES:
            pipe = tiny.load(name, dtype=dtype, **components)
        else:
            variant = variant_of(index, files_of(path, offline))
            pipe = DiffusionPipeline.from_pretrained(
                path, dtype=dtype, local_files_only=offline, variant=variant, **components
            )
    if lora is not None:
        load_lora(pipe, lora)
    return pipe


def empty_network(name: str) -> tuple[str, Any]:
    """Return the denoising network of a pipeline without weights (on the meta device), and before
    it the name by which the pipeline has it.

    Buffers are computed. Raises ValueError if the network's class is not one of diffusers.
    """
    check_name(name)
    shield()
    path, offline = (str(tiny.FOLDER / name), True) if name in tiny.NAMES else where(name)
    with one_sentence(f"the model {name}", path, offline):
        import diffusers
        from accelerate import init_empty_weights
        from diffusers.models.modeling_utils import no_init_weights

        index: Any = diffusers.DiffusionPipeline.load_config(path, local_files_only=offline)
        part = next((p for p in ("transformer", "unet") if (index.get(p) or [None])[0]), "")
        kind = getattr(diffusers, (index.get(part) or ["", ""])[1], None)
        if kind is None:
            raise ValueError(
                f"the model {name} has no network of diffusers that can be made without its "
                "weights; set fsdp_cpu_ram_efficient_loading: false"
            )
        config = kind.load_config(path, subfolder=part, local_files_only=offline)
        with init_empty_weights(include_buffers=False), no_init_weights():
            return part, kind.from_config(config).eval()


def check_trainable(name: str) -> Any:
    """Raise ValueError, before weights are loaded, for a pipeline that cannot be trained.

    Returns its class; None if it is not known before the model is loaded.
    """
    check_name(name)
    if name in tiny.NAMES:
        return None
    index = index_of(name, *where(name))
    import diffusers

    from finetune.network import check_kind

    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is not None:
        held = [part for part, about in index.items() if isinstance(about, list) and about[0]]
        check_kind(kind, held)
    return kind


def pick_preview(choice: str, model: str) -> str:
    """Return the name of the preview decoder for `choice`, without loading the model.

    The name is a folder, a hub id, "tiny" (the embedded one) or "none". For "auto", only the
    configurations of the model and its VAE are read; raises ValueError if that is missing.
    """
    if choice != "auto":
        return choice
    if model in tiny.NAMES:
        return _EMBEDDED
    path, offline = where(model)
    index = index_of(model, path, offline)
    if (index.get("vae") or (None, None))[1] != "AutoencoderKL":
        return "none"
    with one_sentence(f"the model {model}", path, offline):
        from diffusers import AutoencoderKL

        return _suited(AutoencoderKL.load_config(path, subfolder="vae", local_files_only=offline))


def _suited(config: Any) -> str:
    """Return the published decoder for an AutoencoderKL that scales by 8; "none" for others."""
    # Playground 2.5 normalises SDXL's latents by numbers that a preview decoder does not use
    if config.get("latents_mean") is not None or len(config.get("block_out_channels", ())) != 4:
        return "none"
    traits = config.get("latent_channels", 4), config.get("scaling_factor", 0.18215)
    return PREVIEWS.get(traits, "none")


def load_preview(choice: str, model: str, dtype: torch.dtype, pipe: Any = None) -> Any:
    """Load the AutoencoderTiny that `choice` names: a folder or hub id, "tiny", "none", or "auto".

    auto: the decoder that suits `pipe`, the embedded one for an embedded `model`; None for others.
    Raises ValueError if it is missing, also for auto, since the scores during the run would differ
    without it.
    """
    if choice == "auto":
        choice = _EMBEDDED if model in tiny.NAMES else "none"
        vae: Any = getattr(pipe, "vae", None)
        if choice == "none" and type(vae).__name__ == "AutoencoderKL":
            choice = _suited(vae.config)
    if choice == "none":
        return None
    shield()
    path, offline = ("", False) if choice == _EMBEDDED else where(choice)
    without = "--preview none" if choice in PREVIEWS.values() else ""  # auto may have chosen it
    with one_sentence(f"the preview decoder {choice}", path, offline, without):
        from diffusers import AutoencoderTiny

        if choice == _EMBEDDED:
            embedded: Any = tiny.preview()
            return embedded.to(dtype)
        return AutoencoderTiny.from_pretrained(path, dtype=dtype, local_files_only=offline)


def pick_device(name: str) -> torch.device:
    """Return a device by name; auto is the first accelerator that torch finds, else the CPU.

    Raises ValueError if the device is not available.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        with warnings.catch_warnings():  # about deprecated device types
            warnings.simplefilter("ignore")
            one = torch.ones(1, device=str(name))
        one.item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" ...")
        shown = str(name) if str(name).strip() else repr(name)
        raise ValueError(f"device {shown:.80} cannot be used here ({reason}): try auto") from None
    return one.device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a dtype by name; auto is float32 on a CPU, else the half precision that suits it.

    Raises ValueError for an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            known = ", ".join(["auto", *DTYPES])
            raise ValueError(f"dtype is {name!r:.80}: pass one of {known}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old or device.type == "mps" else torch.bfloat16


def resolved(settings: Any) -> Any:
    """Return the settings with "auto" replaced by the dtype that it means here, to be recorded.

    Raises ValueError if their `quantize` and `offload` are not possible here.

    Nothing is allocated on a device, since every process would take memory of the first GPU.
    """
    from accelerate.utils import parse_flag_from_env

    quantization.check(settings.quantize)
    offloading.check(settings.offload, settings.quantize)

    device, kind = torch.device("cpu"), torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        own = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.accelerator.device_count())
        device = torch.device(kind.type, own)
    dtype = pick_dtype(settings.dtype, device)
    return replace(settings, dtype=str(dtype).removeprefix("torch."))


def tune(pipe: Any, compile: bool = False, preview: Any = None) -> None:
    """Optimise the networks for speed, in place; images change only by rounding.

    On CUDA, convolutional networks (UNet, ControlNet, VAE and `preview`) are converted to
    channels_last. compile: compile the denoising networks with torch.compile for each input shape,
    which takes minutes at the first step and needs a compiler.
    """
    from steering.networks import networks

    if pipe._execution_device.type == "cuda":
        parts = [getattr(pipe, name, None) for name in ("unet", "controlnet", "vae")]
        for part in (*parts, preview):
            # 5-D weights, of video models, do not support this layout
            if part is not None and all(weight.ndim < 5 for weight in part.parameters()):
                part.to(memory_format=torch.channels_last)
    if compile:
        for network in networks(pipe).values():
            network.compile(dynamic=False)  # in place, which keeps its class and state dict
