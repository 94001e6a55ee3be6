"""Checks of argument types and ranges, made before any work starts.

Each failed check raises a ValueError whose one sentence says what was given and what is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeGuard

from torch import Generator, Tensor

from steering.settings import FeynmanKac, is_count

__all__ = [
    "MOST_FRAMES",
    "MOST_PARTICLES",
    "MOST_PIXELS",
    "MOST_STEPS",
    "check_callable",
    "check_count",
    "check_filter",
    "check_generator",
    "check_prompts",
    "check_seed",
    "check_settings",
    "check_steer",
]

# Far above any useful value, and far below what would exhaust memory before the first step: each
# particle has its own latents and a generator of 5 kB.
MOST_PARTICLES = 10_000
MOST_STEPS = 10_000
MOST_FRAMES = 10_000  # per video
MOST_PIXELS = 16_384  # per side of the image


def check_count(name: str, value: object, most: int | None = None, also: str = "") -> None:
    """Raise ValueError unless `value` is an int from 1 to `most`; also: what else may be passed."""
    if not is_count(value) or (most is not None and value > most):
        wanted = f", 1 to {most}" if is_count(value) else " of 1 or more"
        raise ValueError(f"{name}={value!r:.80}: pass a whole number{wanted}{also}.")


def check_callable(name: str, value: object, wanted: str) -> None:
    """Raise ValueError unless `value` is callable; wanted: what to pass, for the message."""
    if not callable(value):
        raise ValueError(f"{name}={value!r:.80}: pass {wanted}.")


def check_seed(seed: object, name: str = "seed") -> None:
    """Raise ValueError unless `seed` is a whole number from 0 to 2**63 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"{name}={seed!r:.80}: pass a whole number from 0 to 2**63 - 1.")


def check_generator(generator: object) -> None:
    """Raise ValueError unless `generator` is a torch.Generator."""
    if not isinstance(generator, Generator):
        raise ValueError(
            f"generator={generator!r:.80}: pass a torch.Generator, such as "
            "torch.Generator().manual_seed(0)."
        )


def check_settings(settings: object) -> None:
    """Raise ValueError unless `settings` is a FeynmanKac."""
    if not isinstance(settings, FeynmanKac):
        raise ValueError(f"settings is a {type(settings).__name__}; pass FeynmanKac(...).")


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """Return the prompts as a tuple; a str is one prompt. ValueError for none, or for non-text."""
    if isinstance(prompts, str):
        return (prompts,)
    unordered = isinstance(prompts, Mapping | Set)
    texts = tuple(prompts) if isinstance(prompts, Iterable) and not unordered else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts={prompts!r:.80}: pass one text or more.")
    return texts


def check_filter(
    x: object,
    kernel: object,
    reward: object,
    num_steps: object,
    settings: object,
    generator: Any,
    on_the_way: object = None,
) -> None:
    """Check the arguments of particle_filter()."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"x is {kind}: pass a tensor of floats (prompts, particles, *shape)")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: pass (prompts, particles, *shape)")
    check_callable("kernel", kernel, "a function of (step, x) that returns a Transition")
    scout = reward if on_the_way is None else on_the_way
    for name, function in (("reward", reward), ("on_the_way", scout)):
        check_callable(name, function, "a function of x0 that returns (prompts, particles) scores")
    check_count("num_steps", num_steps)
    check_settings(settings)
    check_generator(generator)


def check_steer(
    *,
    num_prompts: int,
    particles: object,
    settings: object,
    seed: object,
    decode: object,
    max_batch: object,
    prompts_per_call: object,
    progress: object,
    references: object,
    preview_size: object,
    guidance_interval: object,
    watch: object,
    only: object,
) -> None:
    """Check each argument of steer_each() that can be checked without the others."""
    check_settings(settings)
    check_count("particles", particles, MOST_PARTICLES)
    check_seed(seed)
    check_count("prompts_per_call", prompts_per_call)
    if max_batch is not None and not (isinstance(max_batch, str) and max_batch == "auto"):
        check_count("max_batch", max_batch, also=', or "auto"')
    if decode is not None:
        wanted = "a function from latents to images (n, 3, h, w) in [0, 1], or None"
        check_callable("decode", decode, wanted)
    if watch is not None:
        check_callable("watch", watch, "a function of a Moment, or None")
    if not isinstance(progress, bool):
        raise ValueError(f"progress={progress!r:.80}: pass True or False.")
    if not (references is None or isinstance(references, str) or _is_list(references)):
        raise ValueError(
            f"references={references!r:.80}: pass a list, one entry per prompt, or the name of the "
            'call\'s keyword that holds the image, as "image".'
        )
    _check_share(preview_size)
    _check_interval(guidance_interval)
    if only is not None:
        _check_only(only, num_prompts)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_only(only: Any, num_prompts: int) -> None:
    indices: tuple[Any, ...] = tuple(only) if _is_list(only) else (None,)
    if not all(type(i) is int and 0 <= i < num_prompts for i in indices):
        raise ValueError(
            f"only={only!r:.80}: pass a list of indices of the prompts, 0 to {num_prompts - 1}."
        )


def _check_share(size: object) -> None:
    if not _is_number(size) or not 0 < size <= 1:
        raise ValueError(
            f"preview_size={size!r:.80}: pass a fraction of the image's sides, above 0 and at "
            "most 1."
        )


def _check_interval(interval: Any) -> None:
    ends = interval if isinstance(interval, tuple) and len(interval) == 2 else (1, 0)
    if not all(map(_is_number, ends)) or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(
            f"guidance_interval={interval!r:.80}: pass two increasing fractions of the run, such "
            "as (0.2, 0.7)."
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
