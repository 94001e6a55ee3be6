"""rollout.py, score.py and train_gdro.py after one another, on the embedded model."""

from __future__ import annotations

import gc
import math
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

import rewards
from finetune import checks, zero
from finetune.shards import Rollouts, Shard
from steering import tiny
from tilt import loading, training
from tilt.commands import rollout, score, train_gdro

CALL = ["--call.num-inference-steps=4", "--call.guidance-scale=1.0"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "prompts.txt").write_text('the word "CAT"\nthe word "SUN"\n')
    words = [f"--prompts={folder / 'prompts.txt'}", f"--out={folder / 'run'}", "--images=3", *CALL]
    assert rollout.main([*words, "--steered=2", "--reward=jpeg", "--filter.num-scores=1"]) == 0
    assert score.main([str(folder / "run"), "--reward", "jpeg", "--device", "cpu"]) == 0
    return folder


def test_every_shard_gets_its_rewards_once(scored, capsys):
    run = Rollouts(scored / "run")
    (shard,) = run.shards
    columns = shard.rewards()
    assert set(columns) == {"reward", "jpeg"}
    assert len(columns["reward"]) == 10
    assert shard.scored_by() == "jpeg"
    before = (shard.folder / "rewards.parquet").stat().st_mtime_ns
    again = [str(scored / "run"), "--reward", "jpeg", "--device", "cpu", "--resume"]
    assert score.main(again) == 0
    assert (shard.folder / "rewards.parquet").stat().st_mtime_ns == before


def never(*args, **kwargs):
    raise AssertionError("a model was loaded")


