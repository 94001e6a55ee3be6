"""Reading of untrusted requests, in the forms that `rewards.backends.reward_messages` describes.

Legend: n images.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from rewards.backends.reward_messages import JSON, SAFETENSORS, Served, object_of, restored
from rewards.images import check_inputs, check_prompts, to_images

__all__ = ["BadRequest", "Request", "read_prompts", "read_request"]

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
LONGEST_PROMPT = 20_000  # characters
LONGEST_SIDE = 16_384  # pixels
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # how every PNG file begins, before its width and height


class BadRequest(ValueError):
    """A request that is refused; `status` is the HTTP status of the refusal."""

    def __init__(self, status: int, said: str) -> None:
        self.status = status
        super().__init__(said)


@dataclass(frozen=True)
class Request:
    """What a request asks to score: images (n, 3, h, w), floats in [0, 1], each with its prompt.

    references: for each image a list of images (3, h, w), or None; identity: that of the reward for
    which the request was made, or "".
    """

    images: Tensor
    prompts: list[str]
    references: list[list[Tensor]] | None
    identity: str


def read_request(body: bytes, kind: str, limits: Served) -> Request:
    """Read and check a request of the content type `kind`; raises BadRequest."""
    read = {SAFETENSORS: _of_safetensors, JSON: _of_json}
    found = read[kind](body, limits)
    _check_prompts(found.prompts)
    try:
        check_inputs(found.images, found.prompts)
    except ValueError as error:
        raise BadRequest(422, str(error)) from None
    if found.references is not None and len(found.references) != len(found.prompts):
        raise BadRequest(
            422,
            f"{len(found.prompts)} images need references of as many entries, one for each, but "
            f"got {len(found.references)}",
        )
    return found


def read_prompts(body: bytes) -> list[str]:
    """Read the JSON {"prompts": [...]}; raises BadRequest."""
    return _check_prompts(_json(body).get("prompts"))


def _check_prompts(prompts: Any) -> list[str]:
    try:
        check_prompts(prompts)
    except ValueError as error:
        raise BadRequest(422, str(error)) from None
    longest = max(map(len, prompts), default=0)
    if longest > LONGEST_PROMPT:
        raise BadRequest(
            422, f"a prompt has {longest} characters, over {LONGEST_PROMPT}: shorten it"
        )
    return prompts


def _json(body: bytes) -> dict[str, Any]:
    try:
        return object_of(body)
    except ValueError as error:  # also text that is not UTF-8, and numbers of too many digits
        raise BadRequest(400, f"the request is not JSON: {error!s:.200}") from None


def _identity(text: Mapping[str, Any]) -> str:
    found = text.get("identity") or ""
    if not isinstance(found, str):
        raise BadRequest(422, "identity must be text, as in the server's description")
    return found


def _of_safetensors(body: bytes, limits: Served) -> Request:
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise BadRequest(400, f"the request is not safetensors: {said:.200}") from None
    if "text" not in tensors or "images" not in tensors:
        raise BadRequest(422, f"the tensors text and images are needed but got {_few(tensors)}")
    text, images = tensors.pop("text"), tensors.pop("images")
    if text.dtype != torch.uint8:
        raise BadRequest(422, f"the tensor text must hold bytes but is {text.dtype}")
    about = _json(text.flatten().numpy().tobytes())
    for name, x, ndim in [("images", images, 4), *((n, x, 3) for n, x in tensors.items())]:
        if x.dtype != torch.uint8 and x.dtype not in FLOATS:
            raise BadRequest(422, f"{name} must be bytes or floats in [0, 1] but is {x.dtype}")
        if x.ndim != ndim or x.shape[-3] != 3 or min(x.shape[-2:]) < 1:
            wanted = "(n, 3, h, w)" if ndim == 4 else "(3, h, w)"
            raise BadRequest(422, f"{name} must have shape {wanted} but has {tuple(x.shape)}")
    _check_count(len(images) + len(tensors), limits)
    sizes = [tuple(images.shape[2:])] * len(images)
    _check_sizes(sizes + [tuple(x.shape[1:]) for x in tensors.values()], limits)
    return Request(
        restored(images, about.get("reciprocal") is True),
        about.get("prompts", []),
        _referred(about.get("references"), tensors),
        _identity(about),
    )


def _few(names: Iterable[Any]) -> str:
    return f"{sorted(names)}"[:100]


def _referred(numbers: Any, tensors: Mapping[str, Tensor]) -> list[list[Tensor]] | None:
    """Return the reference images of each image, one and the same list for equal numbers."""
    if numbers is None:
        return None
    lists: dict[tuple[Any, ...], list[Tensor]] = {}
    try:
        if max(map(len, numbers), default=0) > len(tensors):  # before they are read
            raise ValueError
        keys = [tuple(f"reference.{number:d}" for number in entry) for entry in numbers]
        for key in keys:
            lists[key] = lists.get(key) or [_reference(tensors[name]) for name in key]
    except (KeyError, TypeError, ValueError):
        raise BadRequest(
            422,
            "references must be a list of numbers of the tensors reference.0, ... for each image, "
            "or null",
        ) from None
    return [lists[key] for key in keys]


def _reference(x: Tensor) -> Tensor:
    x = restored(x)
    try:
        check_inputs(x[None], [""])
    except ValueError as error:
        raise BadRequest(422, f"a reference image is refused: {error}") from None
    return x


def _of_json(body: bytes, limits: Served) -> Request:
    about = _json(body)
    unknown = sorted(set(about) - {"prompts", "images", "references", "identity"})
    if unknown:
        raise BadRequest(
            422, f"{unknown[0]!r:.80} is unknown; give prompts, images, references, identity"
        )
    images, references = about.get("images"), about.get("references")
    if not isinstance(images, list):
        raise BadRequest(422, "images must be a list of PNG files in base64")
    if references is not None and not (
        isinstance(references, list) and all(isinstance(entry, list) for entry in references)
    ):
        raise BadRequest(422, "references must be a list of PNG files for each image, or null")
    entries = [images, *(references or [])]
    _check_count(sum(map(len, entries)), limits)
    files = [[_file(text) for text in entry] for entry in entries]
    _check_sizes([_size(file) for entry in files for file in entry], limits)
    first, *others = [[_picture(file) for file in entry] for entry in files]
    sizes = {tuple(picture.shape[1:]) for picture in first}
    if len(sizes) > 1:
        raise BadRequest(422, f"images of one size are needed but got (h, w) {_few(sizes)}")
    stacked = torch.stack(first) if first else torch.zeros(0, 3, 1, 1)
    found = None if references is None else others
    return Request(stacked, about.get("prompts", []), found, _identity(about))


def _check_count(count: int, limits: Served) -> None:
    if count > limits.max_images:
        raise BadRequest(
            413, f"there are {count} images and references, over {limits.max_images}: send fewer"
        )


def _check_sizes(sizes: Sequence[tuple[int, ...]], limits: Served) -> None:
    """Require that the images and references of these sizes (h, w) are within the limits."""
    _check_count(len(sizes), limits)
    pixels, side = sum(h * w for h, w in sizes), max((max(size) for size in sizes), default=0)
    if pixels > limits.max_pixels:
        raise BadRequest(
            413, f"the images have {pixels} pixels, over {limits.max_pixels}: send fewer at once"
        )
    if side > LONGEST_SIDE:  # matrices that resize have as many columns
        raise BadRequest(413, f"an image has a side of {side} pixels, over {LONGEST_SIDE}")


def _file(text: Any) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "-", validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(422, "an image is not text in base64: send a PNG file") from None


def _size(file: bytes) -> tuple[int, int]:
    """Return the size (h, w) that the header of a PNG file states, without decoding it."""
    if file[:16] != PNG or len(file) < 33:
        raise BadRequest(422, "an image is no PNG file: send one")
    width, height, depth = struct.unpack(">IIB", file[16:25])
    if depth > 8:
        raise BadRequest(422, f"an image has {depth} bits per channel: convert it to 8 first")
    return height, width


def _picture(file: bytes) -> Tensor:
    """Return the image (3, h, w) of a PNG file whose size has been checked."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
            return to_images(picture)[0]
    except Exception:  # a decoder can raise anything at damaged data
        raise BadRequest(422, "an image is a damaged PNG file: write it again") from None
