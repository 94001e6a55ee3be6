"""The benchmarks run, train and resume: small sizes of what the README's commands call."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import rewards
from finetune import checks
from finetune.gdro import Gdro
from finetune.grpo import Grpo
from rewards.images import to_images
from scripts.benchmarks import (
    adversarial,
    cost,
    foresight,
    gpu,
    lift,
    networks,
    online,
    training,
    tuning,
)
from scripts.tiny import styles
from scripts.tiny.fit import fit, split
from scripts.tiny.world import COLOURS, TASKS, render
from steering import FeynmanKac

# of the published configurations
UNET = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
LESS = {
    "sd15": UNET
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    },
    "sdxl": UNET
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4),
    },
    "sd35m": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "dual_attention_layers": (0,),
    },
}


def test_cost_runs_both_sides_of_a_pair():
    pipe, call, preview = cost.subject("tiny-sd3", torch.device("cpu"), torch.float32)
    (ratio,) = cost.measure(cost.Case(pipe, call, rewards.load("jpeg"), 2, preview, 2), 1)
    assert np.isfinite(ratio)


@pytest.mark.parametrize("name", list(networks.MODELS))
@pytest.mark.parametrize("method", training.METHODS)
def test_networks_of_published_size_are_trained_without_their_encoders(name, method, monkeypatch):
    """On pictures of 64 pixels, with fewer layers: what is tried is how they are put together."""
    published = networks.MODELS[name]
    small = dataclasses.replace(published, config={**published.config, **LESS[name]}, side=64)
    monkeypatch.setitem(networks.MODELS, name, small)
    learns, bare, decoder = training.trainer_of(name, method)
    seen = learns.train_step()
    assert all(np.isfinite(value) for value in seen.values())
    bare()
    assert all(weight.grad is None for weight in learns.learner.weights.values())
    assert (decoder is None) == (method == "gdro")


@pytest.mark.slow
def test_the_gpus_file_is_written_section_by_section(tmp_path, monkeypatch, capsys):
    def fails(device):
        sys.stdout.write("| one |\n")
        raise RuntimeError("too hot")

    def few(*given):
        pipe, keywords, preview = subject(*given)
        return pipe, keywords | {"num_inference_steps": 6}, preview

    subject = cost.subject
    monkeypatch.setattr(cost, "subject", few)
    monkeypatch.setitem(gpu.SECTIONS, "cost", fails)
    out = tmp_path / "gpu.md"
    with pytest.raises(SystemExit) as left:
        gpu.main(["--device", "cpu", "--out", str(out), "--only", "cost", "parity", "memory"])
    assert left.value.code == 1
    text = out.read_text()
    assert text.index("| one |") < text.index("too hot") < text.index("## parity")
    assert text.count("| yes |") == 8
    assert "NO" not in text


def test_the_gpus_micro_batches_are_documented():
    for name, method, less in gpu.MICRO_BATCHES:
        assert float(gpu.documented(name, method, less).split(" | ")[-1].rstrip(" |")) > 3
    with pytest.raises(ValueError, match="no row of sd15, gdro2"):
        gpu.documented("sd15", "gdro2", True)


def test_best_of_fewer_particles_is_read_off_the_larger_run():
    row = {"rewards": [[0.1, 0.9, 0.5], [0.3, 0.2, 0.8]], "held_out": [[1, 0, 0], [0, 1, 1]]}
    assert lift.chosen([row], 1).tolist() == [[0.1, 0.3], [1, 0]]
    assert lift.chosen([row], 2).tolist() == [[0.9, 0.3], [0, 0]]
    assert lift.chosen([row], 3).tolist() == [[0.9, 0.8], [0, 1]]


def test_settings_are_read_from_words():
    settings = lift.parse_settings(
        ["potential=max", "reward_scale=5", "funnel=[4,2]", "num_scores=2"]
    )
    assert settings == FeynmanKac(potential="max", reward_scale=5, funnel=(4, 2), num_scores=2)


def test_prompts_that_settings_are_chosen_on_are_not_the_reported_ones():
    for task in lift.TASKS:
        test, tune = (set(lift.prompts_of(task, 60, split)) for split in ("test", "tune"))
        assert len(test) == len(tune) == 60
        assert not test & tune


def test_foresight_correlates_within_prompts_alone():
    final = np.array([[0.0, 1.0], [5.0, 6.0]])
    assert foresight.correlation(final, final + np.array([[3.0], [-4.0]])) == pytest.approx(1)
    assert foresight.correlation(final, np.array([[1.0, 0.0], [2.0, 1.0]])) == pytest.approx(-1)
    assert foresight.correlation(final, np.array([[1.0, 1.0], [2.0, 2.0]])) == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_sees_inner_weights_and_their_gradients_as_matrices_of_the_same_memory(layout):
    inner = nn.Conv2d(16, 24, 3).to(memory_format=layout)
    modules = nn.ModuleDict({"inner": inner, "conv_in": nn.Conv2d(16, 16, 3)})
    matrices, others = split(modules)
    ((weight, matrix),) = matrices.items()
    assert weight is inner.weight
    assert len(others) == 3
    assert matrix.shape == (24, 16 * 9)
    with torch.no_grad():
        matrix.copy_(torch.arange(matrix.numel()).view_as(matrix))
    assert inner.weight.unique().numel() == matrix.numel()
    assert torch.equal(inner.weight[3].flatten().sort().values, matrix[3])


def test_training_writes_a_checkpoint_and_goes_on_from_it(tmp_path):
    line = nn.Linear(1, 1)
    modules = nn.ModuleDict({"line": line})
    start = line.weight.detach().clone()

    def loss(generator):
        return line(torch.randn(8, 1, generator=generator)).square().mean()

    sizes = {"batch": 8, "lr": 1e-2}
    first = fit(modules, loss, tmp_path, "a", minutes=0.01, **sizes)
    assert first["images"] > 0
    assert not torch.equal(line.weight, start)
    kept = line.weight.detach().clone()
    again = fit(modules, loss, tmp_path, "a", minutes=0, **sizes)
    assert again["images"] == first["images"]
    assert torch.equal(line.weight, kept)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_that_is_tested_was_tuned_on(task):
    tune, test = tuning.prompts_of(task)
    assert (len(tune), len(test)) == tuning.COUNTS[task]
    for tuned_on in (tune, tuning.prompts_of(task, turn=1)[0]):
        assert len({*tuned_on, *test}) == len(tuned_on) + len(test)
        if task == "text":
            quoted = [[prompt.split('"')[1] for prompt in prompts] for prompts in (tuned_on, test)]
            assert not set(quoted[0]) & set(quoted[1])
    assert tuning.prompts_of(task) == (tune, test)


def calls_of(trainer, bare):
    """The calls of the network in a step and in the bare step: (rows, whether with gradients)."""
    calls = []
    trainer.learner.bare.register_forward_hook(
        lambda _module, _args, output: calls.append((len(output[0]), torch.is_grad_enabled()))
    )
    trainer.train_step()
    own = list(calls)
    calls.clear()
    bare()
    return own, calls


def test_the_bare_step_is_the_networks_share_of_a_training_step():
    trainer = training.gdro_of("tiny-sd3", Gdro(groups=2, k=2, micro_groups=1))
    own, bare = calls_of(trainer, training.bare_gdro(trainer))
    assert bare == own == [(2, False), (2, True)] * 2


@pytest.mark.parametrize("start", [0, 1])
def test_the_bare_epoch_is_the_networks_share_of_one(start):
    settings = Grpo(groups=2, k=2, num_inference_steps=3, window_start=start, window_size=1)
    trainer, _ = training.grpo_of("tiny-sd3", settings)
    own, bare = calls_of(trainer, training.bare_grpo(trainer))
    assert sorted(bare) == sorted(own)
    assert own.count((2, True)) == 2


def test_a_measurement_of_training_has_a_ratio_for_each_pair(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(training, "seconds", lambda call: 2.0 + next(clock) % 2)
    found = training.measure("tiny-sd3", "gdro", 3)
    assert found["ratios"] == [2 / 3] * 3
    assert found["fraction"] == 1.5
    assert found["images_per_second"] == found["images_a_step"] / 2
    assert "| tiny-sd3 | gdro | 12.0 | 8.0 | 1.500 |" in training.row(found)


def test_what_surrounds_a_network_is_timed_without_it(monkeypatch):
    clock = iter([9.0, 0.002, 0.001, 0.003])  # seconds; the first prediction is a warm-up
    monkeypatch.setattr(training, "seconds", lambda call: (call(), next(clock))[1])
    fails = lambda *args, **kwargs: pytest.fail("the network computed")  # noqa: E731
    monkeypatch.setattr("diffusers.SD3Transformer2DModel.forward", fails)
    assert training.around("tiny-sd3", 3) == pytest.approx((2.0, 1.0))


def test_the_table_compares_runs_prompt_by_prompt():
    def row(name, tuned):
        span = {"low": 0.0, "high": 1.0}
        found = {
            "base": {"mean": {"mean": 0.25, **span}, "values": [0.0, 0.5]},
            "tuned": {
                "mean": {"mean": sum(tuned) / 2, **span},
                "difference": {"mean": 0.5, **span},
                "values": tuned,
            },
        }
        about = {"model": "m", "task": "words", "name": name, "seconds": 90.0}
        return about | {
            "measures": {"exact": {"variants": found}, "clip": {"variants": found}},
            "drift": 0.1,
        }

    *_, first, second = tuning.markdown(
        [row("default", [0.5, 1.0]), row("k=2", [0.25, 0.75])]
    ).splitlines()
    assert "| 1.5 | exact | 0.250 | 0.750 | +0.500 [+0.000, +1.000] |  |" in first
    assert "| -0.250 [-0.250, -0.250] |" in second


def test_a_curve_counts_the_seconds_of_images_and_steps_but_not_of_checks(tmp_path):
    (tmp_path / "gdro").mkdir()
    for name, seconds in (("rollouts", 50), ("scores", 10)):
        took = {"cpu": 1.0, "wall": float(seconds)}
        (tmp_path / f"gdro-{name}.time.json").write_text(json.dumps(took))
    for step, seconds in ((5, 1.0), (10, 3.0)):
        checks.append(tmp_path / "gdro" / "log.csv", {"step": step, "seconds": seconds})
    for step, reward in ((0, 0.5), (10, 0.7)):
        checks.append(tmp_path / "gdro" / "checks.csv", {"step": step, "held_out/reward": reward})
    rows = online.curve(tmp_path, "gdro")
    assert [row["seconds"] for row in rows] == [60, 60 + 5 * 1.0 + 5 * 3.0]
    assert online.reached(rows, 0.6) == pytest.approx(70)
    assert online.reached(rows, 0.8) is None


def test_references_are_in_their_style_and_show_what_the_world_shows():
    night = styles.scenes("night", 24, 0, adversarial.THINGS)
    images = to_images([render(drawn) for drawn in night])
    assert adversarial.in_style(images, "night") == 1
    plain = styles.scenes("plain", 24, 0, adversarial.THINGS)
    assert [drawn.prompt for drawn in plain] == [drawn.prompt for drawn in night]
    assert adversarial.in_style(to_images([render(drawn) for drawn in plain]), "night") < 0.6
    assert (rewards.load("objects")(images, [drawn.prompt for drawn in night]) == 1).all()


def test_letters_without_a_colour_take_one_that_shows():
    for drawn in styles.scenes("paper", 40, 0, ["text"]):
        assert drawn.ink in ("black", *COLOURS)
