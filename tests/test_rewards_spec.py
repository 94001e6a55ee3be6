"""The text form of rewards, and the sums it describes."""

import subprocess
import sys

import pytest
import torch

import rewards
import rewards.algebra.aggregate
from rewards.combine import Part, WeightedSum, component_names, names_in
from rewards.evaluation_cache import shared
from rewards.spec import Call


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def lengths(images, prompts):
    return [len(prompt) for prompt in prompts]


def against(images, prompts, references=None):
    return (images - references).abs().mean((1, 2, 3))


def endless(images, prompts):
    return torch.full((len(images),), torch.inf)


class Scaled:
    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def __call__(self, images, prompts):
        return self.factor * images.mean((1, 2, 3))


HERE = __name__


IMAGES = torch.linspace(0, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


PROMPTS = ["a", "bcd"]


def test_total_is_the_weighted_sum_and_components_are_unweighted():
    reward = rewards.load(f"0.5*{HERE}:brightness - 2*{HERE}:lengths", imports=True)
    total, components = reward.evaluate(IMAGES, PROMPTS)
    assert list(components) == ["brightness", "lengths"]
    torch.testing.assert_close(components["lengths"], torch.tensor([1.0, 3.0]))
    expected = 0.5 * IMAGES.mean((1, 2, 3)) - 2 * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected)
    assert total.dtype == torch.float32


def test_a_weight_of_zero_is_reported_but_not_added():
    reward = rewards.load(f"{HERE}:brightness + 0*{HERE}:endless", imports=True)
    total, components = reward.evaluate(IMAGES, PROMPTS)
    torch.testing.assert_close(total, IMAGES.mean((1, 2, 3)))
    assert torch.isinf(components["endless"]).all()


def test_round_trip_through_str_gives_an_equal_reward():
    for text in (
        "0.5*jpeg + other=jpeg(incompressibility)",
        f"-{HERE}:Scaled(3) + 0*jpeg",
        "clip(random:0, scale=logit) + 1e-05*jpeg(mode=compressibility)",
    ):
        reward = rewards.load(text, imports=True)
        assert reward.spec == str(reward)
        again = rewards.load(reward.spec, imports=True)
        assert again == reward
        assert hash(again) == hash(reward)
        assert str(again) == str(reward)
        torch.testing.assert_close(again(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))
    assert rewards.load("jpeg") != rewards.load("2*jpeg")


def test_the_spec_keeps_the_arguments_that_the_name_leaves_out():
    reward = rewards.load("jpeg(mode=incompressibility)")
    assert (reward.name, reward.spec) == ("jpeg", "jpeg(mode=incompressibility)")


def test_mappings_callables_and_classes_load():
    by_name = rewards.load({"jpeg": 0.5, f"{HERE}:Scaled(3)": 2.0}, imports=True)
    total, components = by_name.evaluate(IMAGES, PROMPTS)
    torch.testing.assert_close(total, 0.5 * components["jpeg"] + 2 * components["Scaled"])
    torch.testing.assert_close(components["Scaled"], 3 * IMAGES.mean((1, 2, 3)))
    plain = rewards.load(brightness)
    assert plain.name == "brightness"
    assert plain.range == (None, None)
    assert not plain.differentiable
    assert rewards.load(str(plain), imports=True) == plain
    assert rewards.load(plain) is plain
    assert rewards.load(f"{HERE}:Scaled", imports=True).evaluate(IMAGES, PROMPTS)[0].shape == (2,)
    with pytest.raises(ValueError, match="callable"):
        rewards.load(3)  # pyright: ignore[reportArgumentType]


def test_references_reach_a_function_that_wants_them():
    reward = rewards.load(against)
    scores = reward(IMAGES, PROMPTS, references=IMAGES * 0.5)
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)) / 2)


