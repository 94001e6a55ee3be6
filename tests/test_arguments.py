"""What the libraries refuse by itself, before any work: kinds, ranges and bounds."""

# pyright: reportArgumentType=false

import inspect
import math
from typing import Any, Literal

import pytest
import torch
from chains import gaussian_kernel, linear, seeded
from diffusers import DDIMScheduler, StableDiffusionPipeline

from steering import FeynmanKac, generators, particle_filter
from steering.arguments import check_steer
from steering.keywords import check_keywords
from steering.particles import refuse_overflow
from steering.schedulers import stochastic
from steering.scoring import PromptScorer
from tilt.loading import pick_device, pick_dtype

STEER = {
    "num_prompts": 2, "particles": 2, "settings": FeynmanKac(), "seed": 0, "decode": None,
    "max_batch": "auto", "prompts_per_call": 1, "progress": True, "references": None,
    "preview_size": 1.0, "guidance_interval": (0.0, 1.0), "watch": None, "only": None,
}  # fmt: skip


def test_what_steer_takes_is_taken():
    check_steer(**STEER)
    assert set(STEER) == set(inspect.signature(check_steer).parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("particles", value) for value in (0, -1, 1.5, True, "2", None, 10**7, 10**400)),
        *(("seed", value) for value in (-1, 2**63, None, "x", 1.5, [1], True)),
        *(("max_batch", value) for value in (0, "all", 1.5, False, torch.zeros(2))),
        *(("prompts_per_call", value) for value in (0, None, 2.0)),
        *(("only", value) for value in (0, "01", [2], [-1], [True], [0.0], {0})),
        *(("guidance_interval", v) for v in (None, (0, 2), (0.5, 0.5), ("a", "b"), (0, math.nan))),
        *(("preview_size", value) for value in (0, 2, "1", None, True, math.nan)),
        ("references", 5), ("references", {"a": 1}), ("watch", 5), ("decode", "vae"),
        ("progress", "no"), ("settings", None), ("settings", FeynmanKac),
    ],
)  # fmt: skip
def test_steer_refuses_and_names(name, value):
    with pytest.raises(ValueError, match=f"^{name}( is |=).*pass "):
        check_steer(**STEER | {name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"potential": ["max"]},
        {"resampler": None},
        {"tempering": {}},
        {"reward_scale": 1e39},  # not finite in float32
        {"reward_scale": 10**400},
        {"min_ess": True},
        {"num_scores": "8"},
        {"funnel": "4,2"},
        {"noise": [0.5]},
        {"score_from": None},
    ],
)
def test_fields_of_another_type_are_refused(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name} is .*(pass |did you mean )"):
        FeynmanKac(**fields)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": None}, "settings is a NoneType; pass FeynmanKac"),
        ({"x": [[0.0]]}, "x is a list: pass a tensor"),
        ({"x": torch.zeros(1, 2, dtype=torch.int64)}, r"x is of torch.int64"),
        ({"kernel": 5}, "kernel=5"),
        ({"reward": "linear"}, "reward='linear'"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"generator": 0}, "generator=0: pass a torch.Generator"),
    ],
)
def test_particle_filter_refuses_before_the_first_step(changed, said):
    arguments = {"x": torch.zeros(1, 4), "kernel": gaussian_kernel, "reward": linear}
    arguments |= {"num_steps": 20, "settings": FeynmanKac(), "generator": seeded()}
    with pytest.raises(ValueError, match=said):
        particle_filter(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kernel": lambda step, x: x}, "the kernel returned a Tensor at step 0"),
        ({"reward": lambda x0: 1.0}, "the reward returned a float at step"),
    ],
)
def test_what_the_functions_of_a_filter_return_is_looked_at(changed, said):
    arguments = {"x": torch.zeros(1, 4), "kernel": gaussian_kernel, "reward": linear}
    arguments |= {"num_steps": 4, "settings": FeynmanKac(score_to=1.0), "generator": seeded()}
    with pytest.raises(ValueError, match=said):
        list(particle_filter(**arguments | changed))


def test_a_scale_that_overflows_with_these_rewards_is_said():
    """λ alone is finite in float32, and so is each reward."""
    huge = FeynmanKac(reward_scale=1e30, score_to=1.0)
    arguments = {"x": torch.zeros(1, 4), "kernel": gaussian_kernel, "num_steps": 4}
    with pytest.raises(ValueError, match=r"reward_scale=1e\+30 times .* lower reward_scale"):
        list(
            particle_filter(
                reward=lambda x: linear(x) + 1e20, settings=huge, generator=seeded(), **arguments
            )
        )
    with pytest.raises(ValueError, match=r"reward_scale=1e\+30 times .* lower reward_scale"):
        refuse_overflow(torch.tensor([[0.0, math.inf]]), huge)