def test_rollouts_that_are_there_are_found_without_a_model(scored, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_pipeline", never)
    monkeypatch.setattr(rewards, "load", never)
    words = [f"--prompts={scored / 'prompts.txt'}", f"--out={scored / 'run'}", "--images=3", *CALL]
    words += ["--steered=2", "--reward=jpeg", "--filter.num-scores=1", "--resume"]
    assert rollout.main(words) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(scored / "run")
    with pytest.raises(AssertionError, match="was loaded"):  # it is asked what is different
        rollout.main([*words, "--seed=1"])


def test_the_bar_of_rollouts_counts_images(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text('the word "CAT"\n')
    words = [
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--out={tmp_path / 'run'}",
        "--images=2",
        *CALL,
    ]
    assert rollout.main(words) == 0
    bar = capsys.readouterr().err
    assert " 1/2 [" in bar
    assert " 2/2 [" in bar


def test_training_resumes_where_it_stopped_and_its_lora_loads(
    scored, tmp_path, capsys, monkeypatch
):
    common = [
        f"--rollouts={scored / 'run'}",
        "--gdro.groups=2",
        "--gdro.k=3",
        "--gdro.rank=2",
        "--log-every=1",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_gdro.main([*common, f"--out={whole}", "--gdro.steps=2"]) == 0
    assert train_gdro.main([*common, f"--out={parts}", "--gdro.steps=1"]) == 0
    assert train_gdro.main([*common, f"--out={parts}", "--gdro.steps=2", "--resume"]) == 0
    monkeypatch.setattr(loading, "load_pipeline", never)  # it is finished
    capsys.readouterr()
    assert train_gdro.main([*common, f"--out={parts}", "--gdro.steps=2", "--resume"]) == 0
    assert capsys.readouterr().out.endswith("pytorch_lora_weights.safetensors\n")
    with pytest.raises(AssertionError, match="was loaded"):
        train_gdro.main([*common, f"--out={parts}", "--gdro.steps=3", "--resume"])
    monkeypatch.undo()
    capsys.readouterr()
    assert train_gdro.main([*common, f"--out={parts}", "--gdro.steps=1", "--resume"]) == 2
    assert "has taken 2 steps already, more than steps=1" in capsys.readouterr().err
    (parts / "state.pt").unlink()  # as it is advised, to begin anew
    assert train_gdro.main([*common, f"--out={parts}", "--gdro.steps=2", "--resume"]) == 0
    assert (parts / "state.pt").exists()
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len((whole / "log.csv").read_text().splitlines()) == 3
    pipe = tiny.load("tiny-sd3")
    pipe.load_lora_weights(whole / "lora")


def test_checks_choose_the_weights_and_a_card_tells_of_them(scored, tmp_path, capsys):
    (tmp_path / "unseen.txt").write_text('the word "OWL"\n')
    words = [
        *(
            f"--rollouts={scored / 'run'}",
            f"--out={tmp_path / 'out'}",
            "--gdro.groups=2",
            "--gdro.k=3",
        ),
        *(
            "--gdro.steps=6",
            "--gdro.rank=2",
            "--check.every=2",
            "--check.images=2",
            "--check.patience=1",
        ),
        *(
            f"--check.prompts={tmp_path / 'unseen.txt'}",
            "--check.train-prompts=1",
            "--gdro.lr=1e-30",
        ),
    ]
    assert train_gdro.main(words) == 0
    out = tmp_path / "out"
    rows = checks.read(out / "checks.csv")
    # no new best: the weights move by less than any product shows
    assert "stopped at step" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [0, 2]
    assert sorted(file.name for file in (out / "grids").iterdir()) == ["000000.png", "000002.png"]
    best = load_file(out / "best.safetensors")
    stored = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    for name, value in best.items():
        assert torch.equal(stored[f"transformer.{name.replace('.default.', '.')}"], value)
    told = (out / "lora" / "README.md").read_text()
    assert "base_model" not in told  # which the hub takes for a name of its own
    assert "# A LoRA for tiny-sd3" in told
    assert "those of step 0" in told
    assert (out / "lora" / "curves.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())


def test_prompts_that_are_trained_on_are_no_held_out_ones(scored, tmp_path, capsys):
    words = [
        f"--rollouts={scored / 'run'}",
        f"--out={tmp_path / 'out'}",
        "--gdro.k=3",
        "--check.every=1",
    ]
    assert train_gdro.main(words) == 2
    assert "needs --check.prompts" in capsys.readouterr().err
    assert train_gdro.main([*words, f"--check.prompts={scored / 'prompts.txt'}"]) == 2
    assert "training prompts, such as 'the word \"CAT\"'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_only_the_rollouts_say_is_not_imported(scored, tmp_path, capsys, monkeypatch):
    """Rollouts may be somebody's: a reward of theirs is code that nobody here has asked for."""
    monkeypatch.setattr(Shard, "scored_by", lambda self, column="": "clip(tiny) + os:getcwd")
    (tmp_path / "unseen.txt").write_text('the word "OWL"\n')
    words = [
        f"--rollouts={scored / 'run'}",
        f"--out={tmp_path / 'out'}",
        "--gdro.k=3",
        "--check.every=1",
    ]
    assert train_gdro.main([*words, f"--check.prompts={tmp_path / 'unseen.txt'}"]) == 2
    told = capsys.readouterr().err
    assert "the reward os:getcwd would import code" in told
    assert "--check.reward 'clip(tiny) + os:getcwd'" in told
    assert not (tmp_path / "out").exists()


def test_another_round_starts_from_the_lora_of_the_last(scored, tmp_path, capsys):
    words = [f"--rollouts={scored / 'run'}", "--gdro.k=3", "--gdro.groups=2", "--gdro.steps=1"]
    small = [*words, "--gdro.rank=2", "--gdro.lr=1e-2", "--log-every=1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_gdro.main([*small, f"--out={first}"]) == 0
    assert train_gdro.main([*small, f"--out={second}", f"--lora={first / 'lora'}"]) == 0
    (row,) = checks.read(second / "log.csv")
    assert row["loss"] == pytest.approx(math.log(6), abs=1e-4)  # its start is the reference
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (first, second))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert train_gdro.main([*small, "--out=x", f"--lora={first / 'lora'}", "--gdro.rank=3"]) == 2
    assert "another rank" in capsys.readouterr().err


def test_a_filter_that_cannot_work_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text('the word "CAT"\n')
    words = [
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--out={tmp_path / 'run'}",
        "--images=2",
        *CALL,
    ]
    steered = ["--steered=2", "--reward=jpeg", "--filter.noise=0"]
    assert rollout.main([*words, *steered]) == 2
    assert "noise=0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_in_a_sentence(scored, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks, "append", full)
    words = [
        f"--rollouts={scored / 'run'}",
        f"--out={tmp_path / 'out'}",
        "--gdro.k=3",
        "--log-every=1",
    ]
    assert train_gdro.main([*words, "--gdro.steps=2", "--gdro.groups=2"]) == 1
    assert "No space left on device; nothing is kept yet" in capsys.readouterr().err


WORDS = f"--prompts={Path(__file__).parents[1] / 'scripts/tiny/words.txt'}"


def refused(monkeypatch, message, **made):
    monkeypatch.setattr(training, "Accelerator", lambda **_: SimpleNamespace(**made))
    with pytest.raises(ValueError, match=message):
        training.accelerator_of(training.TrainingRun())


def test_fsdp_1_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    kind = DistributedType.FSDP
    refused(monkeypatch, "set fsdp_version: 2", distributed_type=kind, is_fsdp2=False, state=None)


def test_fsdp_rounds_neither_timesteps_nor_gradients(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = SimpleNamespace(auto_wrap_policy=object(), mixed_precision_policy=object())
    made = {"distributed_type": DistributedType.FSDP, "is_fsdp2": True}
    made |= {"state": SimpleNamespace(fsdp_plugin=plugin)}
    monkeypatch.setattr(training, "Accelerator", lambda **_: SimpleNamespace(**made))
    training.accelerator_of(training.TrainingRun())
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize(
    ("stage", "offload", "precision", "message"),
    [
        (3, "none", "no", "stage 3.*fsdp_version: 2"),
        (2, "cpu", "no", "offload_optimizer_device is 'cpu'"),
        (2, "none", "bf16", "weights to bf16; set mixed_precision: 'no'"),
    ],
)
def test_deepspeed_that_would_train_something_else_is_refused(
    stage, offload, precision, message, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}}}
    plugin = SimpleNamespace(deepspeed_config=config)
    refused(
        monkeypatch,
        message,
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        mixed_precision=precision,
    )


def test_deepspeed_with_an_optimiser_of_8_bits_is_refused():
    with pytest.raises(ValueError, match="eight_bit=true does not work with DeepSpeed"):
        zero.configure(None, max_grad_norm=1.0, count=1, eight_bit=True)


def test_neither_decoder_nor_text_encoder_is_resident(scored, tmp_path, monkeypatch):
    parts, alive = [], []

    def load(*arguments, **components):
        pipe = loading.load_pipeline(*arguments, **components)
        parts.extend(weakref.ref(part) for part in (pipe.vae, pipe.text_encoder, pipe.transformer))
        return pipe

    def look(*_, **__):
        gc.collect()
        alive.extend(part() is not None for part in parts)

    monkeypatch.setattr(training, "loading", SimpleNamespace(**vars(loading)))
    monkeypatch.setattr(training.loading, "load_pipeline", load)
    monkeypatch.setattr(training, "loop", look)
    words = [f"--rollouts={scored / 'run'}", f"--out={tmp_path / 'out'}", "--gdro.k=3"]
    assert train_gdro.main([*words, "--gdro.steps=1", "--gdro.groups=2"]) == 0
    assert alive == [False, False, True]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (rollout, [], "set --prompts FILE and --out FOLDER"),
        (rollout, ["images=3"], "'images=3' belongs to no option: write --images 3"),
        (rollout, ["--imags=3"], "did you mean --images?"),
        (rollout, ["--prompts=nowhere.txt", "--out=x"], "nowhere.txt"),
        (rollout, ["--prompts=nowhere.txt", "--out=x", "--steered=4"], "belong together"),
        (
            rollout,
            [WORDS, "--out=x", "--call.seed=3"],
            "--call.seed is not a keyword of the pipeline",
        ),
        (rollout, [WORDS, "--out=x", "--call.particles=3"], "--call.particles is not a keyword"),
        (train_gdro, [], "set --rollouts FOLDER and --out FOLDER"),
        (train_gdro, ["--rollouts=nowhere", "--out=x"], "holds no rollouts"),
        (train_gdro, ["--gdro.bta=3"], "did you mean --gdro.beta?"),
        (train_gdro, ["--gdro.k=1"], "k is 1"),
        (train_gdro, ["--check.images=0"], "images is 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    script, words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert script.main(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_the_example_trains_goes_on_and_gives_what_the_command_gives(scored, tmp_path, monkeypatch):
    example = Path(__file__).parents[1] / "scripts/examples/train_in_ten_lines.py"
    mine, told = tmp_path / "mine", tmp_path / "told"
    for steps in (2, 4):  # the second time it goes on
        text = example.read_text(encoding="utf-8").replace("steps=4", f"steps={steps}")
        (tmp_path / "example.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["example.py", str(scored / "run"), str(mine)])
        runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    text = example.read_text(encoding="utf-8").replace("resume=True", "resume=False")
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="holds a run; pass resume=True"):
        runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    words = [f"--rollouts={scored / 'run'}", f"--out={told}", "--gdro.groups=2", "--gdro.k=2"]
    assert train_gdro.main([*words, "--gdro.steps=4"]) == 0
    one, two = (load_file(next((f / "lora").glob("*.safetensors"))) for f in (mine, told))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["step"] for row in checks.read(mine / "log.csv")] == [1, 2, 3, 4]
