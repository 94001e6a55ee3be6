"""Whether an image shows the objects that its prompt asks for: GenEval's protocol.

The requirements of a prompt come from a metadata file, or are parsed from a prompt of the embedded
models' world (`rewards.geneval.tiny_world`) or of GenEval's form (`rewards.geneval.prompts`). The
detector is `world`, for the embedded world; `owlv2` or `grounding_dino` for photographs
(`rewards.backends.detectors`); or `module:function`, a function of the user.

GenEval's detector is a Mask2Former of COCO's classes with a confidence threshold of 0.3, or 0.9
for counting, and it gives each object one box and a mask. Zero-shot detectors have other ranges
of confidence, give boxes only, often several for an object, and distinguish only the classes that
the prompt names. Their thresholds and overlaps below are NOT calibrated, as no weights were
available: choose them on your own images, and do not compare scores with published GenEval
figures.

Legend: n images.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_batch_size, check_choice
from ..backends.detectors import Detector, GroundingDino, Owlv2
from ..evaluation_cache import shared
from ..geneval import rules, tiny_world
from ..geneval.prompts import parse, read_metadata
from ..geneval.rules import Detection, Entry
from ..geneval.tiny_world import SHAPES, detect
from ..images import check_inputs
from ..spec import written
from ..towers.dual_encoder import Towers
from ..towers.model_cache import loaded_once
from ..towers.sources import towers
from .base import Card

__all__ = ["ClipColours", "ObjectsReward", "cut"]

GREY = 0x99 / 255  # GenEval's background of an object that is cropped by its mask
TEMPLATES = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
MODES = {"strict": rules.strict, "exactly": rules.exactly, "share": rules.share}


@dataclass(frozen=True)
class Usual:
    """A detector's default weights, thresholds (also for counting) and overlap of duplicates."""

    source: str | None
    threshold: float
    counting_threshold: float
    overlap: float


# GenEval's thresholds and overlap, for a detector of the user
OWN = Usual(None, 0.3, 0.9, 1.0)
DETECTORS = {
    "world": Usual(None, 0.0, 0.0, 1.0),
    # the example of transformers has 0.1; several patches may propose the same object
    "owlv2": Usual("google/owlv2-base-patch16-ensemble", 0.2, 0.3, 0.5),
    # the authors' demonstration has 0.35
    "grounding_dino": Usual("IDEA-Research/grounding-dino-tiny", 0.35, 0.35, 0.7),
}


