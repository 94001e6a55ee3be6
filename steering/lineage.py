"""The ancestry of the particles: the rewards, weights and ancestors of every scored step.

b prompts, k particles per prompt at that step (a funnel reduces k).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.settings import FeynmanKac

__all__ = ["Lineage", "Moment", "Score", "why_nothing_moved"]


@dataclass(frozen=True)
class Score:
    """One scored step: the particles before resampling, and the ancestors of those after it."""

    step: int
    rewards: Tensor  # (b, k) of x̂0, by on_the_way= if it was given
    log_weights: Tensor  # (b, k), with this score's potential
    ess: Tensor  # (b,), 1 to k, before resampling
    ancestors: Tensor  # (b, num) int64
    resampled: Tensor  # (b,) bool: the weights were folded into log_z and set to 0
    # (b, k, 3, h, w) uint8, small images of x̂0, of videos the middle scored frame; None for sounds
    previews: Tensor | None = None

    @property
    def replaced(self) -> Tensor:
        """Whether any particle of each prompt was replaced, or dropped by a funnel: (b,) bool."""
        if self.ancestors.shape != self.rewards.shape:
            return torch.ones(len(self.ancestors), dtype=torch.bool)
        stay = torch.arange(self.ancestors.shape[1])
        return (self.ancestors != stay).any(dim=1)


def why_nothing_moved(scores: Sequence[Score], settings: FeynmanKac) -> str:
    """Return a message that explains why no score of a run replaced a particle; "" for other runs.

    It is also "" with min_ess=0 or reward_scale=0, which never resample.
    """
    meant = settings.min_ess == 0 or settings.reward_scale == 0
    if meant or not scores or any(score.replaced.any() for score in scores):
        return ""
    if all((score.rewards == score.rewards[:, :1]).all() for score in scores):
        return (
            "At every score, all particles of a prompt had equal rewards, so the run is best-of-k "
            "at any reward_scale; use a graded reward, or score later steps."
        )
    least, k = min(score.ess.min().item() for score in scores), scores[0].rewards.shape[1]
    weighed = f"The effective sample size was never below {least:.3g} of {k}"
    if any(score.resampled.any() for score in scores):
        return f"{weighed}, and no particle was replaced: the run is best-of-k; raise reward_scale."
    asked = settings.min_ess * k
    if least < asked or settings.min_ess == 1:
        return (
            "No score resampled although weights were uneven, because the scored steps draw no "
            "noise: the run is best-of-k; move score_from and score_to, or raise noise."
        )
    # the effective sample size is never below 1
    what = "min_ess" if asked <= 1 else "reward_scale or min_ess"
    return f"{weighed}, and scores resample below {asked:.3g}: the run is best-of-k; raise {what}."


@dataclass(frozen=True)
class Moment:
    """One step of a call for some of the prompts, right after its resampling decision."""

    step: int
    num_steps: int
    score: Score | None = None  # None if the step was not scored
    prompts: tuple[int, ...] = ()  # indices into the run's prompts


@dataclass(frozen=True)
class Lineage:
    """The scored steps of a run of `num_steps` steps, in order, without the final score."""

    num_steps: int
    scores: tuple[Score, ...]

    def origins(self, k: int) -> Tensor:
        """Return the index of each final particle's initial ancestor, (b, k_final) int64.

        If nothing was scored, the result is (k,).
        """
        origin = torch.arange(k)
        for score in self.scores:
            origin = origin.expand(len(score.ess), -1).gather(1, score.ancestors)
        return origin

    def prompt(self, index: int) -> "Lineage":
        """Return the lineage of one prompt, b = 1."""
        return self.prompts([index])

    def prompts(self, indices: Sequence[int]) -> "Lineage":
        """Return the lineage of some of the prompts."""
        rows = torch.tensor(indices, dtype=torch.int64)
        scores = (Score(s.step, *(_of(part, rows) for part in _parts(s))) for s in self.scores)
        return Lineage(self.num_steps, tuple(scores))

    def to_json(self) -> dict[str, Any]:
        return {
            "num_steps": self.num_steps,
            "scores": [
                {
                    "step": score.step,
                    "rewards": score.rewards.tolist(),
                    "log_weights": score.log_weights.tolist(),
                    "ess": score.ess.tolist(),
                    "ancestors": score.ancestors.tolist(),
                    "resampled": score.resampled.tolist(),
                }
                for score in self.scores
            ],
        }

    @staticmethod
    def join(lineages: Sequence["Lineage"]) -> "Lineage":
        """Concatenate the prompts of several runs with the same scored steps."""
        joined = []
        for scores in zip(*(lineage.scores for lineage in lineages), strict=True):
            columns = zip(*map(_parts, scores), strict=True)
            joined.append(Score(scores[0].step, *map(_joined, columns)))
        return Lineage(lineages[0].num_steps, tuple(joined))


def _parts(score: Score) -> tuple[Any, ...]:
    own = score.rewards, score.log_weights, score.ess, score.ancestors
    return *own, score.resampled, score.previews


def _of(part: Tensor | None, rows: Tensor) -> Any:
    return None if part is None else part[rows]


def _joined(parts: Sequence[Tensor | None]) -> Any:
    return torch.cat([part for part in parts if part is not None]) if None not in parts else None
