"""What things cost: the suite's JSON, what counts as slower, pipelines of published size."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import rewards
from scripts.benchmarks import cost, frontier, machine, sized, soak, speed
from scripts.benchmarks.speed import Timed
from steering import FeynmanKac


def test_slower_means_worse_by_more_than_the_spread_of_either():
    before = {
        "same": Timed([1.0, 1.1, 1.2]),
        "noisy": Timed([1.0, 1.1, 1.9]),
        "slow": Timed([1.0, 1.01, 1.02]),
        "fewer": Timed([1.8, 1.85, 1.9], higher_is_better=True),
        "better": Timed([2.0, 2.0, 2.0]),
        "gone": Timed([1.0]),
    }
    now = {
        "same": Timed([1.1, 1.2, 1.25]),
        "noisy": Timed([1.4, 1.5, 1.6]),
        "slow": Timed([1.1, 1.11, 1.12]),
        "fewer": Timed([1.4, 1.5, 1.6], higher_is_better=True),
        "better": Timed([1.0, 1.0, 1.0]),
        "new": Timed([9.0]),
    }
    assert speed.slower(before, now).keys() == {"slow", "fewer"}
    assert speed.slower(before, before) == {}


def fake_cases(values):
    return lambda pairs: {"a / b": lambda: values[:pairs]}


def test_a_run_is_written_and_a_later_one_compared(monkeypatch, tmp_path, capsys):
    file = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "cases", fake_cases([1.0, 1.02, 1.01]))
    speed.main(["--pairs", "3", "--out", str(file)])
    assert json.loads(file.read_text())["cases"]["a / b"]["values"] == [1.0, 1.02, 1.01]
    with pytest.raises(SystemExit) as same:
        speed.main(["--pairs", "3", "--against", str(file)])
    assert same.value.code == 0
    monkeypatch.setattr(speed, "cases", fake_cases([1.2, 1.22, 1.21]))
    with pytest.raises(SystemExit) as worse:
        speed.main(["--pairs", "3", "--against", str(file)])
    assert worse.value.code == 1
    assert "slower by more than the spread: a / b, 1.010 -> 1.210" in capsys.readouterr().out
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"device": "another"}))
    with pytest.raises(SystemExit, match="ratios of another device"):
        speed.main(["--against", str(file)])
    file.write_text("[]")
    with pytest.raises(SystemExit, match="no result of `bench speed`"):
        speed.main(["--against", str(file)])


def test_every_case_has_a_name_that_says_what_is_divided_by_what():
    assert all(" / " in name for name in speed.cases(3))


def small(name):
    model = sized.MODELS[name]
    if name == "sd35m":
        config = {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "caption_projection_dim": 16,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 16,
        }
    else:
        config = dict(model.config) | {
            "block_out_channels": (8, 16, 16) if name == "sdxl" else (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
        }
        if name == "sd15":
            config["down_block_types"] = ("CrossAttnDownBlock2D", "DownBlock2D")
            config["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
            config["attention_head_dim"] = 2
        else:
            config["attention_head_dim"] = (2, 2, 2)
            config["transformer_layers_per_block"] = (1, 1, 1)
    return dataclasses.replace(model, config=config)


@pytest.mark.parametrize(
    "name", ["sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd35m"))]
)
def test_a_pipeline_of_published_size_is_steered_by_embeddings(name, monkeypatch):
    monkeypatch.setitem(sized.MODELS, name, small(name))
    pipe, call, preview = sized.sized(name, torch.device("cpu"), torch.float32, side=64)
    call["num_inference_steps"] = 3
    case = cost.Case(pipe, call, rewards.load("jpeg"), 2, preview, 1)
    found = cost.measure(case, 1)
    assert len(found) == 1
    assert np.isfinite(found).all()
    assert min(cost.least(case, 1)) > 1


def test_the_least_cost_is_that_of_each_look_and_the_last():
    calls = []

    def reward(images, prompts):
        calls.append(tuple(images.shape))
        return images.mean((1, 2, 3))

    pipe, call, preview = cost.subject("tiny-sd", torch.device("cpu"), torch.float32)
    call["num_inference_steps"] = 2
    found = cost.least(cost.Case(pipe, call, reward, 3, preview, 4), 2)
    assert len(found) == 2
    assert calls == [(3, 3, 64, 64)] * 3 * 5  # a warm-up and two pairs


def test_frontier_counts_the_rows_that_are_evaluated():
    funnel = FeynmanKac(num_scores=2, score_from=0.25, score_to=0.5, funnel=(4, 2))
    point = frontier.Point(4, funnel, {"num_inference_steps": 4, "guidance_interval": (0.0, 0.5)})
    prompts = ["two red stars", "a blue circle"]
    _, rows, seconds = frontier.measured("tiny-sd3", "clip", prompts, 0, 2.0, point)
    # and once a run two calls of two guided rows, to see that prompts may share a call
    assert rows == 8 + 8 + 4 + 2 + 2 * 2 * 2 / len(prompts)
    assert seconds > 0


def test_best_of_n_costs_its_share_and_is_the_rival_of_no_fewer_evaluations(tmp_path):
    scores = np.linspace(0, 1, 32).reshape(2, 16).tolist()
    head = {"model": "m", "task": "ocr", "guidance_scale": 1.0, "prompts": 2, "seed": 0}
    rows = [
        head
        | {"point": name, "evaluations": cost, "seconds": 1.0, "rewards": scores}
        | {"held_out": scores}
        for name, cost in (("best of 16", 320.0), ("FK 16", 320.0), ("funnel 16 to 4", 180.0))
    ]
    found = frontier.summaries(rows)
    assert found["best of 4"]["evaluations"] == 80
    assert found["best of 1"]["values"][0].tolist() == [scores[0][0], scores[1][0]]
    assert frontier.rival(found, 180) == "best of 10"
    assert frontier.rival(found, 20) == "best of 1"
    assert "| funnel 16 to 4 | 180 | 0.56 |" in frontier.table(rows)
    frontier.figure(rows, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0


def test_a_soak_prints_memory_on_the_way(capsys):
    soak.main(["--prompts", "2", "--particles", "1", "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["1", "2"]
    assert machine.resident() > 100
