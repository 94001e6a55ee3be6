"""Reproduction of a run from its manifest: its command, or its call of `steer`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

__all__ = ["call", "command"]


def command(manifest: dict[str, Any]) -> str:
    """Return the shell command that started a run of `tilt steer`."""
    words = manifest["command"]  # older versions wrote steer.py
    return shlex.join(["tilt", "steer", *words[words[0] == "tilt" :][1:]])


def call(manifest: dict[str, Any]) -> str:
    """Return Python code that repeats the call.

    pipe, reward, and decode and on_the_way if they were given, must be defined beforehand.
    Every value is written as a literal, so that no text of a manifest becomes code.
    """
    names = (
        "particles", "seed", "prompts_per_call", "preview_size", "score_frames", "video_score",
        "guidance_interval",
    )  # fmt: skip
    given = _tuples({name: manifest[name] for name in names if name in manifest})
    given["settings"] = _Code("FeynmanKac", _tuples(manifest["settings"]))
    given |= manifest.get("pipeline_keywords", {})
    model = [manifest.get("pipeline"), manifest.get("model")]
    scout = manifest.get("on_the_way")
    lines = [
        "from steering import FeynmanKac, steer\n",
        f"# pipe: {model!r}, reward: {manifest.get('reward')!r}",
        *([f"# on_the_way: {scout!r}"] if scout else []),
        f"prompts = {manifest['prompts']!r}",
        "out = steer(",
        "    pipe,",
        "    prompts,",
        "    reward,",
        *(f"    {name}={value!r}," for name, value in given.items()),
        *(["    decode=decode,"] if manifest.get("decode") is True else []),
        *(["    on_the_way=on_the_way,"] if scout else []),
        ")",
    ]
    return "\n".join(lines)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Convert lists, as which JSON stored tuples, back to tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@dataclass(frozen=True)
class _Code:
    name: str
    keywords: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.keywords.items())})"
