"""A pipeline by name: embedded, from a folder or from the hub; its LoRA, device and attention."""

import contextlib
import difflib
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steering import tiny

__all__ = [
    "DTYPES",
    "check_name",
    "load_pipeline",
    "load_preview",
    "pick_device",
    "pick_dtype",
    "set_attention",
]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def check_name(name: str) -> None:
    """Raise ValueError, before anything heavy is imported, for what cannot be a pipeline."""
    path = Path(name).expanduser()
    if name in tiny.NAMES or (path / "model_index.json").is_file():
        return
    known = f"a folder that pipe.save_pretrained() wrote, a hub id, or {' or '.join(tiny.NAMES)}"
    if path.exists():
        raise ValueError(f"{name} is no pipeline (it has no model_index.json): give {known}")
    if not _HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(name, tiny.NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {known}"
        raise ValueError(f"there is no model {name}: {hint}")


def load_pipeline(name: str, dtype: torch.dtype, lora: str | None = None, **components: Any) -> Any:
    """The pipeline `name` on the CPU in `dtype`: embedded, a folder, or a hub id (in that order).

    components: parts to use as they are, in place of those stored. Raises ValueError for what is
    not there, or is no pipeline.
    """
    check_name(name)
    path, offline = (name, True) if name in tiny.NAMES else _where(name)
    adapter = _where(lora) if lora else None
    with _one_sentence(f"the model {name}", path, offline):
        from diffusers import DiffusionPipeline

        if name in tiny.NAMES:
            pipe = tiny.load(name, dtype=dtype, **components)
        else:
            pipe = DiffusionPipeline.from_pretrained(
                path, dtype=dtype, local_files_only=offline, **components
            )
    if adapter:
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"{type(pipe).__name__} takes no LoRA: leave {lora} out")
        path, offline = adapter
        with _one_sentence(f"the LoRA {lora}", path, offline):
            pipe.load_lora_weights(path, local_files_only=offline)
    return pipe


def load_preview(choice: str, model: str, dtype: torch.dtype) -> Any:
    """The AutoencoderTiny that `choice` names: a folder or hub id, "none", or "auto".

    auto: that of an embedded `model`, None for others. Raises ValueError for what is not there.
    """
    if choice == "none" or (choice == "auto" and model not in tiny.NAMES):
        return None
    path, offline = ("", False) if choice == "auto" else _where(choice)
    with _one_sentence(f"the preview decoder {choice}", path, offline):
        from diffusers import AutoencoderTiny

        if choice == "auto":
            embedded: Any = tiny.preview()
            return embedded.to(dtype)
        return AutoencoderTiny.from_pretrained(path, dtype=dtype, local_files_only=offline)


def pick_device(name: str) -> torch.device:
    """A device by name; auto is the first accelerator that torch finds, else the CPU.

    Raises ValueError for one that is not there.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name} cannot be used here ({reason}): try auto") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; auto is float32 on a CPU, else the half type that the device is good at."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old or device.type == "mps" else torch.bfloat16


def set_attention(pipe: Any, name: str) -> None:
    """Choose the attention backend of the pipeline's networks; auto leaves them as they are.

    sdpa is PyTorch's own. xformers falls back to it, with a line in the log, where it cannot be
    used. Raises ValueError for a backend that diffusers does not know or that is not installed.
    """
    if name == "auto":
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    from steering.denoiser import networks

    backend = "native" if name == "sdpa" else name
    known = ["auto", "sdpa", *(item.value for item in AttentionBackendName)]
    if backend not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no attention {name}: {hint}")
    if name == "xformers" and not _xformers_works(pipe.device, pipe.dtype):
        logger.warning("xformers cannot be used here; going on with PyTorch's own attention")
        backend = "native"
    for network in networks(pipe).values():
        _set_backend(network, backend)


def _set_backend(network: Any, backend: str) -> None:
    dispatched = any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in network.modules()
    )
    if dispatched:
        with _one_sentence(f"the attention {backend}"):
            network.set_attention_backend(backend)
    elif backend == "xformers":  # the older networks, UNets and SD3's, have a switch of their own
        network.enable_xformers_memory_efficient_attention()
    elif backend != "native":
        kind = type(network).__name__
        logger.warning("%s has no choice of attention; %s is not used", kind, backend)


def _xformers_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Try it: a build for another torch imports, warns, and fails only when it is called."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

        x = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype)
        memory_efficient_attention(x, x, x)
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def _where(name: str) -> tuple[str, bool]:
    """A local path if there is one, else the hub id; and whether to look on this machine only.

    One short request finds out, where the loaders would try to connect for half a minute.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path), True
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"there is no {name}: give a folder or a hub id (owner/name)")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:  # the hub answered; its loader will say what is wrong
        return name, False
    except Exception:  # the client's library, and so its errors, changes with its version
        return name, True
    return name, False


@contextlib.contextmanager
def _one_sentence(what: str, path: str = "", offline: bool = False) -> Iterator[None]:
    """Failures to load become one ValueError, with no log lines or progress bars before it.

    path, offline: what `_where` said. The libraries' own reasons for what a hub out of reach could
    not give are left out.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    loggings = (diffusers_logging, transformers_logging)
    bars = [library for library in loggings if library.is_progress_bar_enabled()]
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    except (
        OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError, AttributeError,
    ) as error:  # fmt: skip
        if offline and isinstance(error, OSError | ValueError) and not Path(path).exists():
            raise ValueError(
                f"cannot load {what}; with no network, give a folder that holds it"
            ) from error
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        # a class that model_index.json names, or what a class of another kind lacks
        unfit = isinstance(error, AttributeError)
        hint = ": it is of a kind that does not fit here; name one that does" if unfit else ""
        raise ValueError(f"cannot load {what} ({reason}){hint}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in bars:
            library.enable_progress_bar()