class ObjectsReward:
    """Whether the detected objects are those that the prompt asks for, in [0, 1].

    strict is 1 if the image is correct by GenEval's evaluation (at least the count of each object,
    the most confident ones in their colours and positions), else 0; exactly also requires equal
    counts; share is the mean over the requirements. See `rewards.geneval.rules`. For prompts of the
    embedded world, which exclude further objects, strict equals exactly.

    Args:
        mode: One of `MODES`.
        detector, source: See `rewards.backends.detectors`; source None is the default weights.
        metadata: A file in GenEval's format, in which prompts are looked up.
        colours: The CLIP that names colours if the detector does not, see
            `rewards.towers.sources`.
        threshold, counting_threshold: Confidences to exceed; None is the detector's default.
        overlap: Intersection over union at which the less confident of two objects of a class is
            dropped; None is the detector's default.
        batch_size: Number of images evaluated at once.
        device: Device of the models; None follows the images.
    """

    differentiable = False
    wants_references = False
    range: tuple[float | None, float | None] = (0.0, 1.0)
    card = Card(
        weights="none for the embedded world; google/owlv2-base-patch16-ensemble or "
        "IDEA-Research/grounding-dino-tiny, and CLIP for colours",
        size="0.6-0.7 GB",
        licence="Apache-2.0 (OWLv2, Grounding DINO)",
        range="[0, 1]",
        citation="Ghosh et al. 2023, GenEval, arXiv 2310.11513; Minderer et al. 2023, OWLv2, "
        "arXiv 2306.09683; Liu et al. 2023, Grounding DINO, arXiv 2303.05499",
    )

    def __init__(
        self,
        mode: str = "strict",
        detector: str = "world",
        source: str | None = None,
        *,
        metadata: str | None = None,
        colours: str = "ViT-L-14/openai",
        threshold: float | None = None,
        counting_threshold: float | None = None,
        overlap: float | None = None,
        batch_size: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the objects mode", mode, MODES)
        check_batch_size(batch_size)
        thresholds = {"threshold": threshold, "counting_threshold": counting_threshold}
        given = {"source": source, **thresholds, "overlap": overlap}
        rest = {"metadata": metadata, "colours": colours, "batch_size": batch_size}
        self.name = "objects"
        self.spec = written("objects", ObjectsReward, mode=mode, detector=detector, **given, **rest)
        self.mode, self.batch_size = mode, batch_size
        self.usual = _usual(detector, {k: v for k, v in given.items() if v is not None})
        self.entries = {} if metadata is None else read_metadata(metadata)
        self.detector = _detector(detector, self.usual, device)
        self.colours = ClipColours(colours, device)
        self._settings = (metadata, colours, self.usual)

    def entry(self, prompt: str) -> Entry:
        """Return a prompt's requirements, with the task as `tag`; ValueError if not understood."""
        text = prompt.strip()
        entry = self.entries.get(text) or tiny_world.parse(text) or parse(text)
        if entry is None:
            raise ValueError(
                f"the objects reward cannot score the prompt {prompt!r}; it knows those of "
                + ("its metadata file, " if self.entries else "")
                + "the embedded world, as in 'three stars' or 'a red circle left of a blue "
                "square', and GenEval's, as in 'a photo of two dogs'; give others in a file, "
                "metadata=FILE"
            )
        if self.detector is detect and not set(entry.names) <= set(SHAPES):
            raise ValueError(
                f"the embedded world lacks what the prompt {prompt!r} asks for; choose "
                "a detector for photographs, as in objects(detector=owlv2)"
            )
        return entry

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts that are not understood."""
        for prompt in prompts:
            self.entry(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        found = self.detections(images, prompts)
        score = MODES[self.mode]
        scores = [score(self.entry(p), things) for p, things in zip(prompts, found, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def detections(self, images: Tensor, prompts: Sequence[str]) -> list[list[Detection]]:
        """Return the detections by which each image is scored, the most confident first."""
        check_inputs(images, prompts)
        entries = [self.entry(prompt) for prompt in prompts]
        # detections are shared by rewards that differ only in their mode
        known = shared(self.detector, images, dict[Any, list[list[Detection]]])
        key = (tuple(prompts), self._settings)
        if key not in known:
            known[key] = [
                things
                for start in range(0, len(images), self.batch_size)
                for things in self._chunk(
                    images[start : start + self.batch_size].detach(),
                    entries[start : start + self.batch_size],
                )
            ]
        return known[key]

    def _chunk(self, images: Tensor, entries: Sequence[Entry]) -> list[list[Detection]]:
        found = self.detector(images, [entry.names for entry in entries])
        if len(found) != len(images):
            raise ValueError(f"the detector returned {len(found)} lists for {len(images)} images")
        return [self._seen(*one) for one in zip(images, entries, found, strict=True)]

    def _seen(self, image: Tensor, entry: Entry, found: Sequence[Detection]) -> list[Detection]:
        """Return the detections that GenEval selects, with the colours that the entry needs."""
        counting = entry.tag == "counting"
        threshold = self.usual.counting_threshold if counting else self.usual.threshold
        chosen = rules.select(found, threshold, self.usual.overlap)
        coloured = {e.name for e in entry.include if e.colour}
        plain = [i for i, d in enumerate(chosen) if d.name in coloured and not d.colour]
        if plain:
            colours = self.colours(image, [chosen[i] for i in plain])
            for i, colour in zip(plain, colours, strict=True):
                chosen[i] = replace(chosen[i], colour=colour)
        return chosen


class ClipColours:
    """GenEval's colours of objects: CLIP's choice of ten words, each the mean of three phrases.

    An object is cropped by its box; if it has a mask, the rest of the box becomes grey. GenEval's
    detector returns masks; a box without a mask shows some background as well.
    """

    def __init__(self, source: str, device: torch.device | str | None = None) -> None:
        self.source = source
        self.device = None if device is None else torch.device(device)
        self._towers: Towers | None = None  # loaded when a prompt names a colour

    @torch.no_grad()
    def __call__(self, image: Tensor, found: Sequence[Detection]) -> list[str]:
        """Return the colour of each object in the image (3, h, w)."""
        clip = self._towers = self._towers or towers(self.source, self.device)
        device = self.device or image.device
        clip.to(device)
        words = []
        for thing in found:
            phrases = [t.format(c=c, n=thing.name) for c in rules.COLOURS for t in TEMPLATES]
            features = clip.text_features(phrases).unflatten(0, (-1, len(TEMPLATES)))
            colours = F.normalize(features.mean(1), dim=-1)
            seen = clip.image_features(cut(image, thing)[None].to(device))[0]
            words.append(rules.COLOURS[int((colours.to(device) @ seen).argmax())])
        return words


def cut(image: Tensor, thing: Detection) -> Tensor:
    """Crop the image (3, h, w) to an object's box, rounded to pixels, at least one of them."""
    h, w = image.shape[1:]
    left, top, right, bottom = (round(side) for side in thing.box)
    left, top = min(max(left, 0), w - 1), min(max(top, 0), h - 1)
    right, bottom = min(max(right, left + 1), w), min(max(bottom, top + 1), h)
    if thing.mask is not None:
        image = image.where(torch.as_tensor(thing.mask, device=image.device).bool(), GREY)
    return image[:, top:bottom, left:right]


def _usual(detector: str, given: dict[str, Any]) -> Usual:
    """Return the detector's defaults, replaced by the given values."""
    if not isinstance(detector, str) or (detector not in DETECTORS and ":" not in detector):
        close = get_close_matches(str(detector), DETECTORS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"take one of {list(DETECTORS)}"
        raise ValueError(f"the detector {detector!r} is unknown; {hint} (or module:function)")
    usual = DETECTORS.get(detector, OWN)
    if "source" in given and usual.source is None:
        raise ValueError(
            f"the detector {detector} takes no source but got {given['source']!r}; leave it out"
        )
    for name, value in given.items():
        if name != "source" and (isinstance(value, bool | str) or not 0 <= value <= 1):
            raise ValueError(f"{name} is {value!r} but must lie in [0, 1]; leave it out")
    return replace(usual, **given)


def _detector(name: str, usual: Usual, device: torch.device | str | None) -> Detector:
    """Return the detector of a name, loaded once for all rewards with the same settings."""
    if name == "world":
        return detect
    if ":" in name:
        return _imported(name)
    kind = {"owlv2": Owlv2, "grounding_dino": GroundingDino}[name]
    floor = min(usual.threshold, usual.counting_threshold)
    source = str(usual.source)
    return loaded_once(f"{name} {floor}", source, device, lambda: kind(source, floor, device))


def _imported(name: str) -> Detector:
    module, _, attribute = name.partition(":")
    try:
        found: Detector = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the detector {name!r} cannot be imported: {error}") from error
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"the detector {name!r} is not a function f(images, names) ({error}); give one"
        ) from error
    except ValueError:  # some functions written in C have no signature
        pass
    return found
