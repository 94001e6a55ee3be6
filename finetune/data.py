"""What training needs of scored rollouts, read into memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import Group, make_groups, normalised
from .rollouts import Rollouts

__all__ = ["Data", "load_data"]


@dataclass(frozen=True)
class Data:
    """What training needs of rollouts: latents (rows, ...), conditioning (prompts, ...), groups."""

    latents: Tensor
    given: dict[str, Tensor]
    groups: list[Group]
    dropped: int


def load_data(run: Rollouts, reward: str, norm: str, k: int) -> Data:
    """Read a scored run: the column `reward`, normalised by `norm`, in groups of k or more.

    ValueError for a column that is not there, and as `make_groups`.
    """
    latents, given, prompts, rewards = [], [], [], []
    for shard in run.shards:
        columns = shard.rewards()
        if reward not in columns:
            known = f"those there are {sorted(columns)}" if columns else "there is none yet"
            raise ValueError(
                f"{shard.folder} has no rewards {reward!r}; {known}; add some with scripts/score.py"
            )
        tensors = shard.tensors()
        latents.append(tensors.pop("latents"))
        given.append(tensors)
        prompts += [row["group"] for row in shard.table(["group"])]
        rewards += columns[reward]
    specs = sorted({shard.scored_by(reward) for shard in run.shards})
    if len(specs) > 1:
        raise ValueError(
            f"the shards' rewards {reward!r} are of different specs, {specs}; finish scoring with "
            "scripts/score.py --resume"
        )
    groups, dropped = make_groups(prompts, torch.tensor(rewards), k)
    names = [name.removeprefix("given.") for name in given[0]]
    merged = {name: torch.cat([part[f"given.{name}"] for part in given]) for name in names}
    return Data(torch.cat(latents), merged, normalised(groups, norm), dropped)
