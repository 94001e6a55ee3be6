"""How well the text in an image, read by an OCR engine, matches the text that the prompt quotes.

Legend: n images; d an edit distance, L the length of the target.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..backends.ocr_engines import SPARSE_TEXT, RapidOcr, Reader, Tesseract, reader
from ..images import check_inputs
from ..spec import written
from .base import Card

__all__ = ["MODES", "OcrReward", "distance", "nearest", "quoted_text"]

DOUBLE = re.compile('["“”„‟«»]([^"“”„‟«»]*)["“”„‟«»]')
# ’ is an apostrophe as well, so these quotes must be at the edges of words
SINGLE = re.compile(r"(?<!\w)[‘‚]([^‘‚]*?)[’‘](?!\w)")
STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")


def quoted_text(prompt: str) -> list[str]:
    """Return the non-blank spans of a prompt in double quotes, straight, curly or angular.

    If there are none, return those in single curly quotes. Straight single quotes are apostrophes.
    Any double quote closes any other, so a span cannot contain one.
    """
    spans = [span for span in DOUBLE.findall(prompt) if span.strip()]
    return spans or [span for span in SINGLE.findall(prompt) if span.strip()]


def distance(a: str, b: str) -> int:
    """Levenshtein distance: number of insertions, deletions and substitutions from a to b."""
    return _last_row(a, b, list(range(len(b) + 1)))[-1]


def nearest(a: str, b: str) -> int:
    """Return the smallest Levenshtein distance from a to any substring of b (Sellers 1980)."""
    return min(_last_row(a, b, [0] * (len(b) + 1)))


def _last_row(a: str, b: str, row: list[int]) -> list[int]:
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row


def _words(text: str) -> list[str]:
    # casefolding may undo the normal form, so it is applied twice
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(STRAIGHT).split()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", "".join(_words(text)))


def _without_punctuation(text: str) -> str:
    return "".join(c for c in text if not unicodedata.category(c).startswith("P"))


def _flow_grpo(read: str, spans: list[str]) -> float:
    # as published (Liu et al. 2025, "Flow-GRPO"): text that contains the target scores 1
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


def _word_f1(read: str, spans: list[str]) -> float:
    found, wanted = Counter(_words(read)), Counter(_words(" ".join(spans)))
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def _each(read: str, spans: list[str]) -> float:
    read, targets = _normal(read), [_normal(span) for span in spans]
    return sum(1 - nearest(target, read) / len(target) for target in targets) / len(targets)


MODES: dict[str, Callable[[str, list[str]], float]] = {
    "strict": _strict,
    "flow_grpo": _flow_grpo,
    "max_norm": _max_norm,
    "exact": _exact,
    "cer": _cer,
    "word_f1": _word_f1,
    "each": _each,
}


class OcrReward:
    """How well the text that is read matches the text that the prompt quotes.

    Case, width, spaces and the kind of quotes are ignored. The target is the quoted spans, joined
    in order. With the edit distance d and the length L of the target, the modes are strict,
    1 - min(d, L)/L; max_norm, 1 - d/max(L, length read); exact, 1 or 0; cer, -d/L, the character
    error rate; and word_f1, the F1 score of the words in any order. The mode each is the mean over
    spans of 1 - d/L for the substring closest to the span, so order and other text are ignored;
    flow_grpo is the published reward: strict on the first span, but 1 if the target occurs in the
    text. Prompts without quoted text are an error, see `quoted_text`.

    Args:
        mode: One of `MODES`.
        engine: "rapidocr", with limit_side_len, upscale and detect, or "tesseract", with psm and
            upscale; see `rewards.backends.ocr_engines`. A second engine can evaluate what the
            first was used to steer.
        punctuation: False removes punctuation from both texts.
    """

    card = Card(
        weights="PP-OCRv6 small, in the rapidocr wheel",
        size="31 MB",
        licence="Apache-2.0",
        range="[0, 1]; cer at most 0",
        citation="Liu et al. 2025, arXiv:2505.05470; PaddleOCR, Cui et al. 2025, arXiv:2507.05595",
    )
    differentiable = False
    wants_references = False

    def __init__(
        self,
        mode: str = "strict",
        *,
        engine: str = "rapidocr",
        punctuation: bool = True,
        limit_side_len: int | None = None,
        upscale: int | None = None,
        detect: bool = True,
        psm: int | None = None,
    ) -> None:
        check_choice("the OCR mode", mode, MODES)
        if type(punctuation) is not bool:
            raise ValueError(f"punctuation is {punctuation!r}; give true or false")
        reading = {"limit_side_len": limit_side_len, "upscale": upscale}
        reading |= {"detect": detect, "psm": psm}
        given = {"mode": mode, "engine": engine, "punctuation": punctuation}
        self.name = "ocr"
        self.spec = written("ocr", OcrReward, **given, **reading)
        self.mode, self.punctuation = mode, punctuation
        self.range: tuple[float | None, float | None] = (None, 0.0) if mode == "cer" else (0.0, 1.0)
        self.reader = _reader(engine, limit_side_len, upscale, detect, psm)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts without quoted text."""
        for prompt in prompts:
            self.targets(prompt)

    def targets(self, prompt: str) -> list[str]:
        """Return the quoted texts of a prompt, at least one; raises ValueError if there is none."""
        spans = [self._kept(span) for span in quoted_text(prompt)]
        spans = [span for span in spans if span.strip()]
        if not spans:
            nothing = "no text" if self.punctuation else "no text but punctuation"
            raise ValueError(
                f"the OCR reward cannot score the prompt {prompt!r}, which quotes {nothing}; "
                'put the wanted words in double quotes, as in: a sign that says "STOP"'
            )
        return spans

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        targets = [self.targets(prompt) for prompt in prompts]
        texts = [self._kept(text) for text in self.reader.read(images)]
        score = MODES[self.mode]
        scores = [score(text, spans) for text, spans in zip(texts, targets, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, images: Tensor) -> list[str]:
        """Return the text of each image (n, 3, h, w): lines in reading order, joined by spaces."""
        check_inputs(images, [""] * len(images))
        return self.reader.read(images)

    def _kept(self, text: str) -> str:
        return text if self.punctuation else _without_punctuation(text)


def _reader(
    engine: str, limit_side_len: int | None, upscale: int | None, detect: bool, psm: int | None
) -> Reader:
    if engine == "rapidocr":
        if psm is not None:
            raise ValueError(f"psm is {psm!r}, an argument of tesseract; leave it out for rapidocr")
        return reader(RapidOcr(limit_side_len, 1 if upscale is None else upscale, detect))
    if engine == "tesseract":
        if limit_side_len is not None or detect is not True:
            raise ValueError(
                f"limit_side_len is {limit_side_len!r} and detect {detect!r}, arguments of "
                "rapidocr; leave them out for tesseract, and give psm=7 for one line"
            )
        return reader(Tesseract(SPARSE_TEXT if psm is None else psm, upscale))
    raise ValueError(f"the OCR engine {engine!r} is unknown; take 'rapidocr' or 'tesseract'")
