"""What TILT_TEST does to the tests: rows of another batch differ, equal calls do not."""

import numpy as np
import processors
import pytest
import torch
from pictures import assert_same_picture


def test_noise_depends_on_the_shape_alone_and_stays_within_its_units():
    product = processors.noisy(torch.mul, 8)  # which is not noisy already
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(product(x, 1.0), product(x, 1.0))
    assert not torch.equal(product(x, 1.0)[:3], product(x[:3], 1.0))
    torch.testing.assert_close(product(x, 1.0), x, rtol=9 * 2**-23, atol=0)
    assert torch.equal(product(x.double(), 1.0), x.double())
    few = product(torch.ones(300, 5).bfloat16(), 1.0) != 1
    assert 0 < few.float().mean() < 0.05


def test_a_word_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="'thread'"):
        processors.act("thread=2")


def test_a_picture_is_another_one_by_two_levels_or_by_many_values():
    one = np.full((64, 64, 3), 100, np.uint8)
    other = one.copy()
    other[0, :40] += 1  # 120 of 12288 values
    assert_same_picture(one, other)
    other[0, 0, 0] += 1
    with pytest.raises(AssertionError, match="2 grey levels"):
        assert_same_picture(one, other)
    other = one.copy()
    other[:2] += 1
    with pytest.raises(AssertionError, match="% of the values"):
        assert_same_picture(one, other)
