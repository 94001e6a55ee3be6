"""Whether scored images can teach a model anything: what is said before it trains on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .shards import Rollouts

__all__ = ["of_rollouts", "outlook"]

NEAR = 0.1  # of a reward's range
MOST = 0.9  # of the images, where the range is not known

Bounds = tuple[float | None, float | None]


def of_rollouts(run: Rollouts, column: str) -> str:
    """The outlook of a scored run, by the rewards of a column."""
    prompts, rewards = [], []
    for shard in run.shards:
        prompts += [row["group"] for row in shard.table(["group"])]
        rewards += shard.rewards()[column]
    low, high = run.shards[0].bounds().get(column, (None, None))
    return outlook(prompts, rewards, (low, high))


def outlook(prompts: Sequence[int], rewards: Sequence[float], bounds: Bounds = (None, None)) -> str:
    """Why there is little to learn from these rewards, and what to do about it; "" where there is.

    prompts: the prompt of each image; bounds: the least and the most that the reward can be. Where
    they are not known, the least and the most that were seen stand for them.
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    there = values.isfinite()
    ids, values = torch.as_tensor(prompts)[there], values[there]
    if not len(values):
        return ""
    groups = [values[ids == prompt] for prompt in ids.unique().tolist()]
    flat = sum(bool(group.max() == group.min()) for group in groups)
    mean = f"the mean reward is {values.mean():.3g}"
    if _near(values, bounds, lowest=True):
        return (
            f"{mean}, near the least that it can be: hardly an image is good, so there is little "
            "to learn from. Take easier prompts, or a reward that gives part of the credit (as ocr "
            "does, and ocr(mode=exact) does not); or draw better images: more of a prompt, with "
            "more steps, a higher guidance scale, or some of them steered"
        )
    if _near(values, bounds, lowest=False):
        return (
            f"{mean}, near the most that it can be: hardly an image is worse than the others, so "
            "there is little to learn. Take harder prompts, or a stricter reward"
        )
    if flat > len(groups) / 2:
        return (
            f"the images of {flat} of {len(groups)} prompts have one reward each, which teaches "
            "nothing. Make more images of a prompt, or take a reward that tells them apart"
        )
    return ""


def _near(values: torch.Tensor, bounds: Bounds, lowest: bool) -> bool:
    """Whether rewards are all but at one end of what they can be."""
    low, high = bounds
    if low is not None and high is not None and low < high:
        place = (values.mean().item() - low) / (high - low)
        return place < NEAR if lowest else place > 1 - NEAR
    end = values.min() if lowest else values.max()
    # all equal: nobody knows which end it is
    return bool(values.max() > values.min() and (values == end).double().mean() >= MOST)
