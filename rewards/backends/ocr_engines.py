"""OCR engines that read the text in an image: RapidOCR and Tesseract.

Legend: n images, h w their size; m boxes of text, given by their corners clockwise from the top
left.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from queue import Empty, LifoQueue
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import to_uint8

__all__ = ["RapidOcr", "Reader", "Tesseract", "reader", "reading_order"]

Look = Callable[[np.ndarray], str]  # bytes (h, w, 3) RGB -> text

CACHED = 2048  # images
MOST_THREADS = 4
SMALLEST = 96  # pixels of the short side below which the image is enlarged for the detector
LARGEST = 736  # pixels of the long side above which it is reduced (RapidOCR's default)
LEGIBLE = 512  # pixels of the short side that Tesseract needs for letters of 8 px in 64
MOST_UPSCALE = 4
LARGEST_UPSCALE = 16  # limit of the argument
MOST_SIDE = 2000  # pixels of the long side, above which RapidOCR reduces the image
SPARSE_TEXT = 11  # Tesseract's page segmentation mode for text anywhere in the image
TIMEOUT = 60.0  # seconds for an image; 0.1 to 0.5 are usual


class Reader:
    """Reads the texts of images in threads, and caches them by the bytes of the image.

    `look` is called concurrently, each time with one image, so that a text depends on its image
    only.
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, images: Tensor) -> list[str]:
        """Return one string for each of the images, float (n, 3, h, w) in [0, 1]."""
        pictures = to_uint8(images)
        keys = [hashlib.sha256(f"{p.shape}".encode() + p.tobytes()).digest() for p in pictures]
        with self._lock:
            texts = {key: self._texts[key] for key in keys if key in self._texts}
        unread = {key: p for key, p in zip(keys, pictures, strict=True) if key not in texts}
        threads = min(MOST_THREADS, torch.get_num_threads(), len(unread))
        if threads < 2:
            found = [self.look(picture) for picture in unread.values()]
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(self.look, unread.values()))
        texts.update(zip(unread, found, strict=True))
        with self._lock:
            for key in texts:
                self._texts[key] = texts[key]
                self._texts.move_to_end(key)
            while len(self._texts) > CACHED:
                self._texts.popitem(last=False)
        return [texts[key] for key in keys]


_READERS: WeakValueDictionary[Look, Reader] = WeakValueDictionary()


def reader(look: Look) -> Reader:
    """Return the reader of an engine with its settings, shared by all rewards that use it."""
    found = _READERS.get(look)
    if found is None:
        found = _READERS[look] = Reader(look)
    return found