def test_the_range_of_a_sum_follows_the_signs():
    assert rewards.load("2*clip(random:0)").range == (-2.0, 2.0)
    assert rewards.load("-2*jpeg").range == (0.0, None)
    assert rewards.load("clip(random:0) + jpeg").range == (None, 1.0)
    assert rewards.load("clip(random:0)").differentiable
    assert not rewards.load("clip(random:0) + jpeg").differentiable
    assert rewards.load("clip(random:0) + 0*jpeg").differentiable


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clp", "did you mean 'clip'"),
        ("zzz", "known are"),
        ("clip(sorce=tiny)", "did you mean 'source'"),
        ("clip(a, b, c, d, e)", "at most"),
        ("clip(random:0, source=tiny)", "twice"),
        ("clip(device=cpu)", "no argument 'device'"),
        ("clip(random:0, scale=cosin)", "did you mean 'cosine'"),
        ("jpeg(small)", "'small' is unknown"),
        ("jpeg + jpeg", "two components are called 'jpeg'"),
        ("jpeg + min(jpeg, b=jpeg)", "two components are called 'jpeg'"),
        ("min(jpeg, jpeg)", "two components are called 'jpeg'"),
        ("clip_above(jpeg, at=0) + clip_above(jpeg, at=1)", "two components are called 'jpeg'"),
        ("mni(jpeg, ocr)", "did you mean 'min'"),
        ("min", "min takes 2 or more rewards"),
        ("min()", "min takes 2 or more rewards"),
        ("min(jpeg + b=jpeg)", "got 1; separate them by commas"),
        ("min(jpeg, 0*b=jpeg)", "got 1 of a weight other than 0"),
        ("clip_above(at=1)", "clip_above takes one reward, .* but got 0"),
        ("clip_above(0*jpeg, at=1)", "always 0"),
        ("clip_above(jpeg)", "clip_above needs the argument at="),
        ("calibrated(jpeg)", "calibrated needs the argument file="),
        ("clip_above(jpeg, b=jpeg, at=1)", "clip_above takes one reward, .* but got 2"),
        ("lcb(jpeg, b=jpeg, kappa=-1)", "lcb's kappa is -1 but must be 0 or more"),
        ("lcb(jpeg, b=jpeg, kappa=big)", "lcb's kappa is 'big'"),
        ("lcb(jpeg, b=jpeg, kappa=true)", "lcb's kappa is True"),
        ("lcb(jpeg, b=jpeg, kappa=1e999)", "lcb's kappa is inf"),
        ("harmonic(jpeg, b=jpeg)", r"range \(None, 0.0\)"),
        ("1e999*jpeg", "must be finite"),
        ("no_such_module:f", "cannot be imported"),
        ("HPS_v3(random:0)", "no reward 'HPS_v3'; write hpsv3"),
        ("hpsv3(random:0, dtype=float64)", "the HPSv3 dtype 'float64' is unknown"),
        ("unifiedreward", r"write judge\(preset=unifiedreward, url=..., model=...\)"),
        ("unified_reward(7b)", "write judge"),
        ("hpsv2", r"write hps\(version=v2\)"),
        ("critic", r"needs its source, as in critic\(FOLDER\)"),
        ("remote", r"needs its url, as in remote\(http://HOST:PORT\)"),
        ("critic(batch_size=2)", "needs its source"),
        ("0.5*(clip + jpeg)", r"brackets alone hold no sum; .* as in 0.5\*mean\(clip, jpeg\)"),
        ("(clip + jpeg)*0.5", "brackets alone hold no sum"),
        ("jpeg - (clip)", "brackets alone hold no sum"),
        ("min(jpeg, (clip + ocr))", "brackets alone hold no sum"),
        ("clip(/nowhere)", "no CLIP folder '/nowhere'"),
        ("clip(3)", "source is 3"),
        ("clip(random:0, scale=3)", "scale 3 is unknown"),
        ("clip(random:0, batch_size=two)", "batch_size is 'two'"),
        ("ocr(3)", "mode 3 is unknown"),
        ("ocr(limit_side_len=big)", "limit_side_len is 'big'"),
        ("ocr(upscale=x)", "upscale is 'x'"),
        ("ocr(detect=no)", "detect is 'no'"),
        ("math:pi", "callable"),
        ("os:system", "the reward system must accept f"),
        (lambda images: images, "missing|too many"),
        (f"{HERE}:Scaled(1, 2)", r"Scaled\(1, 2\) cannot be made"),
        (f"{HERE}:Scaled(rate=2)", r"Scaled\(rate=2\) cannot be made"),
        (f"{HERE}:no_such_function", "cannot be imported"),
        ({"jpeg + jpeg": 1.0}, "is a sum"),
        ({}, "at least one"),
    ],
)
def test_bad_rewards_are_refused_in_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        rewards.load(spec, imports=True)
    assert "\n" not in str(error.value)


