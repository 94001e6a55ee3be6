"""Rewards made of rewards: their formulas, gradients, ranges, and what they do with references."""

import itertools
import math
import statistics

import pytest
import torch
from colour_channels import BLUE, GREEN, HERE, IMAGES, PARTS, PROMPTS, RED, N, load, values
from PIL import Image
from torch import Tensor

import rewards
from rewards.algebra import aggregate, shape
from rewards.images import to_images, to_uint8

SEVERAL = (
    "mean({r}, {g}, 2*{b})",
    "median({r}, {g}, {b})",
    "median({r}, {g})",
    "min({r}, {g}, {b})",
    "lcb({r}, {g}, {b}, kappa=0.7)",
    "harmonic({w}, {g}, weight=0.3)",
    "harmonic({r}, {g}, {b})",
    "log_sigmoid({r}, {g}, ref=0.4)",
    "log_sigmoid({r})",
    "uncertainty({r}, {g}, -1*{b}, penalty=0.5)",
)


SINGLE = (
    "clip_above({r} + {g}, at=0.99)",
    "par({r}, ref=0.25)",
    "augmented({r} - {g}, draws=3, crop=0.3, jitter=0.2)",
    "augmented(min({r}, {g}), flip=true)",
)


def by_hand(formula, *channels: Tensor) -> Tensor:
    rows = torch.stack(channels, 1).double().tolist()
    return torch.tensor([formula(*row) for row in rows])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_every_aggregator_is_tested_here_or_in_calibrate():
    named = {spec.partition("(")[0] for spec in SEVERAL + SINGLE}
    assert named | {"calibrated", "delta"} == set(rewards.aggregators())


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("mean({r}, {g}, {b})", lambda *x: statistics.fmean(x)),
        ("mean({r}, 2*{g})", lambda r, g, b: (r + 2 * g) / 2),
        ("median({r}, {g}, {b})", lambda *x: statistics.median(x)),
        ("median({r}, {g})", lambda r, g, b: (r + g) / 2),
        ("min({r}, {g}, {b})", min),
        ("min({r} + {g}, 3*{b})", lambda r, g, b: min(r + g, 3 * b)),
        (
            "lcb({r}, {g}, {b}, kappa=2)",
            lambda *x: statistics.fmean(x) - 2 * statistics.pstdev(x),
        ),
        ("lcb({r}, {g}, kappa=0)", lambda r, g, b: (r + g) / 2),
        ("harmonic({r}, {g}, {b})", lambda *x: statistics.harmonic_mean(x)),
        (
            "log_sigmoid({r}, {g}, ref=0.4)",
            lambda r, g, b: math.log(sigmoid(r - 0.4) * sigmoid(g - 0.4)),
        ),
        (
            "uncertainty({r}, {g}, penalty=0.5)",
            lambda r, g, b: (r + g) / 2 * math.exp(-abs(r - g)) - 0.5 * abs(r - g),
        ),
        ("clip_above({r}, at=0.5)", lambda r, g, b: min(r, 0.5)),
        ("par({r}, ref=0.25)", lambda r, g, b: sigmoid(r - 0.25)),
    ],
)
def test_formulas(spec, formula):
    torch.testing.assert_close(
        values(spec), by_hand(formula, RED, GREEN, BLUE).float(), atol=1e-6, rtol=1e-5
    )


def test_harmonic_is_the_published_reward_of_two_cosines():
    # Miao et al. 2024: 1 / (λ / ((1 + i2i)/2) + (1 - λ) / ((1 + t2i)/2))
    i2i, t2i = 2 * RED - 1, 2 * GREEN - 1
    expected = 1 / (0.3 / ((1 + i2i) / 2) + 0.7 / ((1 + t2i) / 2))
    spec = f"harmonic(i={HERE}:Channel(0, -1, 1), t={HERE}:Channel(1, -1, 1), weight=0.3)"
    torch.testing.assert_close(values(spec), expected, atol=1e-6, rtol=1e-5)


def test_uncertainty_is_ctrl_u_with_the_sign_of_a_reward():
    # Zhang et al. 2025, eq. 3, of a loss L >= 0: L·exp(-U) + λU
    loss, other = 1 - RED, 1 - GREEN
    doubt = (loss - other).abs()
    expected = -((loss + other) / 2 * torch.exp(-doubt) + 0.3 * doubt)
    spec = f"uncertainty(x={HERE}:Channel(0, -1, 0), y={HERE}:Channel(1, -1, 0), penalty=0.3)"
    torch.testing.assert_close(values(spec), expected, atol=1e-6, rtol=1e-5)


