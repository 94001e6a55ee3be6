"""The text form of rewards, and the sums it describes."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rewards
import rewards.algebra.aggregate
from rewards.combine import Part, WeightedSum, component_names, names_in
from rewards.evaluation_cache import shared
from rewards.spec import AGGREGATORS, Call, Term, aggregator, format_terms, parse


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


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("clip", [Term(Call("clip"))]),
        ("-clip", [Term(Call("clip"), -1.0)]),
        (
            "clip + 0.5*ocr(mode=strict)",
            [Term(Call("clip")), Term(Call("ocr", (), (("mode", "strict"),)), 0.5)],
        ),
        ("clip*2-1e-3*ocr", [Term(Call("clip"), 2.0), Term(Call("ocr"), -0.001)]),
        ("a - -0.5*b", [Term(Call("a")), Term(Call("b"), 0.5)]),
        ("a=clip(tiny)", [Term(Call("clip", ("tiny",)), 1.0, "a")]),
        ("a=2*clip + 3*b=clip", [Term(Call("clip"), 2.0, "a"), Term(Call("clip"), 3.0, "b")]),
        ("f(ViT-B-32/laion2b, x=-1)", [Term(Call("f", ("ViT-B-32/laion2b",), (("x", -1),)))]),
        ("f(1e-3, true, none, '1')", [Term(Call("f", (0.001, True, None, "1")))]),
        (r'f("a, b) \"c\"")', [Term(Call("f", ('a, b) "c"',)))]),
        ("0*mod.sub:Cls(3)", [Term(Call("mod.sub:Cls", (3,)), 0.0)]),
        ("f()", [Term(Call("f"))]),
        (
            "min(clip(tiny), 0.5*ocr(mode=strict))",
            [
                Term(
                    Call(
                        "min",
                        sums=(
                            (Term(Call("clip", ("tiny",))),),
                            (Term(Call("ocr", (), (("mode", "strict"),)), 0.5),),
                        ),
                    )
                )
            ],
        ),
        (
            "2*low=lcb(-clip + 0.3*ocr, b=par(a, ref=x.json), kappa=-1) - d",
            [
                Term(
                    Call(
                        "lcb",
                        (),
                        (("kappa", -1),),
                        (
                            (Term(Call("clip"), -1.0), Term(Call("ocr"), 0.3)),
                            (
                                Term(
                                    Call("par", (), (("ref", "x.json"),), ((Term(Call("a")),),)),
                                    1.0,
                                    "b",
                                ),
                            ),
                        ),
                    ),
                    2.0,
                    "low",
                ),
                Term(Call("d"), -1.0),
            ],
        ),
        ("min()", [Term(Call("min"))]),
        ("m:min(1)", [Term(Call("m:min", (1,)))]),
    ],
)
def test_parsing(text, terms):
    assert list(parse(text)) == terms
    assert parse(format_terms(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("clip+", "the end"),
        ("clip ocr", "between rewards"),
        ("2 clip", "after a weight"),
        ("2*3*clip", "name of a reward"),
        ("2*clip*3", "one weight"),
        ("clip(", "a value"),
        ("clip(a b)", "quote a value"),
        ("clip(a=1, a=2)", "only once"),
        ("clip(a=1, 2)", "after a named"),
        ("clip(1=2)", "a name instead of 1"),
        ("clip('open)", "a value"),
        ("__import__('os').system('x')", "between rewards"),
        ("min(a, b", "after a part of min"),
        ("min(a b)", "after a part of min"),
        ("min(a, b))", "between rewards"),
        ("min(a, b,)", "name of a reward"),
        ("min(a, 0.3)", "a reward, or name=value"),
        ("min(a, true)", "a reward, or name=value"),
        ("lcb(a, b, kapa=1)", "lcb has no argument 'kapa'; did you mean 'kappa'"),
        ("lcb(a, b, beta=1)", r"lcb has no argument 'beta'; it takes \['kappa'\]"),
        ("lcb(a, 2*kappa=b)", "lcb has no argument 'kappa'; did you mean 'kappa'"),
        ("lcb(a, kappa=1, b)", "come last"),
        ("lcb(a, b, kappa=1, kappa=2)", "only once"),
        ("calibrated(a, fil=a.json)", "did you mean 'file'"),
        ("lcbb(a + b, c)", "did you mean 'lcb'"),
    ],
)
def test_bad_specs_say_what_was_expected_where(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


VALUES = st.one_of(
    st.text(max_size=8),
    st.integers(-1000, 1000),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: name not in AGGREGATORS
)


def named(values):
    return st.dictionaries(NAMES, values, max_size=2).map(lambda found: tuple(found.items()))


CALLS = st.builds(
    Call,
    NAMES,
    st.lists(VALUES, max_size=2).map(tuple),
    named(VALUES),
)
WEIGHTS = st.floats(-1e6, 1e6).map(lambda weight: weight + 0.0)  # no negative zero


def aggregates(calls):
    # an alias inside an aggregator must not look like one of its options
    aliases = st.one_of(st.just(""), NAMES.map(lambda name: f"own__{name}"))
    sums = st.lists(st.builds(Term, calls, WEIGHTS, aliases), min_size=1, max_size=3).map(tuple)

    def of(name):
        options = {key: VALUES for key in aggregator(name)[1]}
        return st.builds(
            Call,
            st.just(name),
            st.just(()),
            st.fixed_dictionaries({}, optional=options).map(lambda found: tuple(found.items())),
            st.lists(sums, max_size=3).map(tuple),
        )

    return st.sampled_from(sorted(AGGREGATORS)).flatmap(of)


NESTED = st.recursive(CALLS, aggregates, max_leaves=6)
TERMS = st.lists(
    st.builds(Term, NESTED, WEIGHTS, st.one_of(st.just(""), NAMES)), min_size=1, max_size=4
)


@given(TERMS)
def test_writing_and_reading_give_back_the_same_terms(terms):
    text = format_terms(tuple(terms))
    found = parse(text)
    assert found == tuple(terms)
    kinds = [[type(v) for v in term.call.args] for term in found]
    assert kinds == [[type(v) for v in term.call.args] for term in terms]


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