def test_a_reward_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="one number per image"):
        rewards.load(lambda images, prompts: images.mean())(IMAGES, PROMPTS)


def test_every_available_reward_and_aggregator_has_a_line():
    assert {"clip", "jpeg", "objects", "ocr"} <= set(rewards.available())
    assert {"min", "lcb", "calibrated"} <= set(rewards.aggregators())
    lines = [*rewards.available().values(), *rewards.aggregators().values()]
    assert all(line and "\n" not in line for line in lines)
    assert not set(rewards.available()) & set(rewards.aggregators())


def test_components_inside_an_aggregator_are_reported_after_it():
    reward = rewards.load(
        f"2*min({HERE}:brightness + 0*{HERE}:endless, {HERE}:lengths) - jpeg", imports=True
    )
    total, components = reward.evaluate(IMAGES, PROMPTS)
    assert list(components) == ["min", "brightness", "endless", "lengths", "jpeg"]
    brightness = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(components["brightness"], brightness)
    torch.testing.assert_close(components["lengths"], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(components["min"], brightness)
    torch.testing.assert_close(total, 2 * brightness - components["jpeg"])


def test_an_aggregator_of_one_reward_is_named_after_both():
    reward = rewards.load(
        "clip_above(jpeg, at=0) + 0.5*clip_above(b=jpeg(incompressibility), at=1)"
    )
    assert list(reward.components(IMAGES, PROMPTS)) == [
        "clip_above_jpeg",
        "jpeg",
        "clip_above_b",
        "b",
    ]
    assert rewards.load(str(reward), imports=True) == reward
    assert str(rewards.load("low=min(jpeg, b=jpeg)")) == "low=min(jpeg, b=jpeg)"


def test_a_component_without_an_answer_leaves_none_in_the_total():
    def unsure(images, prompts):
        return torch.tensor([torch.nan, 1.0])

    total = rewards.load(unsure, imports=True)(IMAGES, PROMPTS)
    assert total.isnan().tolist() == [True, False]


def test_components_of_one_sum_share_what_they_see():
    made = []

    class Seer:
        name, differentiable, range, wants_references = "seer", False, (None, None), False

        def __call__(self, images, prompts, *, references=None):
            def make():
                made.append(len(images))
                return images.mean((1, 2, 3))

            return shared("tower", images, make)

    parts = [Part(name, 1.0, Seer(), Call(name)) for name in "abc"]
    inside = rewards.algebra.aggregate.mean(WeightedSum(parts[:1]), WeightedSum(parts[1:2]))
    reward = WeightedSum([Part("mean", 1.0, inside, Call("mean")), parts[2]])
    reward(IMAGES, PROMPTS)
    assert made == [2]
    reward(IMAGES, PROMPTS)
    assert made == [2, 2]
    inside(IMAGES, PROMPTS)
    assert made == [2, 2, 2]


def test_import_is_light():
    heavy = ["open_clip", "rapidocr", "transformers", "diffusers", "torchvision", "steering"]
    code = (
        "import sys, rewards, rewards.models.clip, rewards.models.ocr, rewards.models.jpeg;"
        "from rewards.models import objects;"
        "from rewards.algebra import aggregate, augment, calibrate, shape;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_jpeg_sizes_are_ordered_and_signed():
    flat = torch.full((1, 3, 64, 64), 0.5)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = torch.cat([flat, noise])
    small = rewards.load("jpeg")(both, ["", ""])
    large = rewards.load("jpeg(incompressibility)")(both, ["", ""])
    torch.testing.assert_close(small, -large)
    assert 0.3 < large[0] < 1.5 < 3 < large[1] < 12  # kilobytes of 1000


@pytest.mark.parametrize(
    "spec",
    [
        "jpeg",
        "2*jpeg(incompressibility) - 0.5*ocr(mode=strict)",
        "jpeg=jpeg + mine=0*clip(tiny)",
        "min(b=jpeg, a=0.5*clip(tiny)) + 0*jpeg",
        "clip_above_jpeg=clip_above(jpeg, at=1.5)",
        "clip_above(jpeg + 0*clip(tiny), at=1.5)",
    ],
)
def test_a_spec_is_spelled_and_its_components_named_as_by_loading_it(spec):
    loaded = rewards.load(spec)
    assert rewards.spelled(spec) == loaded.spec
    assert names_in(loaded.spec) == component_names(loaded.parts)
