"""Adversarial training: a critic or a fixed reward compares samples with reference images.

Adv-GRPO (Mao et al. 2025), with the same rollouts for both sides: in each epoch the critic scores
the samples, the generator is updated, and then the critic is trained on the samples and references.
Rule-based rewards cannot be trained; a reward for similarity to references can be added to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .critics import Critic
from .grpo import Score
from .learner import draws
from .references import References

__all__ = ["Adversary", "likened"]


class Adversary:
    """The reward of an adversarial run: weight · critic, plus a fixed reward if one is given.

    fixed: a reward as in grpo.Score, or None; seed: seeds references, patches and replay.
    """

    def __init__(
        self,
        critic: Critic,
        references: References,
        weight: float,
        fixed: Score | None,
        seed: int,
        rank: int = 0,
    ) -> None:
        self.critic, self.references, self.fixed = critic, references, fixed
        self.weight, self.seed, self.rank = weight, seed, rank

    def __call__(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and its components, (n,) each."""
        scores = self.critic.reward(images, prompts)
        if self.fixed is None:
            return self.weight * scores, {"critic": scores}
        total, components = self.fixed(images, prompts)
        return total + self.weight * scores, components | {"critic": scores}

    def observe(self, images: Tensor, prompts: Sequence[str], epoch: int) -> dict[str, float]:
        """Show an epoch's samples to the critic, which is trained if its trigger says so."""
        generator = draws(self.seed, epoch, f"critic {self.rank}")
        real = self.references.draw(prompts, generator).to(images.device)
        seen = self.critic.train_step(real, images, prompts, generator)
        return {f"critic_{name}": value for name, value in seen.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.critic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state)


def likened(reward: Any, references: References, seed: int, most: int = 4) -> Score:
    """Return a sum of rewards as a Score that passes references of each sample's prompt to them.

    At most `most` references of each prompt (or of the style, if unpaired) are drawn, from the seed
    alone, so they are the same in every epoch and process. `references.check` must have passed.
    """

    def shown(key: str) -> Tensor:
        count = min(most, len(references.pictures[key]))
        return references.draw([key] * count, draws(seed, 0, "likeness"))

    def score(images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        keys = [prompt if references.paired else "" for prompt in prompts]
        found = {key: shown(key) for key in dict.fromkeys(keys)}
        return reward.evaluate(images, prompts, references=[found[key] for key in keys])

    return score
