"""Calls of a reward by steer(), with checked shapes and optional references."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["PromptScorer", "RewardFunction"]


class RewardFunction(Protocol):
    """Maps images (n, 3, h, w) in [0, 1] and n prompts to n scores; may take `references=` as well.

    Optional attributes: `spec` or `name` is its name in the manifest; `check(prompts)` raises
    ValueError for prompts that it cannot score; `evaluate(images, prompts, ...)` returns the total
    and its parts, {name: (n,)}.
    """

    def __call__(self, images: Tensor, prompts: list[str], /) -> Tensor: ...


class PromptScorer:
    """Scores k images per prompt of a run; raises ValueError if `reward` cannot score them."""

    def __init__(self, reward: Any, prompts: Sequence[str], references: Sequence[Any] | None):
        if not callable(reward):
            raise ValueError(
                f"reward is a {type(reward).__name__}; pass a function of (images, prompts), such "
                'as the one that rewards.load("clip") returns.'
            )
        _check_signature(reward)
        if references is not None and not _wants_references(reward):
            raise ValueError(
                "references= was given, but this reward takes no references; leave it out, or use "
                "a reward that has a references= keyword."
            )
        if references is not None and len(references) != len(prompts):
            raise ValueError(
                f"references= has {len(references)} entries for {len(prompts)} prompts; "
                "pass one per prompt."
            )
        weights = [getattr(part, "weight", 1.0) for part in getattr(reward, "parts", None) or ()]
        if weights and not any(weights):
            raise ValueError(
                f"every weight of the reward {getattr(reward, 'spec', reward)} is 0, so all images "
                "would score the same: give one part a weight other than 0"
            )
        check = getattr(reward, "check", None)
        if check is not None:
            check(list(prompts))
        named = (getattr(reward, attribute, None) for attribute in ("spec", "name", "__name__"))
        self.name = next((str(name) for name in named if name), type(reward).__name__)
        self._reward, self._prompts, self.references = reward, prompts, references

    @torch.no_grad()
    def score(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the scores (b, k) of images (b*k, 3, h, w), prompt-major, of `indices`' prompts.

        The dtype is float64 if the reward's is and the device supports it, else float32.
        """
        scores = self._call(self._reward, images, indices)
        return self._shaped(scores, images, len(indices))

    @torch.no_grad()
    def evaluate(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `score`, and also return the parts of the reward, if it has any."""
        evaluate = getattr(self._reward, "evaluate", None)
        if evaluate is None:
            return self.score(images, indices), {}
        total, parts = self._call(evaluate, images, indices)
        b = len(indices)
        shaped = {name: self._shaped(part, images, b).cpu() for name, part in parts.items()}
        return self._shaped(total, images, b), shaped

    def _call(self, function: Any, images: Tensor, indices: Sequence[int]) -> Any:
        k = len(images) // len(indices)
        rows = [i for i in indices for _ in range(k)]
        prompts = [self._prompts[i] for i in rows]
        if self.references is None:
            return function(images, prompts)
        return function(images, prompts, references=[self.references[i] for i in rows])

    def _shaped(self, scores: Any, images: Tensor, b: int) -> Tensor:
        try:
            scores = torch.as_tensor(scores)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"reward {self.name} returned {scores!r:.80}; return {len(images)} numbers, one "
                "per image."
            ) from None
        best = torch.float32 if images.device.type == "mps" else torch.float64  # MPS lacks float64
        wanted = best if scores.dtype == torch.float64 else torch.float32
        scores = scores.to(images.device, wanted)
        if scores.shape != (len(images),):
            raise ValueError(
                f"reward {self.name} returned shape {tuple(scores.shape)} for {len(images)} "
                f"images; return one number per image, ({len(images)},)."
            )
        return scores.reshape(b, -1)


def _wants_references(reward: Any) -> bool:
    """Return the reward's `wants_references`, else whether it has a `references` parameter."""
    says = getattr(reward, "wants_references", None)
    return "references" in inspect.signature(reward).parameters if says is None else bool(says)


def _check_signature(reward: Any) -> None:
    try:
        inspect.signature(reward).bind(None, None)
    except ValueError:  # some functions written in C have no signature
        return
    except TypeError as error:
        name = getattr(reward, "__name__", type(reward).__name__)
        raise ValueError(
            f"the reward {name} cannot be called as f(images, prompts) ({error})."
        ) from None
