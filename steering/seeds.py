"""The noise of a run: one generator a particle, by what it is and not by where it runs."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from torch import Generator

from steering.arguments import MOST_PARTICLES, check_count, check_prompts, check_seed

__all__ = ["generator", "generators", "keys"]


def generators(seed: int, prompts: Sequence[str] | str, k: int) -> list[Generator]:
    """The b*k CPU generators of a run, prompt-major: one a particle.

    Each depends on the seed, its prompt's text, how often that text came before, and its index
    alone, so a prompt draws the same noise whatever else is in the call. Raises ValueError for
    what steer() refuses as seed, prompts or particles.
    """
    check_seed(seed)
    check_count("k", k, MOST_PARTICLES)
    prompts = check_prompts(prompts)
    return [generator(seed, key, i) for key in keys(prompts) for i in range(k)]


def keys(prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Of each prompt its text and how often that came before: what its noise depends on."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return found


def generator(seed: int, key: tuple[str, int], purpose: int | str) -> Generator:
    """The CPU generator of one prompt's particle (`purpose` its index) or of its resampling.

    key: as `keys` has it. Seeded by a hash of all three, the same on every machine.
    """
    digest = hashlib.sha256(repr((seed, *key, purpose)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big"))
