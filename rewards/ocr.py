"""Does the picture show the words that the prompt quotes? Read by RapidOCR, without a network.

Legend: n images.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from queue import Empty, LifoQueue
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import check_inputs, to_uint8
from .spec import written

__all__ = ["MODES", "OcrReward", "Reader", "distance", "quoted_text", "reader"]

SMALLEST = 96  # pixels of the short side below which a picture is enlarged for the detector
LARGEST = 736  # pixels of the long side above which it is shrunk (RapidOCR's own figure)
REMEMBERED = 2048  # pictures
MOST_THREADS = 4


def quoted_text(prompt: str) -> list[str]:
    """The spans of a prompt in double quotes, straight or curly, that are not blank."""
    return [span for span in re.findall('["“”„]([^"“”„]*)["“”„]', prompt) if span.strip()]


def distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def _normal(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _flow_grpo(read: str, spans: list[str]) -> float:
    # as published (Liu et al. 2025, "Flow-GRPO"): anything that contains the target is perfect
    read, target = (text.replace(" ", "").lower() for text in (read, spans[0]))
    missed = 0 if target in read else min(distance(read, target), len(target))
    return 1 - missed / len(target)


def _strict(read: str, spans: list[str]) -> float:
    read, target = _normal(read), _normal("".join(spans))
    return 1 - min(distance(read, target), len(target)) / len(target)


def _max_norm(read: str, spans: list[str]) -> float:
    read, target = _normal(read), _normal("".join(spans))
    return 1 - distance(read, target) / max(len(read), len(target))


def _exact(read: str, spans: list[str]) -> float:
    return float(_normal(read) == _normal("".join(spans)))


def _cer(read: str, spans: list[str]) -> float:
    target = _normal("".join(spans))
    return -distance(_normal(read), target) / len(target)


MODES: dict[str, Callable[[str, list[str]], float]] = {
    "strict": _strict,
    "flow_grpo": _flow_grpo,
    "max_norm": _max_norm,
    "exact": _exact,
    "cer": _cer,
}


class OcrReward:
    """How well the text that is read agrees with the text that the prompt quotes.

    With d the edit distance and L the length of the target, case, width and spaces ignored:
    strict 1 - min(d, L)/L; max_norm 1 - d/max(L, length read); exact 1 or 0; cer -d/L;
    flow_grpo as strict, but 1 wherever the target occurs in what is read, and looking at the
    first quoted span only (the others join all spans). A prompt without quoted text is refused.

    Args: limit_side_len, upscale and detect choose the reader, see Reader; a second setting of
    these judges what the first was steered by.
    """

    differentiable = False
    wants_references = False

    def __init__(
        self,
        mode: str = "strict",
        *,
        limit_side_len: int | None = None,
        upscale: int = 1,
        detect: bool = True,
    ) -> None:
        if mode not in MODES:
            close = get_close_matches(str(mode), MODES, 1) or ["strict"]
            raise ValueError(
                f"the OCR mode {mode!r} is unknown; did you mean {close[0]!r} of {list(MODES)}?"
            )
        self.name = "ocr"
        self.spec = written(
            "ocr",
            OcrReward,
            mode=mode,
            limit_side_len=limit_side_len,
            upscale=upscale,
            detect=detect,
        )
        self.mode = mode
        self.range: tuple[float | None, float | None] = (None, 0.0) if mode == "cer" else (0.0, 1.0)
        self.reader = reader(limit_side_len, upscale, detect)

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that quote nothing, which this reward cannot score."""
        for prompt in prompts:
            if not quoted_text(prompt):
                raise ValueError(
                    f"the OCR reward cannot score the prompt {prompt!r}, which quotes no text; "
                    'put the wanted words in double quotes, as in: a sign that says "STOP"'
                )

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        self.check(prompts)
        texts = self.reader.read(images)
        score = MODES[self.mode]
        scores = [score(text, quoted_text(p)) for text, p in zip(texts, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, images: Tensor) -> list[str]:
        """The text of each picture (n, 3, h, w), boxes in reading order joined by spaces."""
        check_inputs(images, [""] * len(images))
        return self.reader.read(images)


class Reader:
    """RapidOCR (PP-OCR) with a detector fitted to small pictures, one picture at a time.

    The picture is enlarged `upscale` times (bicubic). The detector then sees it enlarged until
    its short side has `limit_side_len` pixels; None keeps its own size where that lies between
    96 and 736. `detect=False` leaves the detector out and reads the picture as one line.
    Every thread borrows an engine of its own, with one thread inside onnxruntime, so that
    a text depends on nothing but its picture; texts are remembered by the pictures' bytes.
    """

    def __init__(
        self, limit_side_len: int | None = None, upscale: int = 1, detect: bool = True
    ) -> None:
        if limit_side_len is not None and (type(limit_side_len) is not int or limit_side_len < 32):
            raise ValueError(
                f"limit_side_len is {limit_side_len!r} pixels; "
                "give a whole number, at least 32, or leave it out"
            )
        if type(upscale) is not int or upscale < 1:
            raise ValueError(f"upscale is {upscale!r}; give a whole number, 1 or more")
        if type(detect) is not bool:
            raise ValueError(f"detect is {detect!r}; give true or false")
        self.limit_side_len, self.upscale, self.detect = limit_side_len, upscale, detect
        self._engines: dict[tuple[str, int], LifoQueue[Any]] = {}
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, images: Tensor) -> list[str]:
        """One string a picture, from float (n, 3, h, w) in [0, 1]."""
        pictures = to_uint8(images)
        threads = min(MOST_THREADS, torch.get_num_threads(), len(pictures))
        if threads < 2:
            return [self._text(picture) for picture in pictures]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._text, pictures))

    def _text(self, picture: np.ndarray) -> str:
        key = hashlib.sha256(picture.tobytes() + str(picture.shape).encode()).digest()
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
                return self._texts[key]
        if self.upscale > 1:
            height, width = picture.shape[:2]
            size = (width * self.upscale, height * self.upscale)
            picture = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        limit = self._limit(*picture.shape[:2])
        with self._lock:
            idle = self._engines.setdefault(limit, LifoQueue())
        try:
            engine = idle.get_nowait()
        except Empty:
            engine = _engine(limit, self.detect)
        found = engine(np.ascontiguousarray(picture[..., ::-1])).txts or ()  # RapidOCR takes BGR
        idle.put(engine)
        text = " ".join(found)
        with self._lock:
            self._texts[key] = text
            while len(self._texts) > REMEMBERED:
                self._texts.popitem(last=False)
        return text

    def _limit(self, height: int, width: int) -> tuple[str, int]:
        if self.limit_side_len is not None:
            return "min", self.limit_side_len
        return ("max", LARGEST) if max(height, width) > LARGEST else ("min", SMALLEST)


_READERS: WeakValueDictionary[tuple[int | None, int, bool], Reader] = WeakValueDictionary()


def reader(limit_side_len: int | None = None, upscale: int = 1, detect: bool = True) -> Reader:
    """The reader of a setting, shared by all rewards that read with it."""
    key = (limit_side_len, upscale, detect)
    found = _READERS.get(key)
    if found is None:
        found = _READERS[key] = Reader(*key)
    return found


def _engine(limit: tuple[str, int], detect: bool) -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            "the OCR reward needs RapidOCR: pip install rapidocr onnxruntime"
        ) from error
    settings = {
        "Global.log_level": "critical",
        "Global.use_det": detect,
        "Global.use_cls": False,  # text is upright
        "Global.text_score": 0.0,  # a doubtful reading still counts letter by letter
        "Det.limit_type": limit[0],
        "Det.limit_side_len": limit[1],
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)
