"""Log-weights: exact values, then invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.weights import conditional_ess, ess, log_mean_exp, normalize

log_weight_lists = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40)


def as_row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 49, 1000])
@pytest.mark.parametrize("constant", [0.0, 1e4, -1e4])
def test_ess_of_equal_weights_is_exactly_k(k: int, constant: float) -> None:
    # Exactly: otherwise equal weights could count as "less than k".
    assert ess(torch.full((2, k), constant)).tolist() == [k, k]


def test_ess_of_a_single_weight_is_exactly_one() -> None:
    assert ess(torch.tensor([[0.0, -math.inf, -math.inf], [1e4, -1e4, 0.0]])).tolist() == [1, 1]


def test_ess_by_hand() -> None:
    # weights 1, 2, 3: (1 + 2 + 3)^2 / (1 + 4 + 9)
    assert ess(torch.tensor([1.0, 2.0, 3.0]).log()).item() == pytest.approx(36 / 14)


@given(log_weight_lists, st.floats(-1e4, 1e4))
def test_ess_stays_in_range_and_ignores_a_constant(values: list[float], constant: float) -> None:
    row = as_row(values)
    size = ess(row).item()
    assert 1 - 1e-12 <= size <= len(values) + 1e-9
    assert ess(row + constant).item() == pytest.approx(size, rel=1e-6)


@given(log_weight_lists)
def test_normalized_weights_sum_to_one(values: list[float]) -> None:
    weights = normalize(as_row(values))
    assert weights.sum().item() == pytest.approx(1)
    assert (weights >= 0).all()


@given(st.lists(st.floats(-300, 300), min_size=1, max_size=20))
def test_log_mean_exp_is_the_log_of_the_mean_of_the_exponentials(values: list[float]) -> None:
    top = max(values)
    expected = top + math.log(math.fsum(math.exp(v - top) for v in values) / len(values))
    assert log_mean_exp(as_row(values)).item() == pytest.approx(expected, abs=1e-9)


def test_extreme_log_weights_stay_finite() -> None:
    row = torch.tensor([[1e4, -1e4, 0.0, 1e4]])
    assert normalize(row).tolist() == [[0.5, 0, 0, 0.5]]
    assert ess(row).item() == 2
    assert log_mean_exp(row).item() == pytest.approx(1e4 - math.log(2))


def test_conditional_ess_of_equal_weights_is_the_ess_of_the_increments() -> None:
    increments = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = torch.full_like(increments, 3.0)
    torch.testing.assert_close(conditional_ess(flat, increments), ess(increments))


def test_conditional_ess_of_no_increment_is_k() -> None:
    log_weights = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = torch.full((5,), 8.0, dtype=torch.float64)
    torch.testing.assert_close(conditional_ess(log_weights, torch.zeros_like(log_weights)), full)


@pytest.mark.parametrize("function", [normalize, ess, log_mean_exp])
def test_half_precision_is_computed_in_float32_and_float64_is_kept(function) -> None:
    row = torch.tensor([[0.1, 0.2, -3.0]], dtype=torch.float64)
    assert function(row).dtype == torch.float64
    for half in (torch.float16, torch.bfloat16):
        assert function(row.to(half)).dtype == torch.float32
        assert torch.equal(function(row.to(half)), function(row.to(half).float()))