@pytest.mark.parametrize("reward", [len, lambda images: images, lambda a, b, c: a])
def test_a_reward_that_cannot_be_called_so_is_refused(reward):
    with pytest.raises(ValueError, match=r"cannot be called as f\(images, prompts\)"):
        PromptScorer(reward, ["a"], None)


@pytest.mark.parametrize("scores", [None, "high", [["a"]], {"a": 1}])
def test_what_a_reward_returns_is_looked_at(scores):
    judge = PromptScorer(lambda images, prompts: scores, ["a"], None)
    with pytest.raises(ValueError, match="return 2 numbers, one per image"):
        judge.score(torch.zeros(2, 3, 4, 4), [0])


@pytest.mark.parametrize("arguments", [(2**63, ["a"], 1), (0, [1], 1), (0, [], 1), (0, ["a"], 0)])
def test_generators_refuses(arguments):
    with pytest.raises(ValueError, match=": pass "):
        generators(*arguments)


def test_one_text_is_one_prompt_for_generators_too():
    assert len(generators(0, "abc", 2)) == 2


@pytest.mark.parametrize(
    "arguments", [(5,), (DDIMScheduler(), "half"), (DDIMScheduler(), 0.5, 7), (None, None, [1])]
)
def test_stochastic_refuses(arguments):
    with pytest.raises(ValueError, match=r"pass |outside \[0, 1\]"):
        stochastic(*arguments)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("guidance_scale", ["7", None, True, [7.0], math.nan], [7, 7.5]),
        ("height", [64.0, "64", True], [64, None]),
        ("negative_prompt", [5, [5], {"a": 1}], ["x", ["x"], None]),
        ("callback_on_step_end", [5, "f", [1]], [print, None]),
        ("cross_attention_kwargs", [5, "x", ["x"]], [{"scale": 0.5}, None]),
        ("sigmas", [0.5, "x", ["x"]], [[1.0, 0.5], torch.ones(2).numpy(), None]),
        ("timesteps", [3, ["x"], [math.nan]], [[3, 2], [3.5], None]),
        ("prompt_embeds", ["x", 5, {}], [torch.zeros(1, 2, 3).bfloat16(), None]),
        ("ip_adapter_image", [5, "x.png"], [torch.zeros(1), None]),
        ("clip_skip", ["1", 1.0], [1, None]),
    ],
)
def test_keywords_are_held_against_the_calls_annotation(name, bad, good):
    call = StableDiffusionPipeline.__call__
    check_keywords(call, dict.fromkeys([name], good[0]), "It")
    for value in good:
        check_keywords(call, {name: value}, "It")
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name}=.*: It takes "):
            check_keywords(call, {name: value}, "It")


def test_what_calls_take_beyond_their_annotations_is_let_pass():
    """No list (Sana's instruction), and a text for each prompt where one is annotated."""

    def call(many: list[str] = ["x"], one: str = "", timesteps: list[int] | None = None):  # noqa: B006
        pass

    for values in ({"many": None}, {"one": ["a", "b"]}, {"timesteps": [999.5]}):
        check_keywords(call, values, "It")
    for values in ({"many": 5}, {"many": [5]}, {"one": 5}, {"one": ["a", 5]}, {"one": None}):
        with pytest.raises(ValueError, match="It takes"):
            check_keywords(call, values, "It")


def test_an_annotation_that_says_nothing_takes_anything():
    def call(a: Any, b, c: list[Any] | None = None, d: Literal["x"] = "x"):
        pass

    for values in ({"a": 5}, {"b": 5}, {"c": [5]}, {"d": 5}):
        check_keywords(call, values, "It")


@pytest.mark.parametrize("name", ["meta", "mkldnn", "hpu", "nonsense", "", "cuda:99", None])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(ValueError, match="cannot be used here"):
        pick_device(name)


@pytest.mark.parametrize("name", ["foo", "float64", "", None])
def test_a_dtype_that_is_none_of_ours_is_refused(name):
    with pytest.raises(ValueError, match="pass one of auto, float32"):
        pick_dtype(name, torch.device("cpu"))
