"""Who descends from whom: what every scored step of a run saw and decided.

b prompts, k particles a prompt at that step (fewer later on, in a funnel).
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
    """One scored step: the particles before it, and the ancestors of those after it."""

    step: int
    rewards: Tensor  # (b, k) of x̂0
    log_weights: Tensor  # (b, k), with this score's potential
    ess: Tensor  # (b,), 1 to k, before resampling
    ancestors: Tensor  # (b, num) int64
    resampled: Tensor  # (b,) bool: the weights were folded into log_z and set to 0
    previews: Tensor | None = None  # (b, k, 3, h, w) uint8, small pictures of x̂0

    @property
    def replaced(self) -> Tensor:
        """(b,) bool: whether any particle was replaced, or dropped by a funnel."""
        if self.ancestors.shape != self.rewards.shape:
            return torch.ones(len(self.ancestors), dtype=torch.bool)
        stay = torch.arange(self.ancestors.shape[1])
        return (self.ancestors != stay).any(dim=1)


def why_nothing_moved(scores: Sequence[Score], settings: FeynmanKac) -> str:
    """What to say of a run whose scores replaced no particle, by what they saw; "" of others.

    Best-of-k, min_ess=0 or reward_scale=0, is meant not to.
    """
    meant = settings.min_ess == 0 or settings.reward_scale == 0
    if meant or not scores or any(score.replaced.any() for score in scores):
        return ""
    if all((score.rewards == score.rewards[:, :1]).all() for score in scores):
        return (
            "No score told the particles of a prompt apart: their rewards were equal each time, so "
            "the run is best-of-k at any reward_scale; take a graded reward, or score later steps."
        )
    least, k = min(score.ess.min().item() for score in scores), scores[0].rewards.shape[1]
    weighed = f"The effective sample size was never below {least:.3g} of {k}"
    if any(score.resampled.any() for score in scores):
        return f"{weighed}, and no particle was replaced: the run is best-of-k; raise reward_scale."
    asked = settings.min_ess * k
    if least < asked or settings.min_ess == 1:
        return (
            "No score resampled though weights were uneven, as those steps draw no noise: the run "
            "is best-of-k; score others by score_from and score_to, or raise noise."
        )
    # it is never below 1
    what = "min_ess" if asked <= 1 else "reward_scale or min_ess"
    return f"{weighed}, and scores resample below {asked:.3g}: the run is best-of-k; raise {what}."


@dataclass(frozen=True)
class Moment:
    """One step of a call for some of the prompts, as it has just been decided."""

    step: int
    num_steps: int
    score: Score | None = None  # where the step was scored
    prompts: tuple[int, ...] = ()  # indices of the run's


@dataclass(frozen=True)
class Lineage:
    """The scored steps of a run of `num_steps` steps, in order; the final image is not in it."""

    num_steps: int
    scores: tuple[Score, ...]

    def origins(self, k: int) -> Tensor:
        """Which of the k particles of the start each final one descends from, (b, k_final) or (k,).

        (k,) where nothing was scored.
        """
        origin = torch.arange(k)
        for score in self.scores:
            origin = origin.expand(len(score.ess), -1).gather(1, score.ancestors)
        return origin

    def prompt(self, index: int) -> "Lineage":
        """The lineage of one prompt, b = 1."""
        return self.prompts([index])

    def prompts(self, indices: Sequence[int]) -> "Lineage":
        """The lineage of some of the prompts."""
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
        """One lineage over the prompts of several runs with the same scored steps."""
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
