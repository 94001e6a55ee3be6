"""The options that say how a reward scores videos."""

from __future__ import annotations

__all__ = ["ABOUT_FRAMES", "ABOUT_SCORE"]

ABOUT_FRAMES = (
    "frames of a video that the reward scores: all, first, or a number of evenly spaced ones"
)
ABOUT_SCORE = "score of a video: the mean or the minimum of its frames' scores"