def reading_order(boxes: np.ndarray) -> list[int]:
    """Return the order in which to read boxes (m, 4, 2): lines from the top, each from the left.

    Boxes form a line if any two of them overlap by at least half the height of the smaller one,
    measured along the common slant of the text. The result depends neither on the order of the
    boxes nor on the scale, unlike RapidOCR's, which joins boxes that begin within 10 pixels.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4, 2)
    dx, dy = (boxes[:, 1] - boxes[:, 0] + boxes[:, 2] - boxes[:, 3]).sum(0)
    slant = math.atan2(dy, dx)
    x, y = np.moveaxis(boxes, 2, 0)
    along = x * math.cos(slant) + y * math.sin(slant)
    down = y * math.cos(slant) - x * math.sin(slant)
    left, top, bottom = along.min(1), down[:, :2].mean(1), down[:, 2:].mean(1)

    def level(i: int, j: int) -> bool:
        common = min(bottom[i], bottom[j]) - max(top[i], top[j])
        return common >= 0.5 * min(bottom[i] - top[i], bottom[j] - top[j])

    lines: list[list[int]] = []
    whole = [tuple(box) for box in boxes.reshape(len(boxes), 8)]  # where nothing else differs

    def height(i: int) -> tuple[float, ...]:
        return (top[i] + bottom[i], left[i], top[i], *whole[i])

    for i in sorted(range(len(boxes)), key=height):
        line = next((line for line in lines if all(level(i, j) for j in line)), None)
        if line is None:
            lines.append([i])
        else:
            line.append(i)
    return [i for line in lines for i in sorted(line, key=lambda i: (left[i], top[i], *whole[i]))]


@dataclass(frozen=True)
class RapidOcr:
    """RapidOCR (PP-OCRv6 small) with settings of the detector for small images.

    Each thread uses its own engine, which runs one thread inside onnxruntime.

    Args:
        limit_side_len: Pixels of the short side to which the image is enlarged for the detector;
            None keeps the size if it is between 96 and 736.
        upscale: Factor by which the image is enlarged first (bicubic).
        detect: False leaves out the detector and reads the image as one line.
    """

    limit_side_len: int | None = None
    upscale: int = 1
    detect: bool = True
    _idle: dict[tuple[str, int], LifoQueue[Any]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        limit = self.limit_side_len
        if limit is not None and (type(limit) is not int or not 32 <= limit <= 2 * MOST_SIDE):
            raise ValueError(
                f"limit_side_len is {limit!r} pixels; "
                f"give a whole number from 32 to {2 * MOST_SIDE}, or leave it out"
            )
        _check_upscale(self.upscale)
        if type(self.detect) is not bool:
            raise ValueError(f"detect is {self.detect!r}; give true or false")
        missing = [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"the OCR reward needs {' and '.join(missing)}: pip install rapidocr onnxruntime"
            )

    def __call__(self, picture: np.ndarray) -> str:
        picture = _enlarged(picture, self.upscale)
        height, width = picture.shape[:2]
        long, short = max(height, width), min(height, width)
        # RapidOCR reduces the long side and rounds the other one to a multiple of 32, maybe to 0
        if long > MOST_SIDE and short * MOST_SIDE < 17 * long:
            raise ValueError(
                f"RapidOCR cannot read an image of {width} × {height} pixels, which is too long "
                "and thin; crop it, or use engine=tesseract"
            )
        limit = self._limit(height, width)
        idle = self._idle.setdefault(limit, LifoQueue())
        try:
            engine = idle.get_nowait()
        except Empty:
            engine = _engine(limit, self.detect)
        found = engine(np.ascontiguousarray(picture[..., ::-1]))  # it takes BGR
        idle.put(engine)
        texts = found.txts or ()
        order = reading_order(found.boxes) if self.detect and texts else range(len(texts))
        return " ".join(texts[i] for i in order)

    def _limit(self, height: int, width: int) -> tuple[str, int]:
        if self.limit_side_len is not None:
            return "min", self.limit_side_len
        return ("max", LARGEST) if max(height, width) > LARGEST else ("min", SMALLEST)


def _engine(limit: tuple[str, int], detect: bool) -> Any:
    from rapidocr import EngineType, LangDet, LangRec, ModelType, OCRVersion, RapidOCR

    model = {
        "engine_type": EngineType.ONNXRUNTIME,
        "ocr_version": OCRVersion.PPOCRV6,
        "model_type": ModelType.SMALL,
        "model_path": None,
    }
    settings = {
        "Global": {
            "log_level": "critical",
            "text_score": 0.0,  # an uncertain reading still counts letter by letter
            "use_det": detect,
            "use_cls": False,  # text is assumed upright
            "use_rec": True,
            "use_preprocess_img": True,
            "min_side_len": 30,
            "max_side_len": MOST_SIDE,
            "use_vertical_padding": True,
            "min_height": 30,
            "width_height_ratio": 8,
            "return_word_box": False,
        },
        "Det": model
        | {
            "lang_type": LangDet.CH,
            "limit_type": limit[0],
            "limit_side_len": limit[1],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "thresh": 0.3,
            "box_thresh": 0.5,
            "max_candidates": 1000,
            "unclip_ratio": 1.6,
            "use_dilation": True,
            "score_mode": "fast",
        },
        "Rec": model | {"lang_type": LangRec.CH, "rec_img_shape": [3, 48, 320], "rec_batch_num": 6},
        "EngineConfig.onnxruntime": {
            "intra_op_num_threads": 1,
            "inter_op_num_threads": 1,
            "enable_cpu_mem_arena": True,  # a fifth faster at 512 px, for 100 MB per engine
            "use_cuda": False,
        },
    }
    flat = {f"{part}.{key}": v for part, values in settings.items() for key, v in values.items()}
    return RapidOCR(params=flat)


@dataclass(frozen=True)
class Tesseract:
    """The program `tesseract` with its English LSTM model, in one process for each image.

    Args:
        psm: Page segmentation mode, 3 to 13: 11 finds text anywhere, 6 reads one block, 7 one
            line.
        upscale: Factor by which the image is enlarged (bicubic); None enlarges it at most 4 times
            until its short side has 512 pixels. With 40 words in 8 px letters in images of 64 px,
            Tesseract read 3 words without enlargement and 36 with it.
    """

    psm: int = SPARSE_TEXT
    upscale: int | None = None

    def __post_init__(self) -> None:
        if type(self.psm) is not int or not 3 <= self.psm <= 13:
            raise ValueError(
                f"psm is {self.psm!r}; give a page segmentation mode of tesseract, 3 to 13"
            )
        if self.upscale is not None:
            _check_upscale(self.upscale)
        if shutil.which("tesseract") is None:
            raise ValueError(
                "engine=tesseract needs the program tesseract, which is not on the PATH: "
                "apt install tesseract-ocr"
            )

    def __call__(self, picture: np.ndarray) -> str:
        factor = self.upscale or min(MOST_UPSCALE, math.ceil(LEGIBLE / min(picture.shape[:2])))
        png = io.BytesIO()
        Image.fromarray(_enlarged(picture, factor)).save(png, format="PNG", compress_level=1)
        command = ["tesseract", "stdin", "stdout", "-l", "eng", "--oem", "1"]
        command += ["--psm", str(self.psm), "-c", "tessedit_create_tsv=1"]
        try:
            done = subprocess.run(
                command,
                input=png.getvalue(),
                capture_output=True,
                timeout=TIMEOUT,
                env=os.environ | {"OMP_THREAD_LIMIT": "1"},  # threads of this process are faster
            )
        except subprocess.TimeoutExpired as error:
            height, width = picture.shape[:2]
            raise TimeoutError(
                f"tesseract took over {TIMEOUT:g} s for an image of {width} × {height} pixels; "
                "use a smaller upscale, or another psm"
            ) from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise RuntimeError(f"tesseract failed with code {done.returncode}: {said[-1]}")
        return _text(done.stdout.decode())


def _text(table: str) -> str:
    """Return the text of Tesseract's TSV, whose rows of level 4 are lines and of level 5 words."""
    boxes: list[np.ndarray] = []
    words: list[list[str]] = []
    for row in table.splitlines()[1:]:
        level, *_, left, top, width, height, _, text = row.split("\t", 11)
        if level == "4":
            corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
            boxes.append(corners * [int(width), int(height)] + [int(left), int(top)])
            words.append([])
        elif level == "5" and text.strip():
            words[-1].append(text.strip())
    return " ".join(word for i in reading_order(np.array(boxes)) for word in words[i])


def _check_upscale(upscale: int) -> None:
    if type(upscale) is not int or not 1 <= upscale <= LARGEST_UPSCALE:
        raise ValueError(f"upscale is {upscale!r}; give a whole number from 1 to {LARGEST_UPSCALE}")


def _enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return picture
    height, width = picture.shape[:2]
    size = (width * factor, height * factor)
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
