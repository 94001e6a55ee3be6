"""Small mistakes that once went through without a word."""

import json

import pytest
import torch
from tiny_pipelines import family

import rewards
from steering import FeynmanKac, steer
from steering.filter import Transition, particle_filter
from tilt import training
from tilt.prompts import Prompt, read


def test_a_reward_whose_weights_are_all_0_is_refused():
    pipe, keywords = family("sd")
    for spec in ("0*jpeg", "0*jpeg + 0*clip(random:0)"):
        reward = rewards.load(spec)
        with pytest.raises(ValueError, match=r"every weight of the reward .*0\*jpeg.* is 0"):
            steer(pipe, "a", reward, 2, progress=False, **keywords)
        with pytest.raises(ValueError, match="every weight"):
            training.check_weights(reward)
    training.check_weights(rewards.load("jpeg + 0*clip(random:0)"))


def test_the_suffix_of_a_prompt_file_may_be_in_capitals(tmp_path):
    (tmp_path / "A.JSONL").write_text(json.dumps({"prompt": "a cat", "seed": 3}))
    assert read(tmp_path / "A.JSONL") == [Prompt("a cat", 3)]


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_an_empty_prompt_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="a prompt is empty"):
        Prompt(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text}))
    with pytest.raises(ValueError, match="line 1: a prompt is empty"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_kernels_std_that_is_none_is_refused(value):
    def kernel(step, x):
        return Transition(x, torch.tensor(value if step == 2 else 0.5), x)

    populations = particle_filter(
        torch.zeros(1, 4, 2),
        kernel,
        lambda x: x.sum(-1),
        5,
        FeynmanKac(num_scores=2),
        generator=torch.Generator().manual_seed(0),
    )
    with pytest.raises(ValueError, match="std at step 2 is negative or not finite"):
        list(populations)
