"""How a reward scores videos: the options that say it, and where the frames are."""

from __future__ import annotations

from pathlib import Path

from steering.frames import Frames

__all__ = ["ABOUT_FRAMES", "ABOUT_SCORE", "frames_in", "scorer"]

ABOUT_FRAMES = (
    "frames of a video that the reward scores: all, first, or a number of evenly spaced ones"
)
ABOUT_SCORE = "score of a video: the mean or the minimum of its frames' scores"


def frames_in(folder: Path) -> list[Path]:
    """Return the PNGs of the frames of a video that `tilt evaluate` saved in a folder.

    Raises ValueError if one of them is missing before the last.
    """
    found = sorted(folder.glob("video/*.png"))
    for i, file in enumerate(found):
        if file.name != f"{i:04d}.png":
            raise ValueError(
                f"{file.parent} has no {i:04d}.png, a frame of its video; delete {folder} and "
                "repeat the command with resume=true"
            )
    return found


def scorer(reward: str, frames: Frames) -> str:
    """Return a name of a reward with the frames that it scores, if these are not the default."""
    return reward if frames == Frames() else f"{reward} [{frames}]"
