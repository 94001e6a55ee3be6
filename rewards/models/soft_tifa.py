"""Soft-TIFA: how likely a vision-language model answers a prompt's questions as the prompt says.

Legend: n images, m questions of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..backends.asking import AnswersQuestions, Asker, Pictures
from ..backends.local_vlm import LocalVlm
from ..geneval.questions import Questions, read_questions, spellings
from ..images import check_inputs, to_uint8
from ..spec import written
from .base import Card

__all__ = ["SoftTifaReward", "arithmetic", "geometric"]

ENDING = " Answer in one word."  # of every question, in GenEval 2's evaluation.py


def geometric(chances: Sequence[float]) -> float:
    """Return the m-th root of the product of m >= 1 probabilities."""
    if not all(chances):
        return 0.0
    return math.exp(math.fsum(math.log(p) for p in chances) / len(chances))


def arithmetic(chances: Sequence[float]) -> float:
    """Return the sum of m >= 1 probabilities divided by m."""
    return math.fsum(chances) / len(chances)


MODES: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric": geometric,
    "arithmetic": arithmetic,
}


class SoftTifaReward:
    """Mean over the prompt's questions of P(the expected answer), in [0, 1].

    Kamath et al. 2025, GenEval 2 (arXiv 2512.16853): geometric is Soft-TIFA GM, an estimate for the
    whole prompt, and arithmetic Soft-TIFA AM, for its parts. The probability is that of the first
    token, over the spellings of the answer (`rewards.geneval.questions.spellings`). The questions
    come from a file, and a prompt that it lacks cannot be scored. The paper's model is
    Qwen3-VL-8B-Instruct.

    Only spellings that are one token count. The authors count the first token of each spelling, so
    in Qwen's vocabulary, where digits are tokens, also that of a single space, for " 4". An
    endpoint reports the 20 likeliest tokens: if the answer is not among them, its probability is
    taken to be the largest possible one, that of the last of them or all that they leave.

    An image costs m calls of the model, one after another; a request that fails is never 0.

    Args:
        questions: A .jsonl file in the format of GenEval 2's geneval2_data.jsonl.
        source: Folder or hub id of an image-text-to-text model of transformers, or None.
        mode: geometric or arithmetic.
        url, model, key_env, invalid, timeout, retries, concurrency: See
            `rewards.backends.asking.Asker`.
        device: Device of a local model; None follows the images.
    """

    differentiable = False
    wants_references = False
    range: tuple[float | None, float | None] = (0.0, 1.0)
    card = Card(
        weights="",
        size="the model's own",
        licence="the model's own; GenEval 2's questions are CC BY-NC 4.0",
        range="[0, 1]",
        citation="Kamath et al. 2025, GenEval 2, arXiv 2512.16853",
    )

    def __init__(
        self,
        questions: str,
        source: str | None = None,
        mode: str = "geometric",
        *,
        url: str | None = None,
        model: str | None = None,
        key_env: str | None = None,
        invalid: str = "error",
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the soft_tifa mode", mode, MODES)
        self.name = "soft_tifa"
        asking: dict[str, Any] = {
            **{"source": source, "url": url, "model": model, "key_env": key_env},
            **{"invalid": invalid, "timeout": timeout, "retries": retries},
            "concurrency": concurrency,
        }
        self.spec = written("soft_tifa", SoftTifaReward, questions=questions, mode=mode, **asking)
        self.mode = mode
        self.questions = read_questions(questions)
        self.asker = Asker(**asking, max_tokens=1, device=device)
        every = {pair for pairs in self.questions.values() for pair in pairs}
        self.asker.check([question for question, _ in every], "question")
        if isinstance(self.asker.model, LocalVlm):
            for answer in {answer for _, answer in every}:
                self.asker.model.tokens(spellings(answer))  # raises for a word that is no token

    def questions_of(self, prompt: str) -> Questions:
        """Return the questions of a prompt; raises ValueError if the file has none."""
        found = self.questions.get(prompt.strip())
        if found is None:
            raise ValueError(
                f"the soft_tifa reward has no questions for the prompt {prompt!r}; add them to its "
                'file, as {"prompt": ..., "vqa_list": [["Is there a cat?", "Yes"], ...]}'
            )
        return found

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts without questions."""
        for prompt in prompts:
            self.questions_of(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        self.check(prompts)
        shown: list[Pictures] = [(picture,) for picture in to_uint8(images)]
        return self.asker.scores(shown, prompts, self._ask, images.device)

    def _ask(self, model: AnswersQuestions, pictures: Pictures, prompt: str) -> float:
        chances = []
        for question, answer in self.questions_of(prompt):
            (chance,), most = model.first(pictures, question + ENDING, [spellings(answer)])
            chances.append(min(chance or most, 1.0))
        return MODES[self.mode](chances)
