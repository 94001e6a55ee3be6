"""A vision-language model of transformers that answers a question about images.

The preprocessing is that of the checkpoint, from its preprocessor_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..towers.checkpoints import hub, local, moved
from ..towers.model_cache import loaded_once

__all__ = ["LocalVlm"]


@dataclass(eq=False)
class Loaded:
    """A model with its processor, which all judges of the same weights share."""

    model: Any
    processor: Any


class LocalVlm:
    """An image-text-to-text model of transformers with its processor and chat template.

    It takes one question at a time, so that an answer depends only on its images and question; if
    this is too slow, serve the model and use its url. Weights have the checkpoint's dtype.
    """

    concurrency = 1

    def __init__(
        self, source: str, max_tokens: int = 512, device: torch.device | str | None = None
    ) -> None:
        self._loaded = loaded_once("vlm", source, device, lambda: _open(source))
        self.model, self.processor = self._loaded.model, self._loaded.processor
        self.max_tokens = max_tokens
        picture_token = getattr(self.processor, "image_token", "<image>")
        self.reserved = tuple(sorted({*self.processor.tokenizer.all_special_tokens, picture_token}))

    def to(self, device: torch.device) -> None:
        """Move the model."""
        if self.model.device != device:
            moved(self.model, device)

    def answer(self, pictures: Sequence[np.ndarray], question: str) -> str:
        """Return the text of the model's answer, by greedy decoding."""
        inputs = self._inputs(pictures, question)
        with torch.no_grad():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.max_tokens,
                num_beams=1,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(new, skip_special_tokens=True))

    def first(
        self, pictures: Sequence[np.ndarray], question: str, words: Sequence[Sequence[str]]
    ) -> tuple[list[float], float]:
        """Return the probability that the answer starts with each word, and 0.0.

        A word is given by its spellings, of which those that are one token count.
        """
        ids = [self.tokens(spellings) for spellings in words]
        with torch.no_grad():
            logits = self.model(**self._inputs(pictures, question)).logits[0, -1]
        chances = logits.float().softmax(-1)
        return [float(chances[one].sum()) for one in ids], 0.0

    def tokens(self, spellings: Sequence[str]) -> list[int]:
        """Return the tokens of the spellings that are one; raises ValueError if none is."""
        encode = self.processor.tokenizer.encode
        coded = [encode(text, add_special_tokens=False) for text in spellings]
        found = sorted({ids[0] for ids in coded if len(ids) == 1})
        if not found:
            raise ValueError(
                f"the judge's tokenizer divides the word {spellings[0]!r} into several tokens, so "
                "the probability of this answer cannot be read from the first one; choose another "
                "model"
            )
        return found

    def _inputs(self, pictures: Sequence[np.ndarray], question: str) -> Any:
        content: list[dict[str, Any]] = [
            {"type": "image", "image": Image.fromarray(picture)} for picture in pictures
        ]
        content.append({"type": "text", "text": question})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)


def _open(source: str) -> Loaded:
    folder = local(source)
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError(
            f"the judge's source {source!r} is neither a folder that exists nor a hub id "
            "ORGANISATION/NAME; give one of these"
        )
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with _explained(source) if folder.is_dir() else hub(source):
        where = str(folder) if folder.is_dir() else source
        model: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype="auto", trust_remote_code=False
        )
        processor: Any = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{source} has no chat template, so a judge cannot ask it; add one")
    return Loaded(model.requires_grad_(False).eval(), processor)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{source} is not an image-text-to-text model with its processor: "
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from error
