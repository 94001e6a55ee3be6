"""The noise of a run: one generator per particle, independent of where the particle runs."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from torch import Generator

from steering.arguments import MOST_PARTICLES, check_count, check_prompts, check_seed

__all__ = ["generator", "generators", "keys"]


def generators(seed: int, prompts: Sequence[str] | str, k: int) -> list[Generator]:
    """Return the b*k CPU generators of a run, prompt-major: one per particle.

    Each depends only on the seed, its prompt's text, how often that text came before, and its
    index, so a prompt's noise does not depend on the other prompts. Raises ValueError for a seed,
    prompts or k that steer() would refuse.
    """
    check_seed(seed)
    check_count("k", k, MOST_PARTICLES)
    prompts = check_prompts(prompts)
    return [generator(seed, key, i) for key in keys(prompts) for i in range(k)]


def keys(prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Return for each prompt its text and how often that text came before it."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return found


def generator(seed: int, key: tuple[str, int], purpose: int | str) -> Generator:
    """Return the CPU generator of one particle (purpose: its index) or of a prompt's resampling.

    key: an entry of `keys`. The seed is a hash of all three, the same on every machine.
    """
    digest = hashlib.sha256(repr((seed, *key, purpose)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big"))
