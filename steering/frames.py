"""Which frames of a video a reward sees, and the video's score from their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.outputs import scaled
from steering.settings import is_count

__all__ = ["Frames", "evenly_spaced"]

AT_ONCE = 64  # frames per call of a reward, to bound its memory
# images (n, 3, h, w) and what each belongs to -> totals (n,) and parts
Scored = Callable[[Tensor, list[Any]], tuple[Tensor, dict[str, Tensor]]]


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

    def __str__(self) -> str:
        if self.which in ("first", 1):
            return "the first frame" if self.which == "first" else "the middle frame"
        which = "all frames" if self.which == "all" else f"{self.which} evenly spaced frames"
        return f"the {'mean' if self.score == 'mean' else 'minimum'} of {which}"

    def check(self, frames: int | None) -> None:
        """Raise ValueError if videos of so many frames have not those that are to be scored.

        frames: None for images and sounds.
        """
        if frames is None and self != Frames():
            raise ValueError(
                "there are no videos of several frames here, and score_frames= and video_score= "
                "apply only to those; leave them out."
            )
        if is_count(self.which) and frames is not None and self.which > frames:
            raise ValueError(
                f"score_frames={self.which}: the videos have {frames} frames; pass at most as many."
            )

    def chosen(self, videos: Tensor) -> Tensor:
        """Return the frames (n, m, ...) to score, of videos (n, f, ...)."""
        if self.which == "all":
            return videos
        if self.which == "first":
            return videos[:, :1]
        return videos[:, evenly_spaced(videos.shape[1], self.which)]

    def evaluate(
        self,
        reward: Any,
        outputs: Tensor,
        prompts: Sequence[str],
        references: Sequence[Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `reward.evaluate` says of n images (n, 3, h, w) or videos (n, f, 3, h, w).

        They are quantised or floats; the results are the totals (n,) and the parts by name. Raises
        ValueError if the videos have fewer frames than are to be scored.
        """
        if outputs.ndim == 5:
            self.check(outputs.shape[1])

        def function(images: Tensor, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
            of_rows = None if references is None else [references[i] for i in rows]
            return reward.evaluate(images, [prompts[i] for i in rows], references=of_rows)

        chosen = self.chosen(outputs) if outputs.ndim == 5 else outputs
        return self.applied(function, chosen, range(len(outputs)))

    def applied(
        self, function: Scored, outputs: Tensor, rows: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the totals (n,) and parts of n images or sounds, or of n videos' chosen frames.

        rows: what `function` gets of each, with a frame that of its video.
        """
        if outputs.ndim != 5:
            return function(scaled(outputs), list(rows))
        n, m = outputs.shape[:2]
        single, each = outputs.flatten(0, 1), [row for row in rows for _ in range(m)]
        found = [
            function(scaled(single[i : i + AT_ONCE]), each[i : i + AT_ONCE])
            for i in range(0, n * m, AT_ONCE)
        ]
        total = torch.cat([total for total, _ in found]).view(n, m)
        names = found[0][1]
        parts = {name: torch.cat([part[name] for _, part in found]).view(n, m) for name in names}
        return self.combined(total, parts)

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
