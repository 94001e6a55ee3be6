"""Advantage weighted matching (Xue et al. 2025): PPO with the matching error as log-density.

`nft.NftTrainer` trains it: images are sampled deterministically, and the error of the network on
their noised latents, with its sign reversed, takes the place of log π in the clipped loss of GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .nft import Regression, Rows
from .noising import Noising
from .policy_losses import clipped, matching_score, policy_loss
from .ranges import FLAG, number, setting

__all__ = ["Awm"]


@dataclass
class Awm(Regression):
    """The settings of a run of AWM.

    The defaults of on_policy, old_decay, power, time_power, clip and old_kl are those of its code.
    Advantages are divided by advantage_clip, so that they are at most 1, as there. Its code takes
    the times from the sampler's steps, and a kl of 0.0001 to 0.003.
    """

    on_policy: bool = setting(
        True, FLAG, "sample from the present weights instead of from the old policy"
    )
    old_decay: float = setting(
        0.3, number(0, 1, "[)"), "highest decay of the averaged weights (the old policy)"
    )
    power: float = setting(
        0.25, number(0, 1, "(]"), "power of the matching error; 1: the squared error itself"
    )
    time_power: float = setting(1.0, number(0), "power of t that weighs the matching error")
    clip: float = setting(1.0, number(0, ends="(]"), "PPO clip range of the ratio")
    old_kl: float = setting(1.0, number(0), "weight of the divergence from the old policy")

    @property
    def idle(self) -> bool:
        return not (self.kl or self.old_kl)

    def loss(self, noising: Noising, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        score = partial(
            matching_score,
            target=rows.target,
            t=rows.t,
            power=self.power,
            time_power=self.time_power,
        )
        now, before = score(rows.pred), score(rows.old)
        loss = policy_loss(now, before, rows.advantages / self.advantage_clip, clip=self.clip)
        ratio = (now.detach() - before).exp()
        return loss, {"ratio": ratio, "clipped": clipped(now, before, clip=self.clip)}
