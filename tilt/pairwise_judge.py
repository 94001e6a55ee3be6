"""A vision-language model that compares two images of one prompt, seen side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.backends.chat_endpoint import EndpointError

__all__ = ["QUESTION", "SideBySideJudge", "side_by_side"]

GAP, GREY = 16, (128, 128, 128)
QUESTION = (
    "The picture shows two images, left and right, with a grey bar between them. Both were made "
    "from the description between the lines.\n"
    "---\n{prompt}\n---\n"
    "Compare how well each image fulfils the description: objects, how many there are, colours, "
    'places, written words. Explain briefly, then end with one line "Scores: L, R", where L '
    "from 0 to 10 rates the left image and R from 0 to 10 the right one."
)
NUMBER = r"(-?\d+(?:\.\d+)?)"
SCORES = re.compile(rf"(?i)scores[\s*:\[(]*{NUMBER}[\s*,;/\])]+{NUMBER}")


class SideBySideJudge:
    """Scores pairs of images for `rewards.tournament`.

    Args:
        model: Answers a question about an image, as the `model` of a `judge` reward does.
        images: The contestants.
        prompt: The prompt of all images.
    """

    def __init__(self, model: Any, images: Sequence[Image.Image], prompt: str) -> None:
        self.model, self.images = model, images
        self.question = QUESTION.replace("{prompt}", prompt)

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Return the scores (m, 2) of the first and the second image of m pairs of indices."""
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            return torch.tensor(list(pool.map(self._ask, pairs)))

    def _ask(self, pair: tuple[int, int]) -> tuple[float, float]:
        picture = np.array(side_by_side(*(self.images[i] for i in pair)))
        try:
            answer = self.model.answer([picture], self.question)
        except EndpointError as error:
            raise ValueError(f"the tournament cannot continue: {error}") from error
        found = SCORES.findall(answer)
        if not found:
            raise ValueError(f"the judge's answer {answer[-80:]!r} holds no line 'Scores: L, R'")
        left, right = found[-1]
        return float(left), float(right)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Paste both images in their own size on a grey background, with a bar between them."""
    size = (left.width + GAP + right.width, max(left.height, right.height))
    both = Image.new("RGB", size, GREY)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP, 0))
    return both
