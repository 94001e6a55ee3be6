"""Rewards of sets: closed forms, torchmetrics, double loops, and leaving one out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from rewards import Reward
from rewards.sets import METRICS, SetReward, frechet, leave_one_out, mmd, vendi
from rewards.towers.sources import towers


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whitened(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Rows with mean exactly 0 and covariance exactly 1."""
    x = normal(n, d, seed=seed)
    x = torch.linalg.qr(x - x.mean(0)).Q
    return x * (n - 1) ** 0.5


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 2.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.25]).double()
    x, y = whitened(20, 3) * a, whitened(31, 3, seed=1) * b + shift
    expected = shift.square().sum() + (a - b).square().sum()
    torch.testing.assert_close(frechet(x, y), expected)
    torch.testing.assert_close(frechet(y, x), expected)


def test_frechet_of_commuting_gaussians_in_any_basis_is_the_closed_form():
    turn = torch.linalg.qr(normal(4, 4, seed=7)).Q
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([2.0, 2.0, 1.0, 7.0]).double()
    x, y = (whitened(9, 4) * a) @ turn, (whitened(50, 4, seed=3) * b) @ turn
    torch.testing.assert_close(frechet(x, y), (a - b).square().sum())


class Flat(torch.nn.Module):
    """Eight colour means as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, (1, 3))
        return pooled.flatten(1)[:, :8]


def test_frechet_equals_torchmetrics():
    generator = torch.Generator().manual_seed(2)
    real = torch.randint(0, 256, (40, 3, 4, 6), generator=generator, dtype=torch.uint8)
    fake = torch.randint(30, 200, (25, 3, 4, 6), generator=generator, dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 6)).set_dtype(
        torch.float64
    )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet(Flat()(fake), Flat()(real))
    torch.testing.assert_close(ours, metric.compute().double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(5, 7, 40), (5, 300, 40), (60, 3, 20), (2, 2, 3)])
def test_frechet_without_full_rank_equals_roots_by_eigenvectors(n, m, d):
    x, y = normal(n, d), normal(m, d, seed=1) * 2 + 1

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    a, b = x.T.cov(), y.T.cov()
    inner = root(a) @ b @ root(a)
    cross = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    torch.testing.assert_close(frechet(x, y), expected, rtol=1e-6, atol=1e-6)


def test_a_set_is_at_no_distance_from_itself():
    x = normal(6, 30)
    assert frechet(x, x).item() == pytest.approx(0, abs=1e-10)
    assert mmd(x, x).item() == pytest.approx(0, abs=1e-10)
    constant = torch.ones(4, 3)
    assert frechet(constant, constant + 2) == 12


def test_mmd_is_the_double_loop():
    x, y = normal(4, 5), normal(6, 5, seed=1) + 1

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        values = [math.exp(-sum((a[i] - b[j]).square().tolist()) / (2 * 10.0**2)) for i, j in pairs]
        return sum(values) / len(values)

    for unbiased in (False, True):
        within = mean(x, x, unbiased) + mean(y, y, unbiased)
        expected = 1000 * (within - 2 * mean(x, y, False))
        assert mmd(x, y, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-9)
    assert mmd(x, y, sigma=1.0, scale=1.0).item() < 2
    assert mmd(x, y).item() != pytest.approx(mmd(x, y, sigma=9.0).item(), rel=1e-3)


def test_unbiased_mmd_of_equal_laws_is_0_on_average():
    values = torch.stack(
        [
            mmd(normal(8, 3, seed=s), normal(8, 3, seed=1000 + s), sigma=1.0, unbiased=True)
            for s in range(300)
        ]
    )
    assert values.mean().abs() < 4 * values.std() / 300**0.5
    assert values.min() < 0


def test_vendi_counts_the_different_pictures():
    assert vendi(3 * torch.eye(7, 9)).item() == pytest.approx(7)
    assert vendi(torch.ones(7, 9)).item() == pytest.approx(1)
    pairs = torch.eye(4).repeat_interleave(torch.tensor([2, 2, 2, 2]), 0)
    assert vendi(pairs).item() == pytest.approx(4)
    uneven = torch.eye(2).repeat_interleave(torch.tensor([3, 1]), 0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi(uneven).item() == pytest.approx(math.exp(entropy))


def test_vendi_is_the_entropy_of_the_kernels_eigenvalues():
    x = torch.nn.functional.normalize(normal(12, 5), dim=1)
    values = torch.linalg.eigvalsh(x @ x.T / 12).clamp(min=1e-300)
    assert vendi(x * 5).item() == pytest.approx((-values * values.log()).sum().exp().item())


DISTANCES = {"frechet": frechet, "mmd": mmd, "vendi": lambda x, y: -vendi(x)}


@pytest.mark.parametrize("metric", METRICS)
def test_a_contribution_is_the_reward_with_the_picture_minus_without(metric):
    x, y = normal(6, 4), normal(9, 4, seed=1) * 2 + 0.5
    found = METRICS[metric](None if metric == "vendi" else y)(x)
    for i in range(6):
        rest = torch.cat([x[:i], x[i + 1 :]])
        expected = DISTANCES[metric](rest, y) - DISTANCES[metric](x, y)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def test_leave_one_out_keeps_the_order():
    torch.testing.assert_close(
        leave_one_out(lambda x: x.sum(), torch.tensor([[1.0], [5.0], [2.0]])),
        torch.tensor([1.0, 5.0, 2.0]),
    )


@pytest.mark.parametrize("metric", ["frechet", "mmd"])
def test_an_outlier_contributes_least(metric):
    y = normal(50, 4)
    x = torch.cat([normal(9, 4, seed=1), torch.full((1, 4), 8.0, dtype=torch.float64)])
    found = METRICS[metric](y)(x)
    assert found.argmin() == 9
    assert found[9] < 0


def test_a_copy_adds_less_diversity_than_a_new_picture():
    x = torch.eye(4)[[0, 1, 1, 2]]
    found = METRICS["vendi"](None)(x)
    assert found[[1, 2]].max() < found[[0, 3]].min()


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
def test_a_set_reward_scores_pictures_through_a_tower(metric):
    tower = towers("random:0")
    images, others = pictures(5), pictures(6, seed=1)
    reward = SetReward(tower, metric, None if metric == "vendi" else others, batch_size=2)
    assert isinstance(reward, Reward)
    before = images.clone()
    scores = reward(images.requires_grad_(True), ["a"] * 5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert torch.equal(images, before)
    x, y = (tower.image_features(z).detach().double() for z in (images, others))
    expected = METRICS[metric](None if metric == "vendi" else y)(x)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-6)
    order = [4, 2, 0, 1, 3]
    torch.testing.assert_close(
        reward(images[order], ["a"] * 5), scores[order], rtol=1e-4, atol=1e-6
    )
    assert reward(images[:0], []).shape == (0,)


def test_references_are_features_pictures_or_captions():
    tower = towers("random:0")
    images, captions = pictures(4), ["a cat", "two dogs", "a star"]
    scores = SetReward(tower, "mmd", captions)(images, [""] * 4)
    given = SetReward(tower.image_features, "mmd", tower.text_features(captions))
    torch.testing.assert_close(given(images, [""] * 4), scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SetReward(towers("random:0"), "fid", pictures(3)), "unknown; take"),
        (lambda: SetReward(towers("random:0"), "mmd"), "compares with references"),
        (lambda: SetReward(towers("random:0"), "vendi", pictures(3)), "takes no references"),
        (lambda: SetReward(lambda x: x.flatten(1), "mmd", ["a"]), "captions if"),
        (lambda: SetReward(towers("random:0"), "mmd", "a cat"), "a list of captions"),
        (lambda: SetReward(towers("random:0"), "mmd", pictures(3) * 2), r"in \[0, 1\]"),
        (lambda: METRICS["frechet"](normal(9, 4))(normal(2, 4)), "at least 3 rows"),
        (lambda: METRICS["vendi"](None)(normal(1, 4)), "at least 2 rows"),
        (lambda: frechet(normal(3, 4), normal(1, 4)), "at least 2 rows"),
        (lambda: frechet(normal(3, 4), normal(3, 5)), "4 and 5 dimensions"),
        (lambda: mmd(normal(3, 4), normal(3, 5)), "4 and 5 dimensions"),
        (lambda: mmd(normal(3, 4), normal(3, 4) / 0), "not finite"),
        (lambda: vendi(torch.zeros(3, 4)), "image 0 are all 0"),
        (lambda: vendi(torch.ones(4)), "shape"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
