"""Files of weights: finding, reading and checking them.

A source is a file, a folder that holds the file, or a hub id `organisation/name`. Files are
safetensors, or torch files read with `weights_only=True`; no code is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

__all__ = [
    "built",
    "fetch",
    "find",
    "fit",
    "hub",
    "local",
    "looks_like",
    "moved",
    "read_state",
    "untouched",
]

# prefixes of the keys of well-known checkpoints; the first match describes a file
LAYOUTS = {
    r"blip\.visual_encoder\.": "ImageReward",
    r"(base_model\.model\..*|.*)lora_(A|B|down|up)\.": "a LoRA adapter",
    r"model\.diffusion_model\.": "a Stable Diffusion checkpoint in one file",
    r"(down_blocks|mid_block)\.": "a diffusers UNet or autoencoder",
    r"transformer_blocks\.": "a diffusers transformer",
    r"visual\.(transformer\.resblocks|trunk)\.": "an open_clip model",
    r"vision_model\.": "a transformers CLIP or SigLIP model",
    r"owlv2\.": "a transformers OWLv2 model",
    r"model\.text_backbone\.": "a transformers Grounding DINO model",
    r"embeddings\.(patch_embeddings|cls_token)": "a transformers DINO model",
    r"blocks\.\d+\.attn\.qkv\.": "a timm (or original DINO) vision transformer",
    r"layers\.0\.weight": "a LAION aesthetic head, version 2",
    r"scoring_head\.": "an aesthetic head, version 2.5",
    r"rm_head\.": "HPSv3 or another ranking head",
    r"(model\.)?visual\.blocks\.": "a Qwen2-VL",
    r"bert\.|text_encoder\.": "a text encoder",
}
# parts of the messages by which torch's restricted unpickler refuses Python objects, which differ
# from those for a truncated file
PICKLED = "GLOBAL |allowlisted|TorchScript"


def looks_like(keys: Iterable[str]) -> str:
    """Return a description of the kind of checkpoint that has these keys, or ""."""
    keys = list(keys)
    if sorted(keys) == ["bias", "weight"]:
        return "a single linear layer, such as a LAION aesthetic head, version 1"
    for pattern, kind in LAYOUTS.items():
        if any(re.match(pattern, key) for key in keys):
            return kind
    return ""


def local(source: str | Path) -> Path:
    """Return the source as a path, which may not exist; ValueError if it cannot be looked up."""
    path = Path(os.path.expanduser(source))
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(
            f"weights {str(source)!r:.80} cannot be looked up ({error.strerror}); give a file, a "
            "folder that exists or a hub id ORGANISATION/NAME"
        ) from None
    return path


def fetch(source: str | Path, *names: str) -> Path:
    """Return the file of a source: itself, or the first of `names` in its folder or hub repository.

    Raises ValueError if there is none.
    """
    found = find(source, *names)
    if found is not None:
        return found
    if local(source).is_dir():
        raise ValueError(f"the folder {source} holds none of {list(names)}; give one that does")
    raise ValueError(f"the hub repository {source} holds none of {list(names)}; give another")


def find(source: str | Path, *names: str) -> Path | None:
    """As `fetch`, but None if the folder or the hub repository holds none of `names`."""
    path = local(source)
    if path.is_file():
        return path
    if path.is_dir():
        return next((path / name for name in names if (path / name).is_file()), None)
    text = str(source)
    if text.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(
            f"weights {text!r} are neither a file, a folder that exists nor a hub id "
            "ORGANISATION/NAME; give one of these"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub(text):
        unreached = None
        for name in names:
            try:
                return Path(hf_hub_download(text, name))
            except LocalEntryNotFoundError as error:  # there is no network, but the hub may have it
                unreached = error
            except EntryNotFoundError:
                continue
        if unreached is not None:
            raise unreached
    return None


@contextmanager
def hub(repository: str) -> Iterator[None]:
    """Turn a failure to download into one sentence, without retries if there is no network.

    Errors of a folder that exists are not changed.
    """
    if Path(repository).is_dir():
        yield
        return
    from huggingface_hub import constants, get_session

    folder = "models--" + repository.removeprefix("hf-hub:").replace("/", "--")
    try:
        if not Path(constants.HF_HUB_CACHE, folder).is_dir():
            get_session().head(constants.ENDPOINT, timeout=10)
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{repository!r} could not be loaded from the hub ({type(error).__name__}); "
            "give a folder that holds it, as in source=/path/to/folder"
        ) from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or torch file, on the CPU, by key.

    A torch file may nest them once, in "state_dict" or "model". Raises ValueError for a truncated
    download, a file that is no checkpoint, or one that contains Python objects.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not the weights; download the file itself")
    tables = path.suffix == ".safetensors"
    if head and not (head[8:9] == b"{" if tables else head.startswith((b"PK", b"\x80"))):
        raise ValueError(
            f"{path} is not a file of weights{_picture(path)}; give one of torch or safetensors"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if re.search(PICKLED, str(error)):
            raise ValueError(
                f"{path} holds Python objects besides tensors, which are not unpickled; "
                "save its state dict as safetensors"
            ) from error
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: the download was probably cut "
            f"short; fetch it again ({reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds no state dict (names of tensors); save model.state_dict()")
    return dict(found)


def _picture(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            return f" but an image ({picture.format})"
    except OSError:
        return ""


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str | Path,
    *,
    ignore: Iterable[str] = (),
    assign: bool = False,
) -> None:
    """Load a state dict; raises ValueError for missing or unknown keys and for wrong shapes.

    Args:
        module: The module to load into.
        state: The tensors by key.
        where: Name of the checkpoint in the error message.
        ignore: Patterns of keys that are not needed.
        assign: Whether the tensors themselves, with their dtype, become the parameters.
    """
    skip = [re.compile(pattern) for pattern in ignore]
    kept = {key: value for key, value in state.items() if not any(p.match(key) for p in skip)}
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in kept and not any(p.match(key) for p in skip)]
    extra = [key for key in kept if key not in wanted]
    wrong = [
        f"{key} {tuple(kept[key].shape)} for {tuple(wanted[key].shape)}"
        for key in kept
        if key in wanted and kept[key].shape != wanted[key].shape
    ]
    _refuse(type(module).__name__, state, where, missing, extra, wrong)
    module.load_state_dict(kept, strict=False, assign=assign)


def built(
    cls: Any,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str | Path,
    *,
    ignore: Iterable[str] = (),
) -> Any:
    """Return a model of a transformers class with exactly these weights, float32.

    transformers' own loader converts the names of published files and ties weights; mismatches,
    which it would only log, are an error here as in `fit`.
    """
    skip = [re.compile(pattern) for pattern in ignore]
    with _quietly():
        model, info = cls.from_pretrained(
            None,
            config=cls.config_class.from_dict(dict(config)),
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    extra = [k for k in info["unexpected_keys"] if not any(p.match(k) for p in skip)]
    wrong = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in info["mismatched_keys"]]
    _refuse(cls.__name__, state, where, sorted(info["missing_keys"]), sorted(extra), sorted(wrong))
    return model.requires_grad_(False).eval()


def _refuse(
    name: str,
    state: Mapping[str, Tensor],
    where: str | Path,
    missing: list[str],
    extra: list[str],
    wrong: list[str],
) -> None:
    for label, keys in (("lacks", missing), ("has unknown", extra), ("has misshapen", wrong)):
        if keys:
            kind = looks_like(state)
            raise ValueError(
                f"{where} does not match {name}: it {label} {', '.join(keys[:3])}"
                + (f" and {len(keys) - 3} more" if keys[3:] else "")
                + (f"; it looks like {kind}" if kind else "")
            )


@contextmanager
def untouched() -> Iterator[None]:
    """Builds modules outside inference mode and leaves the global RNG untouched.

    A context manager or decorator. Tensors made in the caller's inference mode could never take
    part in autograd, and libraries initialise new modules from the global RNG.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        yield


@torch.inference_mode(False)
def moved(module: nn.Module, device: torch.device) -> Any:
    """Move the module, outside inference mode, so that it may take part in autograd later."""
    return module.to(device)


@contextmanager
def _quietly() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
