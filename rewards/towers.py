"""CLIP towers, open_clip's or transformers', and where their weights come from (`source`).

    tiny                        the embedded 64x64 model of the rendered world, no network
    a folder                    open_clip_config.json, or config.json of a transformers CLIPModel
    ViT-B-32/laion2b_s34b_b79k  an open_clip architecture and its pretrained tag
    hf-hub:org/name, org/name   a hub repository of either kind
    random:<seed>               a small untrained model, for tests

Legend: n images, d features, R the tower's input side.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import normalize, resize

__all__ = ["Towers", "WordTokenizer", "build", "prepare", "towers"]

TINY = Path(__file__).parent / "tiny" / "clip"
CACHED_PROMPTS = 4096
RANDOM_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(eq=False)
class Towers:
    """An image and a text tower with the preprocessing they were trained with.

    `encode_image` takes pixels (n, 3, R, R), normalised; `encode_text` one list of strings.
    Both give (n, d) before L2 normalisation. Text features are kept by prompt.
    """

    model: nn.Module
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    size: tuple[int, int]
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    filter: str = "bicubic"
    mode: str = "shortest"
    _features: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("shortest", "squash"):
            raise ValueError(
                f"this CLIP resizes its pictures by {self.mode!r}; "
                "only 'shortest' and 'squash' are known, use another model"
            )
        self.model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move both towers; remembered text features follow when they are next used."""
        with self._lock:
            if next(self.model.parameters()).device != device:
                self.model.to(device)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (n, d), float32, of images in [0, 1] of any size."""
        pixels = normalize(prepare(images, self.size, self.filter, self.mode), self.mean, self.std)
        return _unit(self.encode_image(pixels))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d), float32; equal prompts are encoded once.

        Each prompt is encoded by itself, so that its features are the same bits whatever else
        is asked for, and outside inference mode, so that gradients can pass beside them later.
        """
        device = next(self.model.parameters()).device
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._features:
                    self._features[prompt] = _unit(self.encode_text([prompt]))[0].to(device)
                self._features.move_to_end(prompt)
            rows = torch.stack([self._features[prompt].to(device) for prompt in prompts])
            while len(self._features) > CACHED_PROMPTS:
                self._features.popitem(last=False)
        return rows


def _unit(features: Tensor) -> Tensor:
    # half precision, of weights or of autocast, would round rankings away in the last product
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1)


