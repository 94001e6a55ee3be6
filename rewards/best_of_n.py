"""Best-of-n accuracy of a reward on preference files: prompts with chosen and rejected images.

RewardBench 2's format and scores (Malik et al. 2025, arXiv 2506.01937). Legend: n scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import to_images

__all__ = [
    "Choice",
    "best_of_n",
    "choice_results",
    "read_choices",
    "score_choices",
    "ties_score",
]


def best_of_n(scores: Tensor) -> float:
    """Return 1 if the first of n scores (n,) is the highest, 1/k if it ties with k - 1, else 0.

    RewardBench 2's `reroll_and_score_dataset` (allenai/reward-bench).
    """
    if not (scores.ndim == 1 and len(scores) > 1 and scores.isfinite().all()):
        raise ValueError(f"a choice needs two or more finite scores but got {scores.tolist()}")
    return float(scores[0] == scores.max()) / int((scores == scores.max()).sum())


def ties_score(ref: Mapping[Any, Any], tied: Mapping[Any, Any]) -> float:
    """Return RewardBench 2's score of its subset Ties, exactly as published, at most 1.01.

    0.3 mean[tied is right] + 0.3 mean[ref is right] + 0.2 mean[g > w] + 0.2 mean[min(g, g') > w]
    + 0.01 mean[tanh(min(g, g')/w - 1)], where 0/0 counts 0 in the last term. A prompt is right if
    every correct answer scores above every wrong one; g is that gap for `tied`, g' for `ref`, and
    w the range of the correct answers of `tied` (Malik et al. 2025, arXiv 2506.01937;
    `process_single_model` of allenai/reward-bench, commit a009692).

    ref and tied are {id: (scores of the correct answers, scores of the wrong ones)}, with one
    correct answer in ref and several in tied. The last three means are over the ids in both.
    """
    shared = [key for key in ref if key in tied]
    if not shared:
        raise ValueError("a ties score needs prompts with a ref and a tied version; found none")
    gaps = {key: _gap(*pair) for key, pair in ref.items()}
    tied_gaps = {key: _gap(*pair) for key, pair in tied.items()}
    right = [torch.stack(list(g.values())).gt(0).double().mean() for g in (tied_gaps, gaps)]
    gap = torch.stack([tied_gaps[key] for key in shared])
    hard = torch.minimum(gap, torch.stack([gaps[key] for key in shared]))
    correct = [torch.as_tensor(tied[key][0]).double() for key in shared]
    spread = torch.stack([c.max() - c.min() for c in correct])
    margin = (hard / spread - 1).tanh().nan_to_num(nan=0.0)
    preferred, preferred_hard = ((x > spread).double().mean() for x in (gap, hard))
    score = 0.3 * (right[0] + right[1]) + 0.2 * (preferred + preferred_hard)
    return float(score + 0.01 * margin.mean())


@dataclass(frozen=True)
class Choice:
    """A prompt with the paths of its chosen and its rejected images."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str = ""
    id: str = ""


def read_choices(path: str | Path) -> list[Choice]:
    """Read a .jsonl file with lines {"prompt": ..., "chosen": ..., "rejected": [...]}.

    The keys are RewardBench 2's: chosen is one path or a list; `subset` and `id` (`ref:7` and
    `tied:7` in the subset Ties) are optional; others are ignored. ValueError names an invalid line.
    """
    choices = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable file of choices: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            choice = _choice(json.loads(line))
        except (ValueError, KeyError, TypeError):
            choice = None
        if choice is None:
            raise ValueError(
                f'{path}, line {number}: {{"prompt": text, "chosen": path or paths, "rejected": '
                f"[paths]}} expected but found {line.strip()[:80]!r}"
            )
        choices.append(choice)
    return choices


def _choice(entry: Any) -> Choice | None:
    """Return the choice of a line, or None if a value has another type."""
    prompt, chosen, rejected = entry["prompt"], entry["chosen"], entry["rejected"]
    chosen = [chosen] if isinstance(chosen, str) else chosen
    lists = all(isinstance(paths, list) and paths for paths in (chosen, rejected))
    if not lists or not all(isinstance(text, str) for text in (prompt, *chosen, *rejected)):
        return None
    extra = [str(entry.get(key, "")) for key in ("subset", "id")]
    return Choice(prompt, tuple(chosen), tuple(rejected), *extra)


def score_choices(
    reward: Any,
    choices: Sequence[Choice],
    folder: str | Path = "",
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Return the scores of each choice's images, chosen first; paths are relative to `folder`."""
    scores = []
    for choice in choices:
        found = []
        for name in choice.chosen + choice.rejected:
            found.append(reward(_picture(Path(folder, name), device), [choice.prompt]))
        scores.append(torch.cat(found))
    return scores


def _picture(path: Path, device: torch.device | str | None) -> Tensor:
    try:
        with Image.open(path) as picture:
            return to_images(picture, device)
    except OSError as error:
        raise ValueError(f"the image {path} of a choice cannot be read: {error}") from error


def choice_results(choices: Sequence[Choice], scores: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean of `best_of_n` for each subset, and `ties_score` for the subset Ties."""
    ties: dict[str, dict[str, Any]] = {"ref": {}, "tied": {}}
    credits: dict[str, list[float]] = {}
    for choice, values in zip(choices, scores, strict=True):
        right = len(choice.chosen)
        if choice.subset.lower() == "ties":
            kind, _, key = choice.id.partition(":")
            if kind not in ties:
                raise ValueError(f"the id of a tie is ref:NUMBER or tied:NUMBER, not {choice.id!r}")
            ties[kind][key] = (values[:right], values[right:])
        elif right == 1:
            credits.setdefault(choice.subset, []).append(best_of_n(values))
        else:
            raise ValueError(
                f"the prompt {choice.prompt!r} has {right} chosen images; give one, or put it "
                "into the subset Ties"
            )
    results = {subset: sum(found) / len(found) for subset, found in credits.items()}
    return results | ({"ties": ties_score(**ties)} if ties["ref"] or ties["tied"] else {})


def _gap(correct: Any, wrong: Any) -> Tensor:
    right, other = (torch.as_tensor(x).double() for x in (correct, wrong))
    if not (right.numel() and other.numel() and right.isfinite().all() and other.isfinite().all()):
        raise ValueError("a ties score needs finite scores, of a correct and a wrong answer each")
    return right.min() - other.max()
