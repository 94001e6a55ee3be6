"""Does the picture show the things that the prompt asks for: GenEval's protocol, any detector.

What a prompt asks for comes from a metadata file, or from its text where that is one of the
embedded world (rewards.geneval.tiny_world) or made like GenEval's own (rewards.geneval.rules, which
has the rules). What is there comes from a detector: `world`, the embedded world's; `owlv2` or
`grounding_dino` for photographs (rewards.backends.detectors); or `module:function`, one of one's
own.

GenEval's detector is a Mask2Former of COCO's classes, whose confidence it cuts at 0.3, and at
0.9 for counting, and which gives a thing one box and a mask. Zero-shot detectors put their
scores elsewhere, give boxes only, often several a thing, and tell apart only the classes that
the prompt names. Their thresholds and overlaps below are starting points, NOT calibrated, as no
weights were at hand: choose them on pictures of one's own, and do not compare scores with
published figures of GenEval.
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
from ..geneval.rules import Detection, Entry, Expected
from ..geneval.tiny_world import COLOURS, DIRECTIONS, SHAPES, SIZE, detect, expectations, holds
from ..images import check_inputs
from ..spec import written
from ..towers.dual_encoder import Towers
from ..towers.model_cache import loaded_once
from ..towers.sources import towers
from .base import Card

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "SHAPES",
    "SIZE",
    "ClipColours",
    "Detection",
    "Expected",
    "ObjectsReward",
    "detect",
    "expectations",
    "holds",
]

GREY = 0x99 / 255  # GenEval's background of a thing that is cut out by its mask
TEMPLATES = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
MODES = {"strict": rules.strict, "exactly": rules.exactly, "share": rules.share}


@dataclass(frozen=True)
class Usual:
    """A detector's own: weights, thresholds (also for counting), overlap of doubles to drop."""

    source: str | None
    threshold: float
    counting_threshold: float
    overlap: float


# GenEval's thresholds and overlap for a detector of one's own; the world's has no false alarms
OWN = Usual(None, 0.3, 0.9, 1.0)
DETECTORS = {
    "world": Usual(None, 0.0, 0.0, 1.0),
    # transformers' example cuts at 0.1; every patch may propose the same thing again
    "owlv2": Usual("google/owlv2-base-patch16-ensemble", 0.2, 0.3, 0.5),
    # the authors' demonstration cuts at 0.35
    "grounding_dino": Usual("IDEA-Research/grounding-dino-tiny", 0.35, 0.35, 0.7),
}


class ObjectsReward:
    """Whether what is detected is what the prompt asks for, in [0, 1].

    strict: 1 if the picture is correct by GenEval's evaluation (at least so many of each thing,
    the most confident ones in their colours and places), else 0. exactly: 1 if the numbers are
    equal, too. share: the mean of what is asked for, thing by thing. See rewards.geneval.rules. In
    the embedded world, whose prompts leave out nothing, strict is exactly.

    Args: detector and source, see rewards.backends.detectors (None: the usual weights); metadata, a
    file in GenEval's format, looked up by prompt; colours, the CLIP that names the colours where
    the detector does not (see rewards.towers.sources); threshold and counting_threshold,
    confidences to exceed, and overlap, the intersection over union at which the lesser of two
    things of a class is dropped (None: the detector's usual); batch_size, images evaluated at once;
    device, where the models live (None: where the images are).
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
        self.name = "objects"
        self.spec = written(
            "objects",
            ObjectsReward,
            mode=mode,
            detector=detector,
            source=source,
            metadata=metadata,
            colours=colours,
            threshold=threshold,
            counting_threshold=counting_threshold,
            overlap=overlap,
            batch_size=batch_size,
        )
        self.mode, self.batch_size = mode, batch_size
        given = {
            "source": source,
            "threshold": threshold,
            "counting_threshold": counting_threshold,
            "overlap": overlap,
        }
        self.usual = _usual(detector, {k: v for k, v in given.items() if v is not None})
        self.entries = {} if metadata is None else rules.read_metadata(metadata)
        self.detector = _detector(detector, self.usual, device)
        self.colours = ClipColours(colours, device)
        self._settings = (metadata, colours, self.usual)

    def entry(self, prompt: str) -> Entry:
        """What a prompt asks for; its `tag` is the task. ValueError where nothing is known."""
        text = prompt.strip()
        entry = self.entries.get(text) or tiny_world.parse(text) or rules.parse(text)
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
                f"the embedded world has no things such as the prompt {prompt!r} asks for; choose "
                "a detector for photographs, as in objects(detector=owlv2)"
            )
        return entry

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which nobody knows what they ask for."""
        for prompt in prompts:
            self.entry(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        found = self.detections(images, prompts)
        judge = MODES[self.mode]
        scores = [judge(self.entry(p), things) for p, things in zip(prompts, found, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def detections(self, images: Tensor, prompts: Sequence[str]) -> list[list[Detection]]:
        """What is judged in each picture: the things its prompt names, the most confident first."""
        check_inputs(images, prompts)
        entries = [self.entry(prompt) for prompt in prompts]
        # two modes of one setting look at the same pictures once
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
            raise ValueError(f"the detector gave {len(found)} lists for {len(images)} images")
        return [self._seen(*one) for one in zip(images, entries, found, strict=True)]

    def _seen(self, image: Tensor, entry: Entry, found: Sequence[Detection]) -> list[Detection]:
        """GenEval's choice of the detections, with the colours that the entry asks about."""
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
    """GenEval's colours of things: CLIP between ten words, of three phrases' mean features each.

    A thing is cut out by its box, and where it has a mask the rest of the box is made grey.
    GenEval's masks come from its detector; a box alone shows some background too.
    """

    def __init__(self, source: str, device: torch.device | str | None = None) -> None:
        self.source = source
        self.device = None if device is None else torch.device(device)
        self._towers: Towers | None = None  # loaded when a prompt names a colour

    @torch.no_grad()
    def __call__(self, image: Tensor, found: Sequence[Detection]) -> list[str]:
        """The colour of each thing in the picture (3, h, w)."""
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
    """The picture (3, h, w) within a thing's box, to whole pixels, one of them at least."""
    h, w = image.shape[1:]
    left, top, right, bottom = (round(side) for side in thing.box)
    left, top = min(max(left, 0), w - 1), min(max(top, 0), h - 1)
    right, bottom = min(max(right, left + 1), w), min(max(bottom, top + 1), h)
    if thing.mask is not None:
        image = image.where(torch.as_tensor(thing.mask, device=image.device).bool(), GREY)
    return image[:, top:bottom, left:right]


def _usual(detector: str, given: dict[str, Any]) -> Usual:
    """The detector's settings, those given instead of its own."""
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
    """The detector of a name, loaded once for all rewards that look alike."""
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
            f"the detector {name!r} is no function f(images, names) ({error}); give one"
        ) from error
    except ValueError:  # some functions written in C have no signature
        pass
    return found
