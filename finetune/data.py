"""What training needs of scored rollouts. Latents and embeddings stay on disk, memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .groups import Group, make_groups, normalised
from .shards import Rollouts

__all__ = ["Ahead", "Data", "ShardRows", "check_fits", "load_data"]

T = TypeVar("T")


class ShardRows:
    """The rows of several tensors as those of one: rows[index] copies the rows that are asked for.

    parts (n_i, *shape) may be memory-mapped: the rest of them is never read. ValueError for parts
    whose rows differ in shape or dtype.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        kinds = {(tuple(part.shape[1:]), part.dtype) for part in parts}
        if len(kinds) != 1:
            raise ValueError(
                f"the shards' rows are of {len(kinds)} shapes and types, {sorted(map(str, kinds))},"
                " but must be alike; make the rollouts with one call of one model"
            )
        self.parts = list(parts)
        self.starts = torch.tensor([0] + [len(part) for part in parts]).cumsum(0)
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """(*index.shape, *shape)."""
        flat = index.flatten()
        owners = torch.searchsorted(self.starts, flat, right=True) - 1
        found = torch.empty((len(flat), *self.shape[1:]), dtype=self.parts[0].dtype)
        for i, (owner, row) in enumerate(zip(owners.tolist(), flat.tolist(), strict=True)):
            found[i] = self.parts[owner][row - int(self.starts[owner])]
        return found.unflatten(0, index.shape)


@dataclass(frozen=True)
class Data:
    """What training needs of rollouts: latents (rows, ...), conditioning (prompts, ...), groups.

    dropped: prompts that were left out; unscored: images that were.
    """

    latents: Tensor | ShardRows
    given: Mapping[str, Tensor | ShardRows]
    groups: list[Group]
    dropped: int
    unscored: int = 0


def load_data(run: Rollouts, reward: str, norm: str, k: int) -> Data:
    """A scored run: the column `reward`, normalised by `norm`, in groups of k or more.

    Latents and conditioning are mapped, not read. ValueError for a column that is not there, and
    as `make_groups`.
    """
    shards, prompts, rewards = [], [], []
    for shard in run.shards:
        columns = shard.rewards()
        if reward not in columns:
            known = f"those there are {sorted(columns)}" if columns else "there is none yet"
            raise ValueError(f"{shard.folder} has no rewards {reward!r}; {known}; score them first")
        shards.append(shard.tensors())
        prompts += [row["group"] for row in shard.table(["group"])]
        rewards += columns[reward]
    made = {(shard.scored_by(reward), shard.versions().get(reward, "")) for shard in run.shards}
    if len(made) > 1:
        specs = sorted({spec for spec, _ in made})
        what = f"specs, {specs}" if specs[1:] else f"versions of {specs[0]}"
        raise ValueError(
            f"the shards' rewards {reward!r} are of different {what}; score the rollouts again"
        )
    groups, dropped, unscored = make_groups(prompts, torch.tensor(rewards, dtype=torch.float64), k)
    rows = {name: ShardRows([tensors[name] for tensors in shards]) for name in shards[0]}
    latents = rows.pop("latents")
    given = {name.removeprefix("given."): found for name, found in rows.items()}
    return Data(latents, given, normalised(groups, norm), dropped, unscored)


def check_fits(data: Data, network: Any, made_by: str, kind: str) -> None:
    """ValueError for rollouts that the network cannot have drawn.

    made_by, kind: the classes of the pipeline that made them, and of the network's.
    """
    if made_by != kind:
        raise ValueError(
            f"the rollouts were made by {made_by}, but the model is a {kind}; set model="
        )
    config, shape = network.config, data.latents.shape
    text = getattr(config, "cross_attention_dim", None) or getattr(
        config, "joint_attention_dim", None
    )
    needed = {
        "latents": (
            shape[1] if len(shape) == 4 else shape[-1],
            getattr(config, "in_channels", None),
        ),
        "embeds": (data.given["embeds"].shape[-1], text),
    }
    for name, (found, wanted) in needed.items():
        if isinstance(wanted, int) and found != wanted:
            raise ValueError(
                f"the rollouts' {name} have {found} channels, but the model takes {wanted}: it is "
                "not the one that they were made with; set model="
            )


class Ahead(Generic[T]):
    """make(step), with that of the next step made in a thread while the present one is used.

    make must depend on the step alone, so that a step that was not foreseen is made the same.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make
        self.thread = ThreadPoolExecutor(1, "ahead")
        self.foreseen: tuple[int, Future[T]] | None = None

    def __call__(self, step: int) -> T:
        foreseen, self.foreseen = self.foreseen, None
        known = foreseen is not None and foreseen[0] == step
        found = foreseen[1].result() if known and foreseen else self.make(step)
        self.foreseen = step + 1, self.thread.submit(self.make, step + 1)
        return found
