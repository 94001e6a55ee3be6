"""What a run finds out about its pipeline while it runs, once."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from steering.call import WAYS
from steering.noise import global_states
from steering.probe import Batch

__all__ = ["Learned"]


@dataclass
class Learned:
    """How a call is asked for its rows, and what is known of its networks and its tail."""

    way: int = 0  # of call.WAYS, to ask for its rows
    deals: bool = False  # whether arguments of one row a guidance copy have to be dealt to all rows
    began: bool = False  # whether the present call has come to its first step
    rng: list[Tensor] = field(default_factory=global_states)  # as the call began
    packed: bool = False  # whether the batch is known of calls of several prompts
    decodes: bool = False  # whether its tail has been tried
    packs: bool = False  # whether prompts have been found not to see one another
    batch: Batch = field(default_factory=Batch)

    def turn(self) -> bool:
        """Go on to the next way to ask for rows; False once all have been tried.

        That is each of `WAYS`, then each of them again with arguments dealt.
        """
        self.batch = Batch()  # rows asked for otherwise may lie otherwise
        self.way = (self.way + 1) % len(WAYS)
        if self.way == 0:
            self.deals = not self.deals
        return self.way > 0 or self.deals
