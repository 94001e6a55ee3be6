"""Calls of a reward by steer(), with checked shapes and optional references."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from steering.frames import Frames

__all__ = ["PromptScorer", "RewardFunction", "scorers_of"]


class RewardFunction(Protocol):
    """Maps images (n, 3, h, w) in [0, 1] and n prompts to n scores; may take `references=` as well.

    It gets the frames of videos as images, and of sounds the waveforms (n, channels, samples).

    Optional attributes: `spec` or `name` is its name in the manifest; `needs_references` is whether
    it cannot score without them; `check(prompts)` raises ValueError for prompts that it cannot
    score; `evaluate(images, prompts, ...)` returns the total
    and its parts, {name: (n,)}.
    """

    def __call__(self, images: Tensor, prompts: list[str], /) -> Tensor: ...


class PromptScorer:
    """Scores k outputs per prompt of a run; raises ValueError if `reward` cannot score them.

    They are images (b*k, 3, h, w), videos (b*k, f, 3, h, w) or waveforms (b*k, channels, samples),
    prompt-major, quantised or float; frames: how the frames' scores make that of a video.
    """

    def __init__(
        self,
        reward: Any,
        prompts: Sequence[str],
        references: Sequence[Any] | None,
        frames: Frames = Frames(),  # noqa: B008 (frozen)
        argument: str = "reward",
    ):
        if not callable(reward):
            raise ValueError(
                f"{argument} is a {type(reward).__name__}; pass a function of (images, prompts), "
                'such as the one that rewards.load("clip") returns.'
            )
        _check_signature(reward)
        if references is not None and not _wants_references(reward):
            raise ValueError(
                "references= was given, but this reward takes no references; leave it out, or use "
                "a reward that has a references= keyword."
            )
        if references is None and getattr(reward, "needs_references", False):
            raise ValueError(
                "this reward compares with images that references= gives: pass a list, one entry "
                'per prompt, or "image", if the call edits the image of its keyword image=.'
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
        self._frames = frames

    @torch.no_grad()
    def score(self, outputs: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the scores (b, k) of the outputs of `indices`' prompts.

        The dtype is float64 if the reward's is and the device supports it, else float32.
        """
        return self._scored(self._reward, outputs, indices)[0]

    @torch.no_grad()
    def evaluate(self, outputs: Tensor, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `score`, and also return the parts of the reward, if it has any."""
        evaluate = getattr(self._reward, "evaluate", None)
        return self._scored(evaluate or self._reward, outputs, indices)

    def _scored(
        self, function: Any, outputs: Tensor, indices: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the totals (b, k) and the parts that `function` returns."""
        b = len(indices)
        rows = [i for i in indices for _ in range(len(outputs) // b)]
        total, parts = self._frames.applied(partial(self._call, function), outputs, rows)
        return total.reshape(b, -1), {name: part.reshape(b, -1) for name, part in parts.items()}

    def _call(
        self, function: Any, outputs: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total (n,) and the parts of n images or waveforms of the prompts `rows`."""
        given: dict[str, Any] = {}
        if self.references is not None:
            given["references"] = [self.references[i] for i in rows]
        found = function(outputs, [self._prompts[i] for i in rows], **given)
        if function is self._reward:
            return self._shaped(found, outputs), {}
        total, parts = found
        parts = {name: self._shaped(part, outputs).cpu() for name, part in parts.items()}
        return self._shaped(total, outputs), parts

    def _shaped(self, scores: Any, images: Tensor) -> Tensor:
        what = "image" if images.ndim == 4 else "waveform"
        try:
            scores = torch.as_tensor(scores)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"reward {self.name} returned {scores!r:.80}; return {len(images)} numbers, one "
                f"per {what}."
            ) from None
        best = torch.float32 if images.device.type == "mps" else torch.float64  # MPS lacks float64
        wanted = best if scores.dtype == torch.float64 else torch.float32
        scores = scores.to(images.device, wanted)
        if scores.shape != (len(images),):
            raise ValueError(
                f"reward {self.name} returned shape {tuple(scores.shape)} for {len(images)} "
                f"{what}s; return one number per {what}, ({len(images)},)."
            )
        return scores


def scorers_of(
    reward: Any,
    on_the_way: Any,
    prompts: Sequence[str],
    references: Sequence[Any] | None,
    frames: Frames,
) -> tuple[PromptScorer, PromptScorer | None]:
    """Return what scores the final outputs, and what scores those before in its place, or None.

    Of two rewards, those that take references get them. Raises ValueError if none takes any.
    """
    if on_the_way is None:
        return PromptScorer(reward, prompts, references, frames), None
    takes = [callable(one) and _wants_references(one) for one in (reward, on_the_way)]
    first, second = (references if wants or not any(takes) else None for wants in takes)
    scout = PromptScorer(on_the_way, prompts, second, frames, "on_the_way")
    return PromptScorer(reward, prompts, first, frames), scout


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
