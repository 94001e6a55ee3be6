"""The settings of commands that draw the prompts of a file, and their conversion."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from finetune.ranges import (
    FLAG,
    KEYWORDS,
    NAME,
    SCORE_FRAMES,
    SEED,
    TEXT,
    VIDEO_SCORE,
    check,
    optional,
    setting,
    whole,
)
from steering import FeynmanKac
from steering.pipeline import steer_each
from tilt.framing import ABOUT_FRAMES, ABOUT_SCORE
from tilt.loading import ABOUT_DTYPE, DTYPE
from tilt.offloading import ABOUT_OFFLOAD, OFFLOAD
from tilt.quantization import ABOUT_QUANTIZE, QUANTIZE

__all__ = ["Drawing", "call_of", "filter_of"]


@dataclass
class Drawing:
    """The settings of a command that draws the prompts of a file."""

    prompts: str = setting("", TEXT, "file of prompts: one per line, or .jsonl")
    out: str = setting("", TEXT, "output folder")
    model: str = setting("tiny-sd3", NAME, "hub id, folder, tiny-sd3 or tiny-sd")
    lora: str | None = setting(None, optional(NAME), "LoRA weights to load, for a further round")
    filter: dict[str, Any] = setting(
        dict, KEYWORDS, "fields of FeynmanKac, as in --filter.reward-scale 30"
    )
    call: dict[str, Any] = setting(
        dict, KEYWORDS, "keywords of the pipeline's call, as in --call.guidance-scale 4.5"
    )
    score_frames: Any = setting("all", SCORE_FRAMES, ABOUT_FRAMES)
    video_score: str = setting("mean", VIDEO_SCORE, ABOUT_SCORE)
    seed: int = setting(0, SEED, "seed of the whole run")
    max_batch: int | None = setting(None, optional(whole(1)), "maximum batch of one network call")
    dtype: str = setting("auto", DTYPE, ABOUT_DTYPE)
    quantize: str = setting("none", QUANTIZE, ABOUT_QUANTIZE)
    offload: str = setting("none", OFFLOAD, ABOUT_OFFLOAD)
    resume: bool = setting(False, FLAG, "make only missing or damaged parts")

    def __post_init__(self) -> None:
        check(self)


def filter_of(fields: dict[str, Any]) -> FeynmanKac:
    """Return the filter's settings from fields by name; ValueError for invalid ones."""
    if isinstance(fields.get("funnel"), list):  # YAML has no tuples
        fields = fields | {"funnel": tuple(fields["funnel"])}
    try:
        return FeynmanKac(**fields)
    except TypeError as error:
        raise ValueError(f"filter= is wrong: {error}") from None


def call_of(given: dict[str, Any], defaults: dict[str, Any], name: str = "call") -> dict[str, Any]:
    """Return keywords of the pipeline's call; ValueError for one that is steer()'s argument."""
    for key in given:
        if key in inspect.signature(steer_each).parameters:
            raise ValueError(f"{name}.{key} is not a keyword of the pipeline's call; leave it out")
    return defaults | given
