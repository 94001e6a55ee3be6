"""Which frames of a video a reward sees, and the video's score from their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steering.settings import is_count

__all__ = ["Frames", "evenly_spaced"]


@dataclass(frozen=True)
class Frames:
    """The arguments `score_frames` and `video_score` of steer(); __post_init__ checks them.

    which: "all", "first", or the number of evenly spaced frames; score: "mean" or "min".
    """

    which: Any = "all"
    score: str = "mean"

    def __post_init__(self) -> None:
        named = isinstance(self.which, str) and self.which in ("all", "first")
        if not named and not is_count(self.which):
            raise ValueError(
                f'score_frames={self.which!r:.80}: pass "all", "first", or the number of evenly '
                "spaced frames, 1 or more."
            )
        if not isinstance(self.score, str) or self.score not in ("mean", "min"):
            raise ValueError(f'video_score={self.score!r:.80}: pass "mean" or "min".')
        if self.score == "min" and self.which in ("first", 1):
            raise ValueError(
                f'video_score="min" with score_frames={self.which!r}: the minimum of one frame is '
                "its score; leave video_score out, or score several frames."
            )

    def check(self, frames: int | None) -> None:
        """Raise ValueError if videos of so many frames have not those that are to be scored.

        frames: None for images and sounds.
        """
        if frames is None and self != Frames():
            raise ValueError(
                "this call generates no videos of several frames, and score_frames= and "
                "video_score= apply only to those; leave them out."
            )
        if is_count(self.which) and frames is not None and self.which > frames:
            raise ValueError(
                f"score_frames={self.which}: the videos of this call have {frames} frames; pass "
                "at most as many."
            )

    def chosen(self, videos: Tensor) -> Tensor:
        """Return the frames (n, m, ...) to score, of videos (n, f, ...)."""
        if self.which == "all":
            return videos
        if self.which == "first":
            return videos[:, :1]
        return videos[:, evenly_spaced(videos.shape[1], self.which)]

    def combined(
        self, totals: Tensor, parts: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scores (n,) of videos whose frames have the totals and parts (n, m).

        The parts of a minimum are those of the frame that has it.
        """
        if self.score == "mean":
            return totals.mean(1), {name: part.mean(1) for name, part in parts.items()}
        least, where = totals.min(1)
        rows = where[:, None]
        at = {name: part.gather(1, rows.to(part.device))[:, 0] for name, part in parts.items()}
        return least, at


def evenly_spaced(frames: int, num: int) -> list[int]:
    """Return the indices of `num` of `frames` frames, first and last included; the middle of one.

    They are rounded to the nearest, halves up; 1 <= num <= frames.
    """
    if num == 1:
        return [(frames - 1) // 2]
    return [(2 * i * (frames - 1) + num - 1) // (2 * (num - 1)) for i in range(num)]
