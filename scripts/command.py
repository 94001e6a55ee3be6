"""What the scripts with `key=value` settings share: reading them, and how a script ends."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import rewards
from finetune import config
from steering import FeynmanKac
from steering.pipeline import steer_each
from tilt.loading import pick_dtype
from tilt.options import check_words, one_line
from tilt.processes import Stopped
from tilt.prompts import read

__all__ = [
    "call_of",
    "counted",
    "digest",
    "digest_of",
    "filter_of",
    "finish",
    "made_of",
    "prompts_of",
    "resolved",
    "settings_of",
]


def settings_of(words: Sequence[str], kind: type, notes: dict[str, str], about: str | None) -> Any:
    """Settings from [FILE.yaml] and key=value words; prints help and leaves for --help.

    ValueError for what is wrong with them, and where the folder `out` could not be made.
    """
    check_words(words)
    if any(word in ("-h", "--help") for word in words):
        print(about, "settings:", config.explain(kind, notes), sep="\n")
        raise SystemExit(0)
    file = Path(words[0]) if words and words[0].endswith((".yaml", ".yml")) else None
    settings = config.read(kind, file, list(words[file is not None :]))
    _check_folder(settings.out)
    return settings


def _check_folder(out: str) -> None:
    """ValueError for a folder that cannot be made; "" is for the script to refuse."""
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
    """Digests of what the run is made of, by the setting that names it; more: the script's own.

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
    name: str, read: Callable[[], Any], run: Callable[[Any], None], kept: str, pattern: str
) -> int:
    """Read a script's settings and run it; exit status 0, 2 for what was refused, 1 if it broke,
    130 on Ctrl-C. 1 as well where another process of the run has ended.

    kept: what is not lost, for the message, where `pattern` finds a file in the folder `out`.
    """
    settings = None

    def left() -> str:
        there = settings is not None and any(Path(settings.out).glob(pattern))
        return kept if there else "nothing is kept yet"

    try:
        settings = read()
        run(settings)
    except SafetensorError as error:  # no OSError, though it is that of a full disk
        print(f"{name}: {one_line(error)}; {left()}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"{name}: {one_line(error)}; {left()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as cut:
        died = isinstance(cut, Stopped)
        why = "another process ended" if died else "interrupted"
        print(f"{name}: {why}; {left()}: repeat with resume=true", file=sys.stderr)
        return 1 if died else 130
    return 0
