"""Groups of scored images: construction, normalisation and random draws, on tensors.

Legend: m images per prompt, k of them in a group, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "draw_groups", "make_groups", "normalised", "target_entropy"]

MOST_DROPPED = 0.1  # largest fraction of images without a score
NORMS = ("none", "minmax", "rank", "group_std", "global_std")


@dataclass(frozen=True)
class Group:
    """The scored images of one prompt: its index, rows (m,) of the latents and rewards (m,)."""

    prompt: int
    rows: Tensor
    rewards: Tensor


def make_groups(prompts: Sequence[int], rewards: Tensor, k: int) -> tuple[list[Group], int, int]:
    """Group the rows by prompt; return also the numbers of omitted groups and unscored images.

    prompts: the prompt of each row; rewards (rows,). Images whose reward is not finite are left out
    of their group. Groups of equal rewards, or of a single image, are omitted, since they have no
    signal and would pull the implicit scores together. Raises ValueError if more than MOST_DROPPED
    of all images have no score, and for prompts with fewer than k images.
    """
    ids = torch.as_tensor(prompts)
    if rewards.shape != ids.shape or ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"one prompt and one reward per row are needed, but got {tuple(ids.shape)} and "
            f"{tuple(rewards.shape)}"
        )
    scored = rewards.isfinite()
    bad = (~scored).nonzero().flatten().tolist()
    if len(bad) > MOST_DROPPED * len(rewards):
        raise ValueError(
            f"{len(bad)} of {len(rewards)} rewards are not finite, in rows {bad[:5]}"
            f"{' and more' if bad[5:] else ''}: more than {MOST_DROPPED:.0%} of all; score them "
            "again, by a reward that has an answer"
        )
    groups, sizes = [], []
    for prompt in ids.unique().tolist():
        own = ids == prompt
        rows = (own & scored).nonzero().flatten()
        sizes.append(int(own.sum()))
        groups.append(Group(prompt, rows, rewards[rows]))
    small = [size for size in sizes if size < k]
    if small:
        raise ValueError(
            f"{len(small)} of {len(groups)} prompts have fewer than k = {k} images (the fewest is "
            f"{min(small)}); make more rollouts, or set k={min(small)}"
        )
    taught = [g for g in groups if len(g.rows) > 1 and g.rewards.max() > g.rewards.min()]
    if not taught:
        raise ValueError("the images of every prompt have equal rewards; there is nothing to learn")
    return taught, len(groups) - len(taught), len(bad)


def normalised(groups: Sequence[Group], how: str) -> list[Group]:
    """Return groups with rescaled rewards, so that a temperature suits any reward.

    minmax: to [0, 1] over all groups; rank: ranks scaled to [0, 1] within the group, ties at their
    mean; group_std and global_std: divided by the standard deviation of the group, or of all
    deviations from the groups' means.
    """
    if how not in NORMS:
        raise ValueError(f"the reward normalisation {how!r} is unknown; take one of {list(NORMS)}")
    every = torch.cat([group.rewards for group in groups])
    centred = torch.cat([group.rewards - group.rewards.mean() for group in groups])
    whole = centred.square().mean().sqrt()

    def changed(r: Tensor) -> Tensor:
        if how == "minmax":
            return (r - every.min()) / (every.max() - every.min())
        if how == "rank":
            below = (r[:, None] > r).to(r) + 0.5 * (r[:, None] == r).to(r)
            return (below.sum(1) - 0.5) / max(len(r) - 1, 1)
        if how == "group_std":
            return r / r.std(correction=0)
        return r / whole if how == "global_std" else r

    return [Group(group.prompt, group.rows, changed(group.rewards)) for group in groups]


def draw_groups(
    groups: Sequence[Group], count: int, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` prompts, repeated only when all were drawn, and k different images of each.

    Returns (prompts (g,), rows (g, k), rewards (g, k)). A group with fewer images is padded with
    one of its rows, and with rewards of NaN.
    """
    if not groups or count < 1 or k < 2:
        raise ValueError(f"count is {count} and k {k} of {len(groups)} groups; draw 1 of 2 or more")
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(groups), generator=generator).tolist()
    picked = []
    for i in order[:count]:
        chosen = torch.randperm(len(groups[i].rows), generator=generator)[:k]
        rows, rewards = groups[i].rows[chosen], groups[i].rewards[chosen]
        if len(chosen) < k:
            missing = k - len(chosen)
            rows = torch.cat([rows, rows[:1].expand(missing)])
            rewards = torch.cat([rewards, rewards.new_full((missing,), math.nan)])
        picked.append((groups[i].prompt, rows, rewards))
    prompts, rows, rewards = zip(*picked, strict=True)
    return torch.tensor(prompts), torch.stack(rows), torch.stack(rewards)


def target_entropy(rewards: Tensor, temperature: float) -> Tensor:
    """Return the entropy of softmax(r/τ), divided by log k, (g,): 1 if uniform, 0 for one image."""
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not 0 < temperature < math.inf:
        raise ValueError(
            "rewards (g, k) with k of 2 or more and a positive temperature are needed, but got "
            f"{tuple(rewards.shape)} and {temperature}"
        )
    log_q = (rewards / temperature).log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1) / math.log(rewards.shape[-1])
