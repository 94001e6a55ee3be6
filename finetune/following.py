"""Training on rollouts that other jobs draw and score meanwhile: asynchronous, off-policy GDRO.

Every few steps, the trainer looks for shards that are whole and scored, and trains on all of them.
Which shards it sees depends on when the others finish them, so their names are in the checkpoint: a
resumed run makes the remaining steps before its next look on the same shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .data import load_data
from .gdro import GdroTrainer
from .sharding import from_main
from .shards import Rollouts, Shard

__all__ = ["Following", "newest", "scored", "wait"]

PAUSE = 2.0  # seconds between looks if there is nothing to do


def scored(folder: Path, column: str, known: Collection[str] = ()) -> Rollouts:
    """Return the run with only those shards that are whole, and from whose rewards can be learned.

    known: names of shards that need no further check of their files.
    """
    run = Rollouts(folder, growing=True, known=known)
    run.shards = [shard for shard in run.shards if _teaches(shard, column)]
    return run


def _teaches(shard: Shard, column: str) -> bool:
    """Return whether images of one prompt have different rewards."""
    of: dict[int, set[float]] = {}
    groups = [row["group"] for row in shard.table(["group"])]
    for group, reward in zip(groups, shard.rewards().get(column, []), strict=False):
        of.setdefault(group, set()).update([reward] * math.isfinite(reward))
    return any(len(rewards) > 1 for rewards in of.values())


def wait(folder: Path, column: str) -> Rollouts:
    """Return the run as soon as a shard of it is scored."""
    while not (run := scored(folder, column)).shards:
        time.sleep(PAUSE)
    return run


def newest(out: Path) -> tuple[int, Path | None]:
    """Return the step and the folder of the last LoRA that a training run saved; (0, None) so far.

    out: the run's folder, with lora-000100/ and so on of `finetune.loop.snapshot`.
    """
    found = [path for path in out.glob("lora-*[0-9]") if any(path.glob("*.safetensors"))]
    last = max(found, key=lambda path: int(path.name[5:]), default=None)
    return (int(last.name[5:]), last) if last else (0, None)


class Following:
    """A `GdroTrainer` whose data grow.

    run: the shards to begin with; every: steps between looks for new ones. All processes see the
    shards that the main process sees.
    """

    def __init__(self, trainer: GdroTrainer, run: Rollouts, every: int) -> None:
        self.trainer, self.run, self.every = trainer, run, every
        self.learner = trainer.learner

    @property
    def step(self) -> int:
        """Return the number of updates so far."""
        return self.trainer.step

    def train_step(self) -> dict[str, float]:
        """Make one update, and return its statistics with those of the shards.

        staleness: mean number of steps between the LoRA that drew a shard and now.
        """
        if self.step % self.every == 0:
            self.look()
        ages = [self.step - shard.lora_step() for shard in self.run.shards]
        about = {"shards": len(ages), "staleness": sum(ages) / len(ages)}
        return self.trainer.train_step() | about

    def look(self) -> None:
        """Train on all shards that are scored by now."""
        names, column = self._names(), self.trainer.settings.reward
        accelerator: Any = self.learner.accelerator
        self._use(from_main(accelerator, lambda: _named(scored(self.run.folder, column, names))))

    def _names(self) -> list[str]:
        return _named(self.run)

    def _use(self, names: list[str]) -> None:
        if names == self._names():
            return
        run, s = Rollouts(self.run.folder, growing=True, known=names), self.trainer.settings
        run.shards = [shard for shard in run.shards if shard.folder.name in names]
        self.trainer.renew(load_data(run, s.reward, s.reward_norm, s.k))
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's state, with the names and a digest of the shards that it saw."""
        column = self.trainer.settings.reward
        return self.trainer.state_dict() | {
            "seen": self._names(),
            "digest": self.run.digest(column),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue on the same shards; raises ValueError if they were drawn or scored again."""
        self._use(list(state["seen"]))
        if self.run.digest(self.trainer.settings.reward) != state["digest"]:
            raise ValueError("the shards that it had seen were drawn or scored again")
        self.trainer.load_state_dict(state)


def _named(run: Rollouts) -> list[str]:
    return [shard.folder.name for shard in run.shards]
