"""Scored rollouts as training data; latents and embeddings stay on disk, memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .conditioning import Conditioning, Form, Mixed, Row
from .groups import Group, make_groups, normalised
from .shards import Rollouts, Shard

__all__ = ["Ahead", "Data", "ShardRows", "check_fits", "load_data"]

T = TypeVar("T")


class ShardRows:
    """A virtual concatenation of tensors: rows[index] copies only the requested rows.

    parts (n_i, *shape_i) may be memory-mapped; other rows are never read. Raises ValueError for
    parts of different dtypes.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        dtypes = {part.dtype for part in parts}
        if len(dtypes) != 1:
            raise ValueError(
                f"the shards' rows have {len(dtypes)} dtypes, {sorted(map(str, dtypes))}, but must "
                "have one; make the rollouts with one dtype"
            )
        self.parts = list(parts)
        self.starts = torch.tensor([0] + [len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the rows, (*index.shape, *shape); ValueError if their shapes differ."""
        flat = index.flatten()
        owners = (torch.searchsorted(self.starts, flat, right=True) - 1).tolist()
        shapes = {tuple(self.parts[owner].shape[1:]) for owner in owners}
        if len(shapes) > 1:
            raise ValueError(f"rows of the shapes {sorted(shapes)} cannot be joined")
        found = torch.empty((len(flat), *shapes.pop()), dtype=self.parts[0].dtype)
        for i, (owner, row) in enumerate(zip(owners, flat.tolist(), strict=True)):
            found[i] = self.parts[owner][row - int(self.starts[owner])]
        return found.unflatten(0, index.shape)


@dataclass(frozen=True)
class Data:
    """Training data: latents (rows, ...), the conditioning of each prompt, and groups.

    Images of several sizes have conditioning of several forms; those of a group have one size.
    dropped: number of prompts that were left out; unscored: number of images without a score.
    """

    latents: Tensor | ShardRows
    given: Conditioning | Mixed
    groups: list[Group]
    dropped: int
    unscored: int = 0

    def forms(self) -> list[Conditioning]:
        """Return the conditioning of the first prompt of each form."""
        found: dict[int, Conditioning] = {}
        for one in (self.given[[i]] for i in range(len(self.given))):
            found.setdefault(id(one.form), one)
        return list(found.values())


def load_data(runs: Rollouts | Sequence[Rollouts], reward: str, norm: str, k: int) -> Data:
    """Load scored runs with the rewards of the column `reward`, normalised by `norm`.

    Images of one prompt in two runs are two groups. Groups have k or more images. Runs may have
    been drawn with different keywords, such as height and width. Latents and conditioning are
    memory-mapped. Raises ValueError for a missing column, and as `make_groups`
    does.
    """
    runs = [*runs] if isinstance(runs, Sequence) else [runs]
    every = [shard for run in runs for shard in run.shards]
    latents, rows, texts, prompts, rewards = [], [], [], [], []
    for shard in every:
        columns = shard.rewards()
        if reward not in columns:
            known = f"there are {sorted(columns)}" if columns else "there are none yet"
            raise ValueError(f"{shard.folder} has no rewards {reward!r}; {known}; score them first")
        tensors = shard.tensors()
        latents.append(tensors.pop("latents"))
        rows += (found := _rows(tensors))
        texts += [shard.form()] * len(found)
        own = [row["group"] for row in shard.table(["group"])]
        first = max(prompts, default=-1) + 1 - min(own)  # shards of other numbers may be missing
        prompts += [first + group for group in own]
        rewards += columns[reward]
    _check_alike(every, reward)
    groups, dropped, unscored = make_groups(prompts, torch.tensor(rewards, dtype=torch.float64), k)
    forms = {text: Form.loads(text) for text in dict.fromkeys(texts)}
    given: Conditioning | Mixed = Mixed([forms[text] for text in texts], rows)
    if len(forms) == 1:
        given = Conditioning(given.forms[0], rows)
    return Data(ShardRows(latents), given, normalised(groups, norm), dropped, unscored)


def _check_alike(shards: Sequence[Shard], reward: str) -> None:
    """Raise ValueError if the shards' rewards are not of one spec, version and choice of frames."""
    specs = sorted({shard.scored_by(reward) for shard in shards})
    versions = {shard.versions().get(reward, "") for shard in shards}
    frames = sorted({str(f) for shard in shards if (f := shard.frames().get(reward))})
    what = f"frames, {frames}" if frames[1:] else f"versions of {specs[0]}"
    what = f"specs, {specs}" if specs[1:] else what
    if specs[1:] or frames[1:] or len(versions) > 1:
        raise ValueError(
            f"the shards' rewards {reward!r} are of different {what}; score the rollouts again"
        )


def _rows(tensors: Mapping[str, Tensor]) -> list[Row]:
    """Return the conditioning of each prompt of a shard, from tensors "given.INDEX.NAME"."""
    rows: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        rows.setdefault(int(index), {})[name] = value
    return [rows[i] for i in sorted(rows)]


def check_fits(data: Data, network: Any, made_by: str, kind: str) -> None:
    """Raise ValueError if the network cannot have drawn the rollouts.

    made_by, kind: class names of the pipeline that made them, and of the network's pipeline.
    """
    if made_by != kind:
        raise ValueError(
            f"the rollouts were made by {made_by}, but the model is a {kind}; set model="
        )
    config, text = network.config, None
    if "UNet" in type(network).__name__ and not getattr(config, "encoder_hid_dim", None):
        text = getattr(config, "cross_attention_dim", None)
    text = text or getattr(config, "joint_attention_dim", None)
    # some networks take the latents of a picture beside those that they denoise
    channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
    needed = []
    for given in data.forms():
        widths = {value.shape[-1] for value in given.rows[0].values() if value.ndim > 1}
        needed.append(("latents", tuple(given.form.shape), channels))
        needed.append(("texts", tuple(sorted(widths)), [text]))
    for name, found, known in needed:
        wanted = [value for value in known if isinstance(value, int)]
        if wanted and not {*wanted} & {*found}:
            raise ValueError(
                f"the rollouts' {name} are {found}, but the model expects {wanted[0]} "
                "channels: it is not the one that they were made with; set model="
            )


class Ahead(Generic[T]):
    """Calls make(step), and prepares the next step's result in a background thread.

    make must depend only on the step, so that an unexpected step gives the same result.
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
