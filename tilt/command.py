"""What commands make of their settings (the filter, the call, digests), and how a command ends."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import rewards
from finetune.ranges import (
    FLAG,
    KEYWORDS,
    NAME,
    SEED,
    TEXT,
    check,
    one_of,
    optional,
    setting,
    whole,
)  # fmt: skip
from steering import FeynmanKac
from steering.pipeline import steer_each
from tilt.loading import DTYPES, pick_dtype
from tilt.options import Options, one_line
from tilt.processes import Stopped
from tilt.prompts import read

__all__ = [
    "Drawing",
    "call_of",
    "check_folder",
    "counted",
    "digest",
    "digest_of",
    "filter_of",
    "finish",
    "made_of",
    "prompts_of",
    "resolved",
]


@dataclass
class Drawing:
    """The settings of a command that draws the prompts of a file."""

    prompts: str = setting("", TEXT, "a file of prompts: one a line, or .jsonl")
    out: str = setting("", TEXT, "the folder to make")
    model: str = setting("tiny-sd3", NAME, "hub id, folder, tiny-sd3 or tiny-sd")
    lora: str | None = setting(None, optional(NAME), "LoRA weights to load: another round")
    filter: dict[str, Any] = setting(
        dict, KEYWORDS, "fields of FeynmanKac, as in --filter.reward-scale 30"
    )
    call: dict[str, Any] = setting(
        dict, KEYWORDS, "keywords of the pipeline's call, as in --call.guidance-scale 4.5"
    )
    seed: int = setting(0, SEED, "seed of the whole run")
    max_batch: int | None = setting(
        None, optional(whole(1)), "rows that the network evaluates at once"
    )
    dtype: str = setting(
        "auto",
        one_of("auto", *DTYPES),
        "type of the networks; auto is float32 on a CPU, else a half type",
    )
    resume: bool = setting(False, FLAG, "make only what is missing or damaged")

    def __post_init__(self) -> None:
        check(self)


def check_folder(out: str) -> None:
    """ValueError for a folder that cannot be made; "" is for the command to refuse."""
    if out and not out.strip():
        raise ValueError(f"out is {out!r}; name a folder")
    folder = Path(out)
    for place in (folder, *folder.absolute().parents):
        try:
            place.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"out={out!r:.80} cannot be made: {error.strerror}") from None
        if place != folder and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"out={out!r:.80} cannot be made: {place} takes no new folders")
        return


def resolved(settings: Any) -> Any:
    """The settings with the dtype that "auto" is on this machine, for what is written down.

    Nothing is put on a device: of several processes each would take memory of the first one.
    """
    from accelerate.utils import parse_flag_from_env

    device, kind = torch.device("cpu"), torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        own = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.accelerator.device_count())
        device = torch.device(kind.type, own)
    dtype = pick_dtype(settings.dtype, device)
    return replace(settings, dtype=str(dtype).removeprefix("torch."))


def filter_of(fields: dict[str, Any]) -> FeynmanKac:
    """The filter's settings by name; ValueError for a name or a value that it does not have."""
    if isinstance(fields.get("funnel"), list):  # YAML has no tuples
        fields = fields | {"funnel": tuple(fields["funnel"])}
    try:
        return FeynmanKac(**fields)
    except TypeError as error:
        raise ValueError(f"filter= is wrong: {error}") from None


def call_of(given: dict[str, Any], defaults: dict[str, Any], name: str = "call") -> dict[str, Any]:
    """Keywords of the pipeline's call; ValueError for one that is steering's own, not its."""
    for key in given:
        if key in inspect.signature(steer_each).parameters:
            raise ValueError(f"{name}.{key} is no keyword of the pipeline's call; leave it out")
    return defaults | given


def digest(lora: str | None) -> str | None:
    """What tells the weights of a LoRA, a file or a folder, from others; a hub id as it is."""
    place = os.path.expanduser(lora or "")
    if not (os.path.isdir(place) or os.path.isfile(place)):
        return lora
    path = Path(place)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def prompts_of(file: str) -> list[str]:
    """The prompts of a file, each once."""
    return list(dict.fromkeys(prompt.text for prompt in read(Path(file))))


def made_of(settings: Any, spec: str, **more: str) -> dict[str, str]:
    """Digests of what the run is made of, by the setting that names it; more: the command's own.

    spec: of the reward that is trained on, "" if it is not known.

    A run is not carried on where a file or a folder holds something else under the same name.
    """
    found = {"lora": digest(settings.lora) or ""} | more
    if settings.check.prompts:
        found["check.prompts"] = digest_of(prompts_of(settings.check.prompts))
    if settings.check.every and (checked := settings.check.reward or spec):
        found["check.reward"] = rewards.identity(checked)
    return found


def counted(count: int, noun: str) -> str:
    """As in "1 prompt" and "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def digest_of(texts: Sequence[str]) -> str:
    """What tells these lines, and their order, from others."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def finish(
    options: Options, argv: Sequence[str], run: Callable[[Any], None], kept: str, pattern: str
) -> int:
    """Read a command's settings and run it.

    The exit status is 0; 2 for what was refused; 1 if it broke, or another process of the run has
    ended; 130 on Ctrl-C. kept: what is not lost, for the message, where `pattern` finds a file in
    the folder `out`.
    """
    settings: Any = None

    def said(error: BaseException) -> str:
        """In words of options, as those of what was read already are."""
        return options.in_words(one_line(error)) if settings else one_line(error)

    def left() -> str:
        there = settings is not None and any(Path(settings.out).glob(pattern))
        return kept if there else "nothing is kept yet"

    name = options.name
    try:
        settings = options.read(argv)
        check_folder(settings.out)
        run(settings)
    except SafetensorError as error:  # no OSError, though it is that of a full disk
        print(f"{name}: {said(error)}; {left()}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{name}: {said(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"{name}: {said(error)}; {left()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as cut:
        died = isinstance(cut, Stopped)
        why = "another process ended" if died else "interrupted"
        print(f"{name}: {why}; {left()}: repeat with --resume", file=sys.stderr)
        return 1 if died else 130
    return 0
