"""Zero-shot object detectors of transformers, for photographs.

A detector is `detect(images, names)`, where images are float (n, 3, h, w) in [0, 1] and names are
the classes to look for in each. It returns a list of Detections for each image, in its pixels,
in any order and with any confidence above its `floor`; their colour may be "". A source is

    a folder, org/name     config.json, model.safetensors and the tokenizer of transformers'
                           Owlv2ForObjectDetection or GroundingDinoForObjectDetection
    random:<seed>          a small untrained model, for tests

Legend: n images, q names, p boxes of an image, R the input side of OWLv2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geneval.rules import Detection
from ..images import normalize, resize
from ..towers.checkpoints import built, fetch, hub, local, moved, read_state, untouched
from ..towers.dino_backbone import MEAN, STD
from ..towers.dual_encoder import OPENAI_MEAN, OPENAI_STD
from ..towers.sources import randomise, seed_of

__all__ = ["Detector", "GroundingDino", "Owlv2", "at_most", "padded"]

FILES = ("model.safetensors", "pytorch_model.bin")
CLASSES = {
    "owlv2": "Owlv2ForObjectDetection",
    "grounding-dino": "GroundingDinoForObjectDetection",
}
# keys of some files that no detection needs: a computed table, BERT's unused head
UNUSED = r"box_bias$|.*\.text_backbone\.pooler\."
SHORTEST, LONGEST = 800, 1333  # pixels of the input sides of Grounding DINO
# BERT's ids of [CLS], [SEP], "." and "?", which delimit the phrases of Grounding DINO
DELIMITERS = (101, 102, 1012, 1029)
OWL_TOKENS = 16  # tokens of a text


class Detector(Protocol):
    """See the module docstring; `objects(detector=module:function)` names one as well."""

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Detection]]: ...


class Owlv2:
    """OWLv2 (Minderer et al. 2023, arXiv 2306.09683): each patch proposes a box, scored by name.

    A box gets the best of the given names; its score is the sigmoid of that name's logit.
    """

    def __init__(
        self, source: str, floor: float = 0.0, device: torch.device | str | None = None
    ) -> None:
        self.floor = floor
        self.device = None if device is None else torch.device(device)
        self.model, self.tokenize = _open(source, "owlv2")
        self.side = int(self.model.config.vision_config.image_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        every = list(dict.fromkeys(name for row in names for name in row))
        if not every:
            return [[] for _ in names]
        device = self.device or images.device
        moved(self.model, device)
        pixels = normalize(padded(images.to(device), self.side), OPENAI_MEAN, OPENAI_STD)
        ids, mask = self.tokenize([f"a photo of a {name}" for name in every])
        with torch.autocast(device.type, enabled=False):
            output = self.model(
                input_ids=ids.repeat(len(images), 1).to(device),
                attention_mask=mask.repeat(len(images), 1).to(device),
                pixel_values=pixels,
            )
        h, w = images.shape[2:]
        boxes = _corners(output.pred_boxes.float().cpu(), (max(h, w), max(h, w)), (h, w))
        scores = output.logits.float().sigmoid().cpu()  # (n, p, q)
        found = []
        for row, own, own_boxes in zip(names, scores, boxes, strict=True):
            columns = [every.index(name) for name in row]
            found.append(_detections(list(row), own[:, columns], own_boxes, self.floor))
        return found


class GroundingDino:
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499), which reads the names as one caption.

    A box gets the best of the names; its score is the mean over the name's tokens, as in the
    authors' evaluation on COCO. transformers' processor takes the best single token instead, and
    names the box by the tokens above a second threshold, which may be part of a name.
    """

    def __init__(
        self, source: str, floor: float = 0.0, device: torch.device | str | None = None
    ) -> None:
        self.floor = floor
        self.device = None if device is None else torch.device(device)
        self.model, self.tokenize = _open(source, "grounding-dino")

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        found: list[list[Detection]] = [[] for _ in names]
        # images with the same caption form a batch, so that no caption is padded
        for row in dict.fromkeys(tuple(row) for row in names):
            rows = [i for i, other in enumerate(names) if tuple(other) == row]
            for i, things in zip(rows, self._of(images[rows], list(row)), strict=True):
                found[i] = things
        return found

    def _of(self, images: Tensor, names: list[str]) -> list[list[Detection]]:
        if not names:
            return [[] for _ in images]
        device = self.device or images.device
        moved(self.model, device)
        h, w = images.shape[2:]
        pixels = resize(images.float().to(device), at_most(h, w, SHORTEST, LONGEST), "bilinear")
        ids, mask = self.tokenize([" ".join(f"{name.strip().lower()}." for name in names)])
        spans = self._spans(ids[0], names)
        with torch.autocast(device.type, enabled=False):
            output = self.model(
                input_ids=ids.repeat(len(images), 1).to(device),
                attention_mask=mask.repeat(len(images), 1).to(device),
                pixel_values=normalize(pixels, MEAN, STD),
            )
        tokens = output.logits.float().sigmoid().cpu()
        scores = torch.stack([tokens[..., span].mean(-1) for span in spans], -1)  # (n, p, q)
        boxes = _corners(output.pred_boxes.float().cpu(), (h, w), (h, w))
        return [_detections(names, *pair, self.floor) for pair in zip(scores, boxes, strict=True)]

    def _spans(self, ids: Tensor, names: list[str]) -> list[Tensor]:
        """Return the positions of each name's tokens."""
        stop = torch.isin(ids, torch.tensor(DELIMITERS))
        phrase = stop.cumsum(0).masked_fill(stop, 0)
        spans = [(phrase == i).nonzero()[:, 0] for i in phrase.unique().tolist() if i]
        if len(spans) != len(names) or len(ids) > self.model.config.max_text_len:
            raise ValueError(
                f"Grounding DINO cannot read the names {names} as one caption, of "
                f"{self.model.config.max_text_len} tokens at most; give fewer, of words only"
            )
        return spans


