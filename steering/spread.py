"""The population of one prompt spread over R processes, k/R of its k particles on each rank.

Particle i is row i // R of rank i % R, also after a funnel has dropped the last ones, and each rank
draws the noise of its particles by their own generators. Every score gathers the rewards, from
which every rank computes the same weights and ancestors, and then each particle's sample and
network output, from which every rank takes the parents of its own particles.

Errors in the gathered rewards are raised alike on every rank. If a single rank fails (out of
memory, a reward that raises), the others wait for it: accelerate launch and torchrun terminate
them; without a launcher they wait until its process ends or the group's timeout has passed.

b prompts, m of the k particles on this rank, rows prompt-major.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Spread"]


class Spread:
    """The ranks of a process group, or this process alone.

    group: None, a group of torch.distributed, or True for the default group. Raises ValueError if
    no group exists or this process is not in it. All ranks must make the same calls.
    """

    def __init__(self, group: Any = None):
        self.rank, self.size, self._group = 0, 1, None
        if group is None or group is False:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "spread= needs an initialised process group: start the program with accelerate "
                "launch (or torchrun) and make an accelerate.PartialState() first."
            )
        self._group = None if group is True else group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError(
                f"spread= is a process group without this process, rank {dist.get_rank()}: call "
                "steer() only on the processes of the group."
            )

    def whole(self, x: Tensor) -> Tensor:
        """Gather rows (b*m, *shape) to (b*m*R, *shape), in the order of the particles."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    def first(self, values: Tensor) -> Tensor:
        """Return rank 0's values on every rank, since devices may round differently."""
        if self.size > 1:
            values = values.contiguous()
            dist.broadcast(values, group=self._group, group_src=0)
        return values

    def own(self, values: Tensor) -> Tensor:
        """Select this rank's particles: (b, k) -> (b, m)."""
        return values[:, self.rank :: self.size]

    def check(self, what: str, counts: tuple[int, ...]) -> None:
        """Raise ValueError for numbers of particles that the number of ranks does not divide."""
        if any(count % self.size for count in counts):
            raise ValueError(
                f"{what} {counts[0] if len(counts) == 1 else counts} cannot be spread over "
                f"{self.size} processes; pass multiples of {self.size}."
            )