def test_disagreement_is_the_mean_over_all_pairs():
    pairs = [(RED - GREEN).abs(), (RED - BLUE).abs(), (GREEN - BLUE).abs()]
    doubt = torch.stack(pairs).mean(0)
    expected = (RED + GREEN + BLUE) / 3 * torch.exp(-doubt) - doubt
    torch.testing.assert_close(values("uncertainty({r}, {g}, {b})"), expected)


def test_a_score_of_zero_makes_the_harmonic_mean_zero():
    images = IMAGES.clone()
    images[0, 0] = 0
    images.requires_grad_(True)
    score = load("harmonic({r}, {g})")(images, PROMPTS)
    assert score[0] < 1e-6
    (gradient,) = torch.autograd.grad(score[0], images)
    # near 0 the harmonic mean of two is twice the smaller one
    torch.testing.assert_close(gradient[0, 0], torch.full((12, 10), 2 / 120))


@pytest.mark.parametrize("spec", [*SEVERAL, *SINGLE])
def test_gradients_are_the_slopes_and_stay_with_their_image(spec):
    reward = load(spec)
    assert reward.differentiable
    # away from 0 and 1, where a clamp would end the slope, and from ties
    images = 0.3 + 0.4 * IMAGES + torch.tensor([0.0, 0.1, -0.1])[:, None, None]
    images.requires_grad_(True)
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores[1], images)
    assert gradient[[0, 2, 3, 4]].abs().max() == 0
    step = torch.randn(3, 12, 10, generator=torch.Generator().manual_seed(1)) * 1e-2
    ahead, behind = images.detach().clone(), images.detach().clone()
    ahead[1] += step
    behind[1] -= step
    slope = (reward(ahead, PROMPTS)[1] - reward(behind, PROMPTS)[1]) / 2
    torch.testing.assert_close((gradient[1] * step).sum(), slope, atol=1e-6, rtol=2e-2)
    with torch.no_grad():
        assert not reward(images, PROMPTS).requires_grad


