"""Images inside a page: WebP in data URLs, within a limit on their total size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

__all__ = ["Budget", "Picture", "Sprite", "sprite"]

_LOSSLESS = 100
# (fraction of the longest side, quality), tried in this order until the image fits
_LADDER = (
    (1, _LOSSLESS), (1, 85), (7 / 8, 75), (3 / 4, 65), (5 / 8, 55), (1 / 2, 55), (3 / 8, 50),
    (5 / 16, 45), (1 / 4, 40), (3 / 16, 35), (1 / 8, 30), (1 / 16, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A small copy of an image that links to its file, for the templates' macro `figure`.

    path: the file, relative to the page; label: the alternative text.
    """

    path: str
    label: str
    best: bool
    address: str  # data URL of the small copy
    size: tuple[int, int]
    pixels: bool  # whether it is enlarged without interpolation


@dataclass
class Budget:
    """A limit of `size` bytes for `count` images; unused bytes are available to later images.

    Size and quality are lowered when necessary and never raised again, so the images of a page look
    alike. longest: the longest side of an image in pixels, if there is enough room.
    """

    size: int
    count: int
    longest: int = 128
    spent: int = 0
    done: int = 0
    rung: int = 0

    def encode(
        self, image: Image.Image, tiles: tuple[int, int] = (1, 1)
    ) -> tuple[str, Image.Image]:
        """Return a data URL of `image`, a grid of tiles (columns, rows), and the resized image.

        Every tile counts as one image and is resized separately, so that neighbours do not mix.
        """
        self.done += tiles[0] * tiles[1]
        room = self.size * self.done / max(self.count, self.done) - self.spent
        while True:
            share, quality = _LADDER[self.rung]
            small = _shrunk(image, tiles, max(1, round(self.longest * share)))
            content = _webp(small, quality)
            if len(content) <= room or self.rung == len(_LADDER) - 1:
                break
            self.rung += 1
        self.spent += len(content)
        return "data:image/webp;base64," + base64.b64encode(content).decode(), small

    def picture(self, image: Image.Image, path: str, label: str, best: bool = False) -> Picture:
        """Return the small copy of one image."""
        address, small = self.encode(image)
        return Picture(path, label, best, address, small.size, max(image.size) <= 96)


@dataclass(frozen=True)
class Sprite:
    """Tiles in one image: columns are scored steps, final images last; rows are particles."""

    image: Image.Image
    columns: int
    rows: int
    tile: tuple[int, int]  # width and height in pixels


def sprite(
    finals: Sequence[Image.Image], previews: Image.Image | None, tile: tuple[int, int] | None
) -> Sprite:
    """Return a sprite of the previews, if given, with the final images as the last column.

    tile: the size of a preview. Raises ValueError if `previews` is not a whole number of tiles.
    """
    width, height = tile or _fitted(finals[0].size, 64)
    columns, rows = 0, len(finals)
    if previews is not None:
        if min(width, height) < 1 or previews.width % width or previews.height % height:
            raise ValueError(
                f"the previews are {previews.width} x {previews.height} pixels, which is not a "
                f"whole number of tiles of {width} x {height}: the folder is damaged"
            )
        columns, rows = previews.width // width, max(rows, previews.height // height)
    page = Image.new("RGB", ((columns + 1) * width, rows * height), "white")
    if previews is not None:
        page.paste(previews, (0, 0))
    for row, image in enumerate(finals):
        page.paste(
            image.resize((width, height), _how(image, width)), (columns * width, row * height)
        )
    return Sprite(page, columns + 1, rows, (width, height))


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _how(image: Image.Image, width: int) -> Image.Resampling:
    return Image.Resampling.LANCZOS if width < image.width else Image.Resampling.NEAREST


def _shrunk(image: Image.Image, tiles: tuple[int, int], side: int) -> Image.Image:
    columns, rows = tiles
    width, height = _fitted((image.width // columns, image.height // rows), side)
    size = (columns * width, rows * height)
    if size == image.size:
        return image
    # a box filter does not cross the edges of tiles; a single image has no neighbours
    how = Image.Resampling.LANCZOS if tiles == (1, 1) else Image.Resampling.BOX
    return image.resize(size, how)


def _webp(image: Image.Image, quality: int) -> bytes:
    target = io.BytesIO()
    if quality == _LOSSLESS:
        image.save(target, "WEBP", lossless=True, quality=50, method=2)
    else:
        image.save(target, "WEBP", quality=quality, method=2)
    return target.getvalue()
