"""Resamplers: their supports, means and variances, and the float traps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering import resampling
from steering.resampling import RESAMPLERS

DRAWS = 20_000
UNEVEN = torch.tensor([0.02, 0.31, 0.0, 0.17, 0.05, 0.25, 0.15, 0.05], dtype=torch.float64)

every_scheme = pytest.mark.parametrize("name", list(RESAMPLERS))
weight_lists = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1), st.integers(1, 4).map(float)),
    min_size=1,
    max_size=30,
).filter(any)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(ancestors: Tensor, k: int) -> Tensor:
    """(b, num) -> (b, k)."""
    return torch.nn.functional.one_hot(ancestors, k).sum(dim=1)


def draw_counts(name: str, weights: Tensor, num: int, draws: int = DRAWS, seed: int = 0) -> Tensor:
    batch = weights.expand(draws, -1)
    return counts(RESAMPLERS[name](batch, num, seeded(seed)), weights.shape[-1]).double()


@every_scheme
@pytest.mark.parametrize("num", [3, 8, 13])
def test_each_particle_has_its_share_of_children_on_average(name: str, num: int) -> None:
    drawn = draw_counts(name, UNEVEN, num)
    error = drawn.std(dim=0) / math.sqrt(DRAWS)
    assert ((drawn.mean(dim=0) - num * UNEVEN).abs() <= 4 * error + 1e-12).all()


@every_scheme
@given(values=weight_lists, num=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_support(name: str, values: list[float], num: int, seed: int) -> None:
    weights = torch.tensor([values], dtype=torch.float64)
    ancestors = RESAMPLERS[name](weights, num, seeded(seed))
    assert ancestors.shape == (1, num)
    assert ancestors.dtype == torch.int64
    children = counts(ancestors, len(values))[0]
    assert (children[weights[0] == 0] == 0).all()
    expected = num * weights[0] / weights.sum()
    whole = expected.round()
    # An expected number within round-off of an integer is that integer.
    expected = torch.where((expected - whole).abs() < 1e-9, whole, expected)
    if name in ("systematic", "ssp"):
        assert ((children == expected.floor()) | (children == expected.ceil())).all()
    if name == "residual":
        assert (children >= expected.floor()).all()
    if name == "stratified":
        assert ((children - expected).abs() < 2).all()


def test_multinomial_counts_have_the_binomial_variance() -> None:
    drawn = draw_counts("multinomial", UNEVEN, 8, seed=1)
    variance = 8 * UNEVEN * (1 - UNEVEN)
    squares = (drawn - 8 * UNEVEN) ** 2
    error = squares.std(dim=0) / math.sqrt(DRAWS)
    assert ((squares.mean(dim=0) - variance).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("name", ["residual", "stratified", "ssp"])
def test_variance_is_at_most_the_multinomial_one(name: str) -> None:
    # Theorems of Douc & Cappé (2005), and for ssp of Gerber, Chopin & Whiteley (2019). There is
    # none for systematic, nor an order among these three.
    values = torch.randn(20, 8, dtype=torch.float64, generator=seeded(2))  # 20 test functions
    drawn = draw_counts(name, UNEVEN, 8, seed=3) @ values.T / 8
    multinomial = (UNEVEN * values**2).sum(dim=1) - (UNEVEN * values).sum(dim=1) ** 2
    squares = (drawn - drawn.mean(dim=0)) ** 2
    error = squares.std(dim=0) / math.sqrt(DRAWS)
    assert (squares.mean(dim=0) <= multinomial / 8 + 4 * error).all()


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual", "ssp"])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 10, 49, 100])
def test_equal_weights_keep_every_particle_in_its_place(name: str, k: int) -> None:
    weights = torch.softmax(torch.full((200, k), 0.7), dim=1)
    assert torch.equal(RESAMPLERS[name](weights, k, seeded()), torch.arange(k).expand(200, k))


@every_scheme
def test_a_sole_survivor_fathers_everyone(name: str) -> None:
    weights = torch.tensor([[0.0, 0, 1, 0]]).expand(500, 4)
    assert (RESAMPLERS[name](weights, 6, seeded()) == 2).all()


@pytest.mark.parametrize("name", ["systematic", "residual", "ssp"])
def test_whole_shares_are_met_exactly(name: str) -> None:
    weights = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).expand(500, 4)
    children = counts(RESAMPLERS[name](weights, 8, seeded()), 4)
    assert torch.equal(children, torch.tensor([[1, 4, 2, 1]]).expand(500, 4))


@every_scheme
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_extreme_uniforms_never_reach_a_particle_without_weight(
    name: str, extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extreme_uniforms(weights: Tensor, num: int, generator: object) -> Tensor:
        return torch.full((weights.shape[0], num), extreme, dtype=torch.float64)

    monkeypatch.setattr(resampling, "_uniforms", extreme_uniforms)
    weights = torch.softmax(torch.randn(300, 50, generator=seeded(4)), dim=1)
    # In float32 the cumulated weights often end short of 1, past which a uniform would fall.
    assert (weights.cumsum(dim=1)[:, -1] < 1).any()
    weights[:, 0] = weights[:, -1] = weights[:, 20] = 0
    ancestors = RESAMPLERS[name](weights, 50, seeded())
    children = counts(ancestors, 50)
    assert (children[weights == 0] == 0).all()
    assert (children.sum(dim=1) == 50).all()


@every_scheme
def test_a_prompt_gets_the_same_ancestors_alone_or_among_others(name: str) -> None:
    weights = torch.softmax(torch.randn(4, 8, generator=seeded(5)), dim=1)
    together = RESAMPLERS[name](weights, 8, [seeded(i) for i in range(4)])
    for i in range(4):
        alone = RESAMPLERS[name](weights[i : i + 1], 8, [seeded(i)])
        assert torch.equal(alone[0], together[i])


@every_scheme
def test_nothing_is_read_from_the_device(name: str) -> None:
    # A tensor on "meta" has no values: reading one, or branching on one, raises.
    weights = torch.empty(3, 8, device="meta")
    generators = [seeded(i) for i in range(3)]
    assert RESAMPLERS[name](weights, 5, generators).shape == (3, 5)


def test_a_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 prompts"):
        RESAMPLERS["ssp"](torch.ones(3, 4), 4, [seeded(), seeded()])
