"""Warnings before training about scored images from which there is little to learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .shards import Rollouts

__all__ = ["little_in_rollouts", "little_to_learn"]

NEAR = 0.1  # as a fraction of the reward's range
MOST = 0.9  # as a fraction of the images, if the range is not known

Bounds = tuple[float | None, float | None]


def little_in_rollouts(run: Rollouts, column: str) -> str:
    """Return the result of `little_to_learn` for a column of rewards of a scored run."""
    prompts, rewards = [], []
    for shard in run.shards:
        prompts += [row["group"] for row in shard.table(["group"])]
        rewards += shard.rewards()[column]
    low, high = run.shards[0].bounds().get(column, (None, None))
    return little_to_learn(prompts, rewards, (low, high))


def little_to_learn(
    prompts: Sequence[int], rewards: Sequence[float], bounds: Bounds = (None, None)
) -> str:
    """Return why little can be learned from these rewards, with advice; "" if they are fine.

    prompts: the prompt of each image; bounds: the smallest and the largest possible reward. If they
    are not known, the smallest and the largest of these rewards are used.
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
            f"{mean}, near the lower end of its range: hardly any image is good, so there is "
            "little to learn from. Use easier prompts, or a reward with partial credit (ocr has "
            "it, ocr(mode=exact) has not); or draw better images: more per prompt, with more "
            "steps, a higher guidance scale, or some of them steered"
        )
    if _near(values, bounds, lowest=False):
        return (
            f"{mean}, near the upper end of its range: hardly any image is worse than the others, "
            "so there is little to learn. Use harder prompts, or a stricter reward"
        )
    if flat > len(groups) / 2:
        return (
            f"for {flat} of {len(groups)} prompts all images have the same reward, so there is "
            "nothing to learn. Make more images per prompt, or use a reward that distinguishes them"
        )
    return ""


def _near(values: torch.Tensor, bounds: Bounds, lowest: bool) -> bool:
    """Return whether the rewards are close to one end of their range."""
    low, high = bounds
    if low is not None and high is not None and low < high:
        place = (values.mean().item() - low) / (high - low)
        return place < NEAR if lowest else place > 1 - NEAR
    end = values.min() if lowest else values.max()
    # if all are equal, it is unknown which end that is
    return bool(values.max() > values.min() and (values == end).double().mean() >= MOST)
