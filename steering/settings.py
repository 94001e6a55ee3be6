"""The settings of the filter, and the scored steps and population sizes that follow from them."""

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from steering.potentials import POTENTIALS
from steering.resampling import RESAMPLERS

__all__ = ["FeynmanKac", "is_count", "population_sizes", "scored_steps"]

TEMPERINGS = ("none", "linear", "adaptive")
_MOST_SCORES = 10_000  # as many as steer() allows steps
LARGEST_SCALE = 1e30  # largest |λ|: its product with a reward must stay finite in float32


def _listed(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _setting(default: Any, help: str) -> Any:
    """Return a dataclass field with its help text, which commands show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class FeynmanKac:
    """Settings of the filter; raises ValueError for invalid values.

    The defaults beat best-of-k on the embedded models (docs/lift.md). They score early, because the
    contents of an image are decided early, and late scores have little left to select. Adaptive
    tempering takes its increments from the scores, so λ need not be tuned to their range.
    """

    reward_scale: float = _setting(
        100.0,
        "λ, from -1e30 to 1e30: a reward higher by 1/λ makes an image e times as likely; 0 samples "
        "from the model itself",
    )
    potential: str = _setting(
        "difference", f"how a path's scores become its weight: {_listed(POTENTIALS)}"
    )
    resampler: str = _setting("ssp", f"resampling scheme: {_listed(RESAMPLERS)}")
    min_ess: float = _setting(
        1.0,
        "resample if the effective sample size is below this fraction of the particles; 0 only "
        "resamples where a funnel shrinks (without one it is best-of-k), 1 at every score",
    )
    num_scores: int = _setting(
        8, "maximum number of scored steps, 1 to 10000, besides the final image"
    )
    score_from: float = _setting(0.05, "first scored step, as a fraction of the executed steps")
    score_to: float = _setting(0.7, "last scored step, as a fraction of the executed steps")
    noise: float | None = _setting(
        None,
        "noise of each move: DDIM's eta (by default 1), or a fraction of sigma for flow models (by "
        "default 0.5)",
    )
    tempering: str = _setting("adaptive", f"schedule of λ: {_listed(TEMPERINGS)}")
    funnel: tuple[int, ...] = _setting(
        (),
        "number of particles after each of num_scores scored steps, such as 8,8,8,4,4,4,2,2; by "
        "default all are kept",
    )

    def __post_init__(self) -> None:
        _check_number("reward_scale", self.reward_scale, -LARGEST_SCALE, LARGEST_SCALE)
        _check_number("min_ess", self.min_ess, 0, 1)
        _check_number("score_from", self.score_from, 0, 1)
        _check_number("score_to", self.score_to, 0, 1)
        if self.noise is not None:
            _check_number("noise", self.noise, 0, 1)
        _check_name("potential", self.potential, POTENTIALS)
        _check_name("resampler", self.resampler, RESAMPLERS)
        _check_name("tempering", self.tempering, TEMPERINGS)
        if not is_count(self.num_scores) or self.num_scores > _MOST_SCORES:
            raise ValueError(
                f"num_scores is {self.num_scores!r:.80}: pass a whole number, 1 to {_MOST_SCORES} "
                "(min_ess=0 never resamples)"
            )
        if self.score_from > self.score_to:
            raise ValueError(
                f"score_from={self.score_from} is greater than score_to={self.score_to}, "
                "which leaves no step to score: swap them"
            )
        self._check_funnel()

    def _check_funnel(self) -> None:
        if not isinstance(self.funnel, tuple) or not all(map(is_count, self.funnel)):
            raise ValueError(
                f"funnel is {self.funnel!r:.80}: pass a tuple of populations, each 1 or more"
            )
        if any(a < b for a, b in zip(self.funnel, self.funnel[1:], strict=False)):
            raise ValueError(
                f"funnel={self.funnel} grows: a population can only shrink, "
                "so order it from the largest to the smallest"
            )
        if self.funnel and len(self.funnel) != self.num_scores:
            raise ValueError(
                f"funnel={self.funnel} has {len(self.funnel)} populations for num_scores="
                f"{self.num_scores}: pass one for each scored step"
            )


def scored_steps(num_steps: int, settings: FeynmanKac) -> tuple[int, ...]:
    """Return the indices of the scored steps: at most `num_scores`, evenly spaced, ascending.

    num_steps is the number of *executed* steps. The last step is never included, because its result
    is the final image, which is always scored. Raises ValueError if the window holds no step.
    """
    # The slack allows for fractions that are not exact: 0.7 * 10 is a little less than 7.
    first = math.ceil(settings.score_from * num_steps - 1e-9)
    last = min(math.floor(settings.score_to * num_steps + 1e-9), num_steps - 2)
    if last < first:
        raise ValueError(
            f"no step to score between score_from={settings.score_from} and "
            f"score_to={settings.score_to} of {num_steps} steps (the last step does not count): "
            "widen the window or use more steps"
        )
    count = min(settings.num_scores, last - first + 1)
    if count == 1:
        return (first,)
    gap = (last - first) / (count - 1)
    return tuple(first + math.floor(i * gap + 0.5) for i in range(count))


def population_sizes(k: int, num_scored: int, settings: FeynmanKac) -> tuple[int, ...]:
    """Return the number of particles after each scored step: the funnel, or always k.

    Raises ValueError if the funnel does not match k or the number of scored steps.
    """
    if not is_count(k):
        raise ValueError(f"the number of particles is {k!r:.80}: pass a whole number, 1 or more")
    if not settings.funnel:
        return (k,) * num_scored
    if len(settings.funnel) != num_scored:
        raise ValueError(
            f"funnel={settings.funnel} has {len(settings.funnel)} populations but only "
            f"{num_scored} steps are scored: shorten it and num_scores, or use more steps"
        )
    if settings.funnel[0] > k:
        raise ValueError(
            f"funnel={settings.funnel} grows from {k} particles to {settings.funnel[0]}: "
            f"start with {settings.funnel[0]} particles or lower the funnel"
        )
    return settings.funnel


def is_count(value: object) -> TypeGuard[int]:
    """Return whether `value` is an int of 1 or more, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_number(field: str, value: object, low: float, high: float) -> None:
    # a comparison is False for NaN; isfinite() would fail for a huge int
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not low <= number <= high:
        raise ValueError(f"{field} is {value!r:.80}: pass a number from {low:g} to {high:g}")


def _check_name(field: str, value: object, names: Collection[str]) -> None:
    if not isinstance(value, str) or value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "pass one of these"
        raise ValueError(f"{field} is {value!r:.80}, not one of {', '.join(names)}: {hint}")