@pytest.mark.parametrize("spec", [*SEVERAL, *SINGLE])
def test_batches_and_order_do_not_change_a_score(spec):
    reward = load(spec)
    together = reward(IMAGES, PROMPTS)
    assert together.dtype == torch.float32
    alone = torch.cat([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)
    order = [4, 2, 0, 1, 3]
    mixed = reward(IMAGES[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(mixed, together[order], atol=1e-6, rtol=1e-5)
    assert reward(IMAGES[:0], []).shape == (0,)
    assert reward(IMAGES.bfloat16(), PROMPTS).dtype == torch.float32


@pytest.mark.parametrize("spec", [*SEVERAL, *SINGLE])
def test_the_text_form_gives_the_same_reward(spec):
    reward = load(spec)
    again = rewards.load(str(reward), imports=True)
    assert again == reward
    torch.testing.assert_close(again(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))
    inside = reward.parts[0].reward
    torch.testing.assert_close(
        rewards.load(inside.spec, imports=True)(IMAGES, PROMPTS), reward(IMAGES, PROMPTS)
    )


@pytest.mark.parametrize("spec", [*SEVERAL, *SINGLE])
def test_no_score_leaves_the_range(spec):
    reward = load(spec)
    low, high = reward.range
    assert low is not None
    assert high is not None
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
    images = corners[:, :, None, None].expand(-1, -1, 4, 4)
    scores = reward(images, [""] * len(images))
    assert scores.min() >= low - 1e-6
    assert scores.max() <= high + 1e-6


@pytest.mark.parametrize(
    ("spec", "range_"),
    [
        ("min(a={h}:Channel(0, -1, 1), b={h}:Channel(1, 0, 5))", (-1, 1)),
        ("min(jpeg, b={h}:Channel(1, 0, 5))", (None, 0)),
        ("min(jpeg(incompressibility), b={h}:Channel(1, 0, 5))", (0, 5)),
        ("mean(a={h}:Channel(0, -1, 1), b={h}:Channel(1, 0, 5))", (-0.5, 3)),
        ("mean(jpeg, b={h}:Channel(1, 0, 5))", (None, 2.5)),
        ("median(a={h}:Channel(0, -1, 1), {h}:noisy_size)", (None, None)),
        ("lcb(a={h}:Channel(0, -1, 1), b={h}:Channel(1, 0, 5), kappa=1)", (-3.5, 3)),
        ("clip_above(jpeg(incompressibility), at=3)", (0, 3)),
        ("clip_above({h}:noisy_size, at=3)", (None, 3)),
        ("par({h}:noisy_size, ref=3)", (0, 1)),
        ("delta(a={h}:Channel(0, -1, 3))", (-4, 4)),
        ("augmented(2*jpeg)", (None, 0)),
        ("-2*min(a={h}:Channel(0, -1, 1), b={h}:Channel(1, 0, 5))", (-2, 2)),
    ],
)
def test_ranges_follow_from_the_parts(spec, range_):
    assert rewards.load(spec.format(h=HERE), imports=True).range == pytest.approx(range_)


def test_what_holds_of_the_parts_holds_of_the_whole():
    assert not load("min({r}, jpeg)").differentiable
    assert load("min({r} + 0*jpeg, {g})").differentiable
    assert load("lcb({r}, {g}, 0*jpeg)").differentiable
    assert not load("min({r}, jpeg)").wants_references
    assert load(f"mean({{r}}, {HERE}:of_references)").wants_references
    assert load("delta({r})").wants_references
    assert load("par({r})").wants_references
    assert not load("par({r}, ref=0)").wants_references
    with pytest.raises(ValueError, match="quotes no text"):
        load("log_sigmoid(lcb({r}, ocr))").check(["a sign"])


def test_a_part_of_weight_zero_is_logged_only():
    total, components = load("mean({r}, {g}, 0*jpeg)").evaluate(IMAGES, PROMPTS)
    torch.testing.assert_close(total, (RED + GREEN) / 2)
    assert list(components) == ["mean", "r", "g", "jpeg"]
    assert (components["jpeg"] < 0).all()


@pytest.mark.parametrize(
    "spec",
    [
        *(spec.replace("{r}", "{n}").replace("{w}", "{n}") for spec in SEVERAL),
        "clip_above({n}, at=-1)",
        "par({n}, ref=0.5)",
        "augmented({n})",
    ],
)
def test_no_answer_of_a_part_is_no_answer_of_the_whole(spec):
    total, components = load(spec).evaluate(IMAGES, PROMPTS)
    bad = [False, False, True, False, False]
    assert total.isnan().tolist() == bad
    assert components["n"].isnan().tolist() == bad


def test_agreement_costs_nothing_and_has_a_gradient():
    grey = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    for spec in ("lcb({r}, {g}, kappa=3)", "uncertainty({r}, {g})"):
        score = load(spec)(grey, [""])
        torch.testing.assert_close(score, torch.tensor([0.5]))
        (gradient,) = torch.autograd.grad(score.sum(), grey)
        torch.testing.assert_close(gradient.sum((0, 2, 3)), torch.tensor([0.5, 0.5, 0.0]))


def test_aggregators_are_functions_of_loaded_rewards_too():
    r, g = (rewards.load(PARTS[key], imports=True) for key in "rg")
    made = aggregate.lcb(r, g, kappa=2)
    torch.testing.assert_close(made(IMAGES, PROMPTS), values("lcb({r}, {g}, kappa=2)"))
    assert rewards.load(made) == load("lcb({r}, {g}, kappa=2)")
    assert made.spec == str(load("lcb({r}, {g}, kappa=2)"))
    with pytest.raises(ValueError, match="two components are called 'r'"):
        aggregate.mean(r, r)
    with pytest.raises(ValueError, match=r"a part of mean is 'clip'; make it with rewards\.load"):
        aggregate.mean(r, "clip")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("harmonic({r}, {g}, weight=1.5)", "harmonic's weight is 1.5 but must be from 0 to 1"),
        ("harmonic({r}, jpeg)", r"calibrated\(jpeg, file=..., method=quantile\)"),
        ("uncertainty({r}, {g}, penalty=-1)", "penalty is -1 but must be 0 or more"),
        ("log_sigmoid({r}, ref=none)", "ref is None but must be a finite number"),
        ("clip_above({r}, at=none)", "at is None but must be a finite number"),
        ("clip_above({r}, at=no.json)", "no calibration file 'no.json'"),
        ("par({r}, ref=no.json)", "no calibration file 'no.json'"),
        ("par({r}, ref=true)", "ref is True"),
        ("augmented({r}, draws=0)", "draws is 0"),
        ("augmented({r}, draws=2.5)", "draws is 2.5"),
        ("augmented({r}, seed=-1)", "seed is -1"),
        ("augmented({r}, flip=1)", "flip is 1"),
        ("augmented({r}, crop=1)", "crop is 1 but must be from 0 to 0.9"),
        ("augmented({r}, jitter=2)", "jitter is 2"),
        ("augmented({r}, noise=-0.1)", "noise is -0.1"),
        ("delta(delta({r}))", "delta uses the references itself"),
        (f"par({HERE}:of_references)", "par uses the references itself"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load(spec)
    assert "\n" not in str(error.value)


def bases() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.rand(N, 3, 6, 7, generator=generator))


def test_delta_subtracts_the_score_of_the_base_picture():
    base = bases()
    expected = RED - torch.stack([x[0].mean() for x in base])
    total, components = load("delta({r})").evaluate(IMAGES, PROMPTS, references=base)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(components["r"], RED)
    same = load("delta({r})")(IMAGES, PROMPTS, references=list(IMAGES))
    torch.testing.assert_close(same, torch.zeros(N))


def test_an_entry_is_a_picture_or_several_of_any_kind():
    a, b = bases()[:2]
    pil = Image.fromarray(to_uint8(a[None])[0])
    wide = torch.rand(3, 5, 20, generator=torch.Generator().manual_seed(4))
    entries = [a, torch.stack([a, b]), [a, wide], pil, (pil, b)]
    red = [a[0].mean(), (a[0].mean() + b[0].mean()) / 2, (a[0].mean() + wide[0].mean()) / 2]
    p = to_images(pil)[0, 0].mean()
    expected = RED - torch.stack([*red, p, (p + b[0].mean()) / 2])
    torch.testing.assert_close(load("delta({r})")(IMAGES, PROMPTS, references=entries), expected)


def test_par_compares_with_the_scores_of_the_reference_pictures():
    entries = [torch.stack([x, x.flip(0)]) for x in bases()]
    score = load("par({r})")(IMAGES, PROMPTS, references=entries)
    own = [(sigmoid(r - x[0, 0].mean()) + sigmoid(r - x[1, 0].mean())) / 2 for r, x in
           zip(RED.tolist(), entries, strict=True)]  # fmt: skip
    torch.testing.assert_close(score, torch.tensor(own), atol=1e-6, rtol=1e-5)


def test_a_base_picture_that_rows_share_is_scored_once_and_has_no_gradient():
    reward = load("delta({r})")
    channel = reward.parts[0].reward.members[0].parts[0].reward
    a, b = (x.requires_grad_(True) for x in bases()[:2])
    images = IMAGES[:4].clone().requires_grad_(True)
    score = reward(images, ["x", "x", "y", "x"], references=[a, a, a, b])
    assert channel.calls == [4, 3]
    (gradient,) = torch.autograd.grad(score.sum(), images)
    torch.testing.assert_close(gradient[:, 0], torch.full((4, 12, 10), 1 / 120))
    assert not torch.autograd.grad(
        reward(images, ["x"] * 4, references=[a] * 4).sum(), [images, a], allow_unused=True
    )[1]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "but got none"),
        ([IMAGES[0]], "each of the 5 prompts, but got 1"),
        ([IMAGES[0]] * 4 + [[]], "an empty entry"),
        ([IMAGES[0] * 255] * 5, r"\[0, 1\]"),
    ],
)
def test_bad_references_are_refused(references, message):
    with pytest.raises(ValueError, match=message):
        load("delta({r})")(IMAGES, PROMPTS, references=references)
    assert load("delta({r})")(IMAGES[:0], []).shape == (0,)