def prepare(images: Tensor, size: tuple[int, int], filter: str, mode: str) -> Tensor:
    """Resize (n, 3, h, w) to (n, 3, *size), float32: shortest side and centre crop, or squash."""
    images = images.float()
    if mode == "squash":
        return resize(images, size, filter)
    h, w = images.shape[2:]
    height, width = size
    # as torchvision: the longer side is rounded down, the crop's offset to the nearest
    by_height = height * w >= width * h
    tall, wide = (height, height * w // h) if by_height else (width * h // w, width)
    images = resize(images, (tall, wide), filter)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return images[:, :, top : top + height, left : left + width]


class WordTokenizer:
    """A `tokenizer.json` of words (tokenizers' WordLevel), padded and cut to one length.

    Its post-processor adds the start and end tokens; `<pad>` fills up. Calling it with n strings
    gives ids (n, context_length), int64.
    """

    def __init__(self, path: str | Path, context_length: int) -> None:
        from tokenizers import Tokenizer

        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self.core = Tokenizer.from_file(str(path))
        pad = self.core.token_to_id("<pad>")
        if pad is None:
            raise ValueError(f"{path} has no <pad> token, which a word tokenizer needs")
        self.core.enable_truncation(context_length)
        self.core.enable_padding(pad_id=pad, pad_token="<pad>", length=context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([item.ids for item in self.core.encode_batch(list(texts))])


def build(config: Mapping[str, Any]) -> Any:
    """An untrained, frozen open_clip model from its configuration (the file or its model_cfg)."""
    import open_clip

    settings = dict(config.get("model_cfg", config))
    custom = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
    _check_activation(model, bool(settings.get("quick_gelu", False)), "the configuration")
    return model.requires_grad_(False).eval()


def _check_activation(model: nn.Module, quick: bool, where: str) -> None:
    """QuickGELU and GELU differ by so little that a wrong one is never noticed in the scores."""
    from open_clip.transformer import QuickGELU

    if quick != any(isinstance(module, QuickGELU) for module in model.modules()):
        raise ValueError(
            f"{where} says quick_gelu={quick} but the built CLIP disagrees; "
            "use the architecture whose name ends as the weights were trained (-quickgelu)"
        )


_TOWERS: WeakValueDictionary[tuple[str, str], Towers] = WeakValueDictionary()
_TOWERS_LOCK = threading.Lock()


def towers(source: str, device: torch.device | str | None = None) -> Towers:
    """The towers of a source, loaded once for all rewards that use them.

    Raises ValueError for a source that is not there, or that is no CLIP.
    """
    if not isinstance(source, str):
        raise ValueError(f"the CLIP source is {source!r}; give its name as text, as in clip(tiny)")
    folder = TINY if source == "tiny" else Path(source).expanduser()
    is_local = folder.is_dir()
    key = (str(folder.resolve()) if is_local else source, str(device))
    with _TOWERS_LOCK:
        found = _TOWERS.get(key)
        if found is None:
            found = _open(source, folder if is_local else None)
            if device is not None:
                found.to(torch.device(device))
            _TOWERS[key] = found
    return found


def _open(source: str, folder: Path | None) -> Towers:
    if folder is not None:
        return _open_folder(folder)
    if source == "tiny":
        raise ValueError(f"the embedded CLIP is missing at {TINY}; reinstall tilt-diffusion")
    kind, _, rest = source.partition(":")
    if kind == "random":
        return _open_random(rest)
    if source.startswith(("/", ".", "~")):
        raise ValueError(f"there is no CLIP folder {source!r}; give one that exists")
    return _open_remote(source.removeprefix("hf-hub:"))


def _open_random(text: str) -> Towers:
    import open_clip

    if not text.isdecimal():
        raise ValueError(f"CLIP source 'random:{text}' needs a whole number, as in random:0")
    model = build(RANDOM_CONFIG)
    generator = torch.Generator().manual_seed(int(text))
    for name, parameter in model.named_parameters():  # torch's own initialisation has a global seed
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.ndim > 1 or name.endswith("embedding"):
            width = parameter.shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return _open_clip_towers(model, open_clip.SimpleTokenizer(context_length=77), {})


def _open_folder(folder: Path) -> Towers:
    import open_clip

    if not (folder / "open_clip_config.json").is_file():
        if (folder / "config.json").is_file():
            return _transformers_towers(str(folder))
        raise ValueError(
            f"{folder} is no CLIP folder: it holds neither open_clip_config.json nor config.json"
        )
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    model: Any = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    quick = bool(config["model_cfg"].get("quick_gelu", False))
    _check_activation(model, quick, f"{folder}/open_clip_config.json")
    return _open_clip_towers(model, _folder_tokenizer(folder, config), config["preprocess_cfg"])


def _folder_tokenizer(folder: Path, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    import open_clip

    path = folder / "tokenizer.json"
    if path.is_file():
        rules = json.loads(path.read_text(encoding="utf-8"))
        if rules["model"]["type"] == "WordLevel":
            return WordTokenizer(path, config["model_cfg"]["text_cfg"]["context_length"])
    return open_clip.get_tokenizer(f"local-dir:{folder}")


def _open_remote(source: str) -> Towers:
    import open_clip

    name, _, tag = source.partition("/")
    if name in open_clip.list_models():
        return _open_tag(name, tag)
    if source.count("/") != 1:
        raise ValueError(
            f"CLIP source {source!r} is neither tiny, a folder that exists, an open_clip "
            "ARCHITECTURE/TAG, a hub id ORGANISATION/NAME nor random:SEED; give one of these"
        )
    with _hub(source, source):
        try:
            model: Any = open_clip.create_model(f"hf-hub:{source}", require_pretrained=True)
        except RuntimeError:  # it holds no open_clip_config.json
            return _transformers_towers(source)
        tokenizer = open_clip.get_tokenizer(f"hf-hub:{source}")
    return _open_clip_towers(model, tokenizer, open_clip.get_model_preprocess_cfg(model))


def _open_tag(name: str, tag: str) -> Towers:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(
            f"open_clip's {name} has no weights {tag!r}; write {name}/TAG with one of {tags}"
        )
    trained = open_clip.get_pretrained_cfg(name, tag)
    # the tag says which activation it was trained with; the architecture may say another
    quick = bool(trained.get("quick_gelu", False))
    with _hub(f"{name}/{tag}", trained.get("hf_hub", "").rstrip("/")):
        model: Any = open_clip.create_model(
            name, tag, force_quick_gelu=quick, require_pretrained=True
        )
    _check_activation(model, quick, f"{name}/{tag}")
    tokenizer = open_clip.get_tokenizer(name)
    return _open_clip_towers(model, tokenizer, open_clip.get_model_preprocess_cfg(model))


@contextmanager
def _hub(source: str, repository: str) -> Iterator[None]:
    """Turn a failure to fetch into one sentence; without a network at once, not after retries."""
    from huggingface_hub import constants, get_session

    folder = "models--" + repository.replace("/", "--")
    try:
        if not Path(constants.HF_HUB_CACHE, folder).is_dir():
            get_session().head(constants.ENDPOINT, timeout=10)
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"CLIP weights {source!r} could not be loaded from the hub; give a folder, "
            'clip(source="/path/to/folder"), or the embedded model, clip(tiny)'
        ) from error


def _open_clip_towers(
    model: Any, tokenizer: Callable[[list[str]], Tensor], preprocess: Mapping[str, Any]
) -> Towers:
    def encode_text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts).to(model.logit_scale.device))

    side = model.visual.image_size
    return Towers(
        model,
        model.encode_image,
        encode_text,
        (side, side) if isinstance(side, int) else tuple(side),
        preprocess.get("mean", OPENAI_MEAN),
        preprocess.get("std", OPENAI_STD),
        preprocess.get("interpolation", "bicubic"),
        preprocess.get("resize_mode", "shortest"),
    )


def _transformers_towers(source: str) -> Towers:
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

    kind = str(AutoConfig.from_pretrained(source).model_type)
    if kind != "clip":
        raise ValueError(f"{source} is a {kind!r} model but a CLIPModel (or open_clip) is needed")
    model: Any = CLIPModel.from_pretrained(source, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    processor: Any = CLIPImageProcessor.from_pretrained(source)
    length = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size

    def encode_image(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixels).pooler_output

    def encode_text(prompts: list[str]) -> Tensor:
        rows = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return model.get_text_features(rows.input_ids.to(model.device)).pooler_output

    return Towers(
        model,
        encode_image,
        encode_text,
        (side, side),
        processor.image_mean,
        processor.image_std,
        {2: "bilinear", 3: "bicubic"}[int(processor.resample)],
    )