def padded(images: Tensor, side: int) -> Tensor:
    """Pad with black below and on the right, and resize to (n, 3, side, side), float32, bilinear.

    This is OWLv2's input, except that its code blurs before it reduces an image.
    """
    h, w = images.shape[2:]
    square = F.pad(images.float(), (0, max(h - w, 0), 0, max(w - h, 0)))
    return resize(square, (side, side), "bilinear")


def at_most(h: int, w: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return the size (H, W) with the shorter side `shortest`, or less if `longest` requires it.

    The longer side is rounded down, as in transformers.
    """
    low, high = min(h, w), max(h, w)
    raw = float(shortest) if high / low * shortest <= longest else longest * low / high
    short = round(raw)
    if low == short:
        return h, w
    long = int(raw * high / low)
    return (short, long) if h <= w else (long, short)


def _corners(boxes: Tensor, unit: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Corners (n, p, 4) within an image of `size`, from centres and extents in `unit`, (h, w)."""
    middle, extent = boxes.split(2, -1)
    scale, end = (boxes.new_tensor([wide, tall] * 2) for tall, wide in (unit, size))
    corners = torch.cat([middle - extent / 2, middle + extent / 2], -1) * scale
    return corners.clamp(min=0).minimum(end)


def _detections(
    names: Sequence[str], scores: Tensor, boxes: Tensor, floor: float
) -> list[Detection]:
    """Detections from the scores (p, q) and boxes (p, 4) of one image."""
    if not names:
        return []
    best, index = scores.max(-1)
    found = []
    for i in (best > floor).nonzero()[:, 0].tolist():
        left, top, right, bottom = boxes[i].tolist()
        box = (left, top, right, bottom)
        found.append(Detection(names[int(index[i])], "", box, float(best[i])))
    return found


Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]  # -> ids and attention mask, (q, length)


@untouched()
def _open(source: str, kind: str) -> tuple[Any, Tokenize]:
    import transformers

    seed = seed_of(source)
    cls: Any = getattr(transformers, CLASSES[kind])
    if seed is not None:
        model = cls(cls.config_class.from_dict(RANDOM_CONFIGS[kind]))
        return randomise(model, seed), _letters(kind)
    model = _trained(cls, source, kind)
    return model, _tokenizer(source, kind)


def _trained(cls: Any, source: str, kind: str) -> Any:
    config = json.loads(fetch(source, "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != kind:
        raise ValueError(
            f"{source} is a {config.get('model_type', 'nameless')!r} model but {kind!r} is needed; "
            "give another, or another detector"
        )
    state = read_state(fetch(source, *FILES))
    return built(cls, config, state, source, ignore=[UNUSED])


def _tokenizer(source: str, kind: str) -> Tokenize:
    from transformers import AutoTokenizer

    folder = local(source)
    with nullcontext() if folder.is_dir() else hub(source):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else source, trust_remote_code=False
        )
    # OWLv2 has this many positions; Grounding DINO must not be padded
    fixed = {"padding": "max_length", "max_length": OWL_TOKENS, "truncation": True}
    settings = fixed if kind == "owlv2" else {}

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = tokenizer(texts, return_tensors="pt", **settings)
        return rows.input_ids, rows.attention_mask

    return tokenize


def _letters(kind: str) -> Tokenize:
    """Return a tokenizer of letters for random models; OWLv2 uses the largest token's features."""
    end = RANDOM_TOKENS - 1 if kind == "owlv2" else DELIMITERS[1]

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [[101, *(1012 if c == "." else ord(c) % 100 + 1 for c in t), end] for t in texts]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, (ids > 0).long()

    return tokenize


RANDOM_TOKENS = 1200  # BERT's delimiters are among them
_SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
RANDOM_CONFIGS: dict[str, dict[str, Any]] = {
    "owlv2": {
        "text_config": _SIZES
        | {"num_hidden_layers": 1, "vocab_size": RANDOM_TOKENS, "max_position_embeddings": 64}
        | {"bos_token_id": None, "eos_token_id": None},
        "vision_config": _SIZES | {"num_hidden_layers": 2, "image_size": 64, "patch_size": 8},
        "projection_dim": 32,
    },
    "grounding-dino": {
        "text_config": _SIZES
        | {"model_type": "bert", "num_hidden_layers": 1, "vocab_size": RANDOM_TOKENS},
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "out_indices": [2, 3, 4],
        },
        "d_model": 32,
        "num_queries": 20,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
}
