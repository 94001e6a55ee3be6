"""One prompt's population over several processes: k particles, k/R on each of R ranks.

Particle i is row i // R of rank i % R, and stays there when a funnel drops the last ones: a rank
draws the noise of its own particles by their own generators, whatever the population. What a score
exchanges: the rewards, from which every rank computes the same weights and ancestors, and then each
particle's sample and network output, of which it takes its own particles' parents.

Whatever a rank finds wrong in the gathered rewards every rank finds, and all raise alike. A failure
of one rank alone (no memory left, a reward that raises) leaves the others waiting for it: under
accelerate launch or torchrun they are ended with it; without a launcher they wait until it is gone
or the group's timeout has passed.

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

    group: None, or a group of torch.distributed; True is the default one. Raises ValueError where
    there is none, and on a process that is not in the group. All ranks have to make the same calls.
    """

    def __init__(self, group: Any = None):
        self.rank, self.size, self._group = 0, 1, None
        if group is None or group is False:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "spread= needs processes that know of each other: start the program with "
                "accelerate launch (or torchrun) and make an accelerate.PartialState() first."
            )
        self._group = None if group is True else group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError(
                f"spread= is a process group without this process, rank {dist.get_rank()}: call "
                "steer() on the processes of the group alone."
            )

    def whole(self, x: Tensor) -> Tensor:
        """Rows (b*m, *shape) of each rank -> (b*m*R, *shape), in the order of the particles."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    def first(self, values: Tensor) -> Tensor:
        """What rank 0 has, of numbers that every rank computed: devices may round differently."""
        if self.size > 1:
            values = values.contiguous()
            dist.broadcast(values, group=self._group, group_src=0)
        return values

    def own(self, values: Tensor) -> Tensor:
        """(b, k) of all particles -> (b, m) of this rank's."""
        return values[:, self.rank :: self.size]

    def check(self, what: str, counts: tuple[int, ...]) -> None:
        """Raise ValueError for numbers of particles that do not divide by the ranks."""
        if any(count % self.size for count in counts):
            raise ValueError(
                f"{what} {counts[0] if len(counts) == 1 else counts} cannot be spread over "
                f"{self.size} processes; pass multiples of {self.size}."
            )
