"""A reward in float64 is steered by in float64: λ r may differ where float32 sees one number."""

import json
from typing import Any

import pytest
import tiny_pipelines as tp
import torch
from torch import Tensor

import rewards
from rewards.algebra import calibrate
from steering import FeynmanKac, particle_filter, steer
from steering.filter import start, weigh
from steering.lineage import Lineage
from steering.result import Steered
from steering.transitions import Transition

# 1 + 2^-40 q, with q a multiple of 2^-9, is exact in float64 and 1 in float32; and 2^49 of it is
# a constant and 512 q, so that whatever weighs both alike decides the same, bit for bit
STEP, SMALL, SCALE = 2.0**9, 2.0**-40, 2.0**49


def quality(images: Tensor) -> Tensor:
    """Of images (n, 3, h, w): a multiple of 1/512 in [0, 1], float64."""
    return (images[:, 0, ::2].double().mean((1, 2)) * STEP).round() / STEP


def plain(images: Tensor, prompts: list[str]) -> Tensor:
    return quality(images)


def fine(images: Tensor, prompts: list[str]) -> Tensor:
    return 1 + SMALL * quality(images)


def run(reward, scale: float, potential: str = "difference") -> Steered:
    settings = FeynmanKac(
        reward_scale=scale, potential=potential, tempering="none", num_scores=3, min_ess=0.9
    )
    prompts = ["a cat", "a dog"]
    call: dict[str, Any] = {"num_inference_steps": 8, "height": 16, "width": 16, "progress": False}
    return steer(tp.sd(), prompts, reward, particles=6, settings=settings, **call)


@pytest.mark.parametrize("load", [lambda reward: reward, rewards.load])
def test_steering_by_differences_that_float32_does_not_see(load, tmp_path):
    wanted, out = run(load(plain), 512.0), run(load(fine), SCALE)
    assert (out.rewards.float() == 1).all()
    assert out.rewards.dtype == out.log_weights.dtype == out.log_z.dtype == torch.float64
    assert torch.equal((out.rewards - 1) / SMALL, wanted.rewards)
    assert torch.equal(
        out.log_weights - out.log_weights[:, :1], wanted.log_weights - wanted.log_weights[:, :1]
    )
    assert len(out.lineage.scores) == 3
    assert any(score.replaced.any() for score in out.lineage.scores)
    for mine, other in zip(out.lineage.scores, wanted.lineage.scores, strict=True):
        assert torch.equal(mine.ancestors, other.ancestors)
        assert torch.equal(mine.ess, other.ess)
        assert torch.equal((mine.rewards - 1) / SMALL, other.rewards)
        assert mine.rewards.dtype == mine.log_weights.dtype == torch.float64
    assert [row.tobytes() for row in out.best] == [row.tobytes() for row in wanted.best]
    torch.testing.assert_close(out.log_z - SCALE, wanted.log_z, atol=0.5, rtol=0)

    folder = out.save(tmp_path / "run")
    kept = json.loads((folder / "manifest.json").read_text())["results"]
    assert kept["rewards"] == out.rewards.tolist()
    assert kept["log_weights"] == out.log_weights.tolist()
    scores = json.loads((folder / "lineage.json").read_text())["scores"]
    assert [score["rewards"] for score in scores] == [
        s.rewards.tolist() for s in out.lineage.scores
    ]
    both = Lineage.join([out.lineage.prompt(0), out.lineage.prompt(1)])
    assert torch.equal(both.scores[0].rewards, out.lineage.scores[0].rewards)


def test_the_scale_is_not_rounded_on_the_way():
    settings = FeynmanKac(reward_scale=0.1, tempering="none")
    r = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    state = weigh(start(1, 2), r, settings, 0.5)
    assert state.scale.tolist() == [0.1]
    assert state.log_weights.tolist() == [[0.1, 0.2]]
    assert all(x.dtype == torch.float64 for x in (*state.history, state.anchor, state.log_z))
    again = weigh(state, r.float(), settings, 1.0)  # the better of the two stays
    assert again.log_weights.dtype == torch.float64


@pytest.mark.parametrize("tempering", ["none", "linear", "adaptive"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_a_chain_of_ones_own(potential, tempering):
    def walk(step: int, x: Tensor) -> Transition:
        return Transition(x, torch.tensor(1.0), x)

    def reward(x0: Tensor) -> Tensor:
        return 1 + 1e-12 * x0[..., 0].double().clamp(-3, 3)

    settings = FeynmanKac(
        reward_scale=1e12, potential=potential, tempering=tempering, min_ess=0.9, num_scores=2
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(2, 64, 1)
    *_, last = particle_filter(x, walk, reward, 5, settings, generator=generator)
    assert last.rewards is not None
    assert last.rewards.dtype == last.log_weights.dtype == last.log_z.dtype == torch.float64
    assert last.log_z.isfinite().all()
    assert last.log_weights.std(1).min() > 0  # weights tell apart what float32 would not


def double(images: Tensor, prompts: list[str]) -> Tensor:
    return 1 + 1e-12 * torch.arange(len(images), dtype=torch.float64)


def second(images: Tensor, prompts: list[str]) -> Tensor:
    return double(images, prompts)


IMAGES = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a"] * 4
HERE = f"{__name__}:double"


@pytest.mark.parametrize(
    "spec",
    [
        "{d}",
        "{d} + 0*jpeg",
        "{d} - 0.5*clip(random:0)",
        "mean({d}, jpeg)",
        "min({d}, 2*{e})",
        "median({d}, -1*{e}, jpeg)",
        "lcb({d}, {e})",
        "log_sigmoid({d})",
        "uncertainty({d}, {e})",
        "clip_above({d}, at=2)",
        "par({d}, ref=0.5)",
        "augmented({d}, draws=2)",
    ],
)
def test_rewards_of_rewards_keep_it(spec):
    spec = spec.format(d=HERE, e=f"{__name__}:second")
    total, parts = rewards.load(spec, imports=True).evaluate(IMAGES, PROMPTS)
    assert total.dtype == parts["double"].dtype == torch.float64
    assert parts["double"].tolist() == double(IMAGES, PROMPTS).tolist()
    if "jpeg" not in spec and "clip(" not in spec:
        assert len(set(total.tolist())) == len(IMAGES)


def test_calibration_tells_apart_what_float32_does_not(tmp_path):
    reward = rewards.load(HERE, imports=True)
    path = tmp_path / "scale.json"
    calibrate.save(path, calibrate.measure(reward, IMAGES, PROMPTS))
    for method in ("affine", "quantile"):
        scale = rewards.load(f"calibrated({HERE}, file={path}, method={method})", imports=True)
        scores = scale(IMAGES, PROMPTS)
        assert scores.dtype == torch.float64
        assert (scores.diff() > 0.1).all()


def test_float32_stays_what_it_was():
    total, parts = rewards.load("jpeg + clip(random:0)").evaluate(IMAGES, PROMPTS)
    assert {x.dtype for x in (total, *parts.values())} == {torch.float32}
    half = rewards.load(lambda images, prompts: images.half().mean((1, 2, 3)))
    assert half(IMAGES, PROMPTS).dtype == torch.float32
    for numbers in ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]):
        assert rewards.load(lambda i, p, n=numbers: n)(IMAGES, PROMPTS).dtype == torch.float32
    with pytest.raises(ValueError, match="complex"):
        rewards.load(lambda images, prompts: torch.ones(4) * 1j)(IMAGES, PROMPTS)
