"""Scored images of prompts -> groups to train on: checks, normalisation, draws. Tensors only.

Legend: m images of a prompt, k of them in a group, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "draw_groups", "make_groups", "normalised", "target_entropy"]

NORMS = ("none", "minmax", "rank", "group_std", "global_std")


@dataclass(frozen=True)
class Group:
    """The scored images of one prompt: rows (m,) of the latents, rewards (m,), and its prompt."""

    prompt: int
    rows: Tensor
    rewards: Tensor


def make_groups(prompts: Sequence[int], rewards: Tensor, k: int) -> tuple[list[Group], int]:
    """Groups of all rows by prompt, and how many were left out because their rewards are equal.

    prompts: the prompt of each row; rewards (rows,). Equal rewards teach nothing and would pull
    implicit scores together. ValueError for rewards that are not finite (naming rows), or prompts
    with fewer than k images (saying how many).
    """
    bad = [row for row, value in enumerate(rewards.tolist()) if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{len(bad)} rewards are not finite, in rows {bad[:5]}{' and more' if bad[5:] else ''};"
            " score them again or leave those prompts out"
        )
    ids = torch.as_tensor(prompts)
    groups = []
    for prompt in ids.unique().tolist():
        rows = (ids == prompt).nonzero().flatten()
        groups.append(Group(prompt, rows, rewards[rows].float()))
    small = [group.prompt for group in groups if len(group.rows) < k]
    if small:
        fewest = min(len(group.rows) for group in groups)
        raise ValueError(
            f"{len(small)} of {len(groups)} prompts have fewer than k = {k} images (the fewest is "
            f"{fewest}); make more rollouts, or set k={fewest}"
        )
    spread = [group for group in groups if group.rewards.max() > group.rewards.min()]
    if not spread:
        raise ValueError("the images of every prompt have equal rewards; there is nothing to learn")
    return spread, len(groups) - len(spread)


def normalised(groups: Sequence[Group], how: str) -> list[Group]:
    """Groups with their rewards on another scale, so that a temperature means the same.

    minmax: to [0, 1] over all; rank: to [0, 1] within the group, ties at their mean; group_std and
    global_std: divided by the standard deviation, in the group or of all deviations from the
    groups' means.
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
            below = (r[:, None] > r).float() + 0.5 * (r[:, None] == r).float()
            return (below.sum(1) - 0.5) / max(len(r) - 1, 1)
        if how == "group_std":
            return r / r.std(correction=0)
        return r / whole if how == "global_std" else r

    return [Group(group.prompt, group.rows, changed(group.rewards)) for group in groups]


def draw_groups(
    groups: Sequence[Group], count: int, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`count` prompts without repetition as long as they last, and k different images of each.

    Returns (prompts (g,), rows (g, k), rewards (g, k)).
    """
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(groups), generator=generator).tolist()
    picked = []
    for i in order[:count]:
        chosen = torch.randperm(len(groups[i].rows), generator=generator)[:k]
        picked.append((groups[i].prompt, groups[i].rows[chosen], groups[i].rewards[chosen]))
    prompts, rows, rewards = zip(*picked, strict=True)
    return torch.tensor(prompts), torch.stack(rows), torch.stack(rewards)


def target_entropy(rewards: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(r/τ) over log k, (g,): 1 asks for nothing, 0 for one image alone."""
    log_q = (rewards / temperature).log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1) / math.log(rewards.shape[-1])
