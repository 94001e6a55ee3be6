"""Messages between a reward server and its clients: requests of images, and answers with scores.

A request is in one of two forms. In safetensors, images keep every bit of their floats:

    images              (n, 3, h, w), bytes or floats in [0, 1]
    reference.0, ...    (3, h, w), likewise
    text                bytes of the JSON {"prompts": [...], "references": [[0, 1], ...] or null,
                        "identity": "...", "reciprocal": false}

In JSON, images are PNG files in base64: {"prompts": [...], "images": [...], "references":
[[...], ...] or null, "identity": "..."}. All but the prompts and the images may be left out.
An answer is JSON, {"identity": "...", "dtype": "float32", "total": [...], "components": {name:
[...]}, "dtypes": {name: "float32"}}, in which null is NaN, and "Infinity" and "-Infinity" are
texts. Nothing is ever unpickled.

Legend: n images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..images import to_images
from ..references import each_once

__all__ = [
    "JSON",
    "SAFETENSORS",
    "Packed",
    "Served",
    "UnreadableAnswer",
    "error_of",
    "object_of",
    "pack",
    "read_answer",
    "restored",
    "write_answer",
    "write_prompts",
]

JSON, SAFETENSORS = "application/json", "application/x-safetensors"  # content types
PROTOCOL = "tilt reward 1"
FLAGS = ("wants_references", "needs_references")
LIMITS = ("max_bytes", "max_images", "max_pixels")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Packed:
    """A request in safetensors, and the number of its images and references and of their pixels."""

    body: bytes
    images: int
    pixels: int


class UnreadableAnswer(ValueError):
    """An answer without the scores that were asked for."""


@dataclass(frozen=True)
class Served:
    """What a server says about its reward.

    Attributes:
        spec: The text form of the reward, with every argument.
        identity: 12 hexadecimal digits that differ for another spec, and for another version of its
            code or files (`rewards.identity`).
        components: The names of its components.
        range: Bounds of the total, None where there is none.
        wants_references: Whether it uses reference images.
        needs_references: Whether it cannot score without them.
        max_bytes: Largest body of a request.
        max_images: Largest number of images and references in a request.
        max_pixels: Largest number of their pixels.
    """

    spec: str
    identity: str
    components: tuple[str, ...]
    range: tuple[float | None, float | None]
    wants_references: bool
    needs_references: bool
    max_bytes: int
    max_images: int
    max_pixels: int

    def accepts(self, request: Packed) -> bool:
        """Whether a request is within these limits."""
        return (
            len(request.body) <= self.max_bytes
            and request.images <= self.max_images
            and request.pixels <= self.max_pixels
        )

    @property
    def reported(self) -> tuple[str, ...]:
        """The components that a client reports beside the total: none if there is only one."""
        return self.components if len(self.components) > 1 else ()

    def to_json(self) -> dict[str, Any]:
        """Return the description as the server sends it."""
        return {"protocol": PROTOCOL, **asdict(self), "differentiable": False}

    @classmethod
    def of_json(cls, text: bytes) -> Served:
        """Read a description; raises ValueError if it is none."""
        found = object_of(text)
        low, high = found["range"] if _is_range(found.get("range")) else (0, None)
        names = found.get("components")
        good = (
            found.get("protocol") == PROTOCOL
            and _is_range(found.get("range"))
            and isinstance(names, list)
            and all(isinstance(name, str) and 0 < len(name) <= 200 for name in names)
            and all(isinstance(found.get(key), str) for key in ("spec", "identity"))
            and all(isinstance(found.get(key), bool) for key in FLAGS)
            and all(type(found.get(key)) is int for key in LIMITS)
        )
        if not good:
            raise ValueError("it is not the description of a reward")
        kept = ("spec", "identity", *FLAGS, *LIMITS)
        own = {key: found[key] for key in kept}
        return cls(components=tuple(found["components"]), range=(low, high), **own)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(end is None or (type(end) in (int, float) and math.isfinite(end)) for end in value)
    )


def pack(
    images: Tensor, prompts: Sequence[str], references: Sequence[Any] | None, identity: str
) -> Packed:
    """Return a request in safetensors.

    Args:
        images: Float (n, 3, h, w) in [0, 1]. They are sent as bytes if these restore every bit.
        references: For each image, one reference image, a sequence or a tensor of several.
        identity: That of the reward in its server's description.
    """
    sent, reciprocal = _smallest(images.detach().cpu())
    tensors = {"images": sent}
    text: dict[str, Any] = {"prompts": list(prompts), "identity": identity}
    text |= {"reciprocal": reciprocal}
    if references is not None:
        text["references"] = _add_references(tensors, references)
    count = len(images) + len(tensors) - 1
    pixels = sum(x.numel() // 3 for x in tensors.values())
    tensors["text"] = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    return Packed(safetensors.torch.save(tensors), count, pixels)


def _smallest(x: Tensor) -> tuple[Tensor, bool]:
    """Return bytes that restore x exactly, or else x; and whether by the reciprocal of 255.

    Images of bytes are the quotient on a CPU, but the product with the reciprocal on a GPU.
    """
    if x.dtype == torch.float32:
        numbers = x.mul(255).round_().clamp_(0, 255).to(torch.uint8).contiguous()
        for reciprocal in (False, True):
            if torch.equal(restored(numbers, reciprocal), x):
                return numbers, reciprocal
    return x.contiguous(), False


def restored(x: Tensor, reciprocal: bool = False) -> Tensor:
    """Return images that were sent as bytes or as floats, as they were before."""
    if x.dtype != torch.uint8:
        return x
    return x.float().mul_(1 / 255) if reciprocal else x.float().div_(255)


def _add_references(tensors: dict[str, Tensor], references: Sequence[Any]) -> list[list[int]]:
    """Add each reference image once; return the numbers of those of each image."""

    def add(entry: Any, _index: int) -> list[int]:
        numbers = []
        for picture in entry if isinstance(entry, list | tuple) else [entry]:
            for row in to_images(picture, "cpu").split(1):
                sent, reciprocal = _smallest(row)
                numbers.append(len(tensors) - 1)  # without the images
                tensors[f"reference.{numbers[-1]}"] = (row if reciprocal else sent)[0].clone()
        return numbers

    return each_once(references, add)


def write_answer(total: Tensor, components: Mapping[str, Tensor], identity: str) -> bytes:
    """Return the answer with a total (n,) and the components, each float32 or float64."""
    answer = {
        "identity": identity,
        "dtype": _dtype(total),
        "total": _numbers(total),
        "components": {name: _numbers(x) for name, x in components.items()},
        "dtypes": {name: _dtype(x) for name, x in components.items()},
    }
    return json.dumps(answer, allow_nan=False).encode()


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _numbers(x: Tensor) -> list[float | str | None]:
    # repr() of a Python float, which JSON uses, restores every float32 and float64
    return [_written(value) for value in x.tolist()]


def _written(value: float) -> float | str | None:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_answer(
    text: bytes, count: int, names: Sequence[str]
) -> tuple[str, Tensor, dict[str, Tensor]]:
    """Return the identity of the reward, the total (n,) and the components of these names.

    Raises UnreadableAnswer for a text that is no answer for `count` images.
    """
    try:
        found = object_of(text)
        total = _column(found["total"], found["dtype"], count)
        columns, dtypes = found["components"], found["dtypes"]
        parts = {name: _column(columns[name], dtypes[name], count) for name in names}
        return str(found["identity"]), total, parts
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UnreadableAnswer(f"it holds no scores of {count} images") from None


def _column(values: Any, dtype: str, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError
    return torch.tensor([_read(value) for value in values], dtype=DTYPES[dtype])


def _read(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) and value not in ("Infinity", "-Infinity"):
        raise ValueError
    return float(value)


def object_of(text: bytes) -> dict[str, Any]:
    """Return the object of a JSON text, {} for any other value; raises ValueError."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return found if isinstance(found, dict) else {}


def write_prompts(prompts: Sequence[str]) -> bytes:
    """Return the request to check prompts."""
    return json.dumps({"prompts": list(prompts)}).encode()


def error_of(text: bytes | bytearray) -> str:
    """Return the sentence of a refusal, {"detail": "..."}, or ""."""
    try:
        said = object_of(bytes(text)).get("detail")
    except ValueError:
        said = ""
    return " ".join(said.split())[:500] if isinstance(said, str) else ""