def test_references_reach_parts_that_want_them():
    spec = f"min({HERE}:of_references, augmented(o={HERE}:of_references))"
    entries = [IMAGES[: i + 1] for i in range(N)]
    torch.testing.assert_close(
        values(spec, references=entries), torch.arange(1, N + 1, dtype=torch.float32)
    )


def test_a_reference_is_looked_at_by_shape_helpers_once_per_size():
    part = rewards.load(PARTS["r"], imports=True)
    small, large = torch.rand(2, 3, 4, 4), torch.rand(3, 3, 8, 8)
    found = shape.reference_scores("x", part, IMAGES[:2], ["a", "b"], [large, small])
    torch.testing.assert_close(found[0], large[:, 0].mean((1, 2)))
    torch.testing.assert_close(found[1], small[:, 0].mean((1, 2)))
    assert part.parts[0].reward.calls == [2, 3]


def test_references_that_are_made_anew_when_asked_for_are_told_apart():
    # the entries of an array are temporary objects, whose ids come again
    generator = torch.Generator().manual_seed(0)
    images, bases = torch.rand(2, 6, 3, 16, 16, generator=generator)
    reward = rewards.load("delta(clip(random:0))")
    prompts = ["a"] * 6
    as_array = reward(images, prompts, references=bases.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(as_array, reward(images, prompts, references=list(bases)))
