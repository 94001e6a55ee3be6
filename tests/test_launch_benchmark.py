"""The benchmark of two processes, at its smallest."""

import pytest

from scripts.benchmarks import processes


@pytest.mark.slow
def test_both_sides_of_a_pair_are_drawn():
    found = processes.measure(pairs=1, prompts=2)
    assert found.keys() == {"second", "CPU second"}
    assert all(0 < ratio < 10 for (ratio,) in found.values())


@pytest.mark.parametrize("prompts", [1, 3])
def test_prompts_that_two_cannot_share_evenly_are_refused(prompts):
    with pytest.raises(ValueError, match="even number"):
        processes.measure(1, prompts)
