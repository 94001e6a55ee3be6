"""Facts about a pipeline that are determined once per run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from steering.call import WAYS
from steering.noise import global_states
from steering.probe import Batch

__all__ = ["Learned"]


@dataclass
class Learned:
    """How rows are requested from the pipeline, and which checks it has passed."""

    way: int = 0  # index into call.WAYS: how rows are requested
    deals: bool = False  # whether arguments with one row per guidance copy are repeated per row
    began: bool = False  # whether the present call has reached its first step
    rng: list[Tensor] = field(default_factory=global_states)  # at the beginning of the call
    packed: bool = False  # whether `batch` describes calls of several prompts
    decodes: bool = False  # whether decoding has been checked
    first_alone: bool = False  # whether decoding a video's first latent frame gives its first frame
    packs: bool = False  # whether prompts of one call were found not to affect each other
    batch: Batch = field(default_factory=Batch)

    def turn(self) -> bool:
        """Switch to the next way to request rows; return False once all have been tried.

        These are `WAYS`, then the same again with `deals`.
        """
        self.batch = Batch()  # the layout of rows may depend on how they are requested
        self.way = (self.way + 1) % len(WAYS)
        if self.way == 0:
            self.deals = not self.deals
        return self.way > 0 or self.deals
