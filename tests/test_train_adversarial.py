"""train_adversarial.py on the embedded model: it resumes, its LoRA loads, mistakes are refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_launch import logged

import rewards
from scripts import train_adversarial
from steering import tiny

SMALL = [
    *("reward=jpeg", "grpo.groups=2", "grpo.k=2", "grpo.rank=2", "grpo.num_inference_steps=3"),
    *("grpo.window_size=1", "log_every=1"),
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('the word "CAT"\nthe word "SUN"\n')
    return [f"prompts={file}"]


def test_a_run_resumes_and_its_lora_loads(prompts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*prompts, *SMALL, "grpo.guidance_scale=2"]
    assert train_adversarial.main([*words, f"out={whole}", "grpo.steps=2"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "grpo.steps=1"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "grpo.steps=1"]) == 2
    assert train_adversarial.main([*words, f"out={parts}", "grpo.steps=2", "resume=true"]) == 0
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = logged(whole)
    assert [row["ratio"] for row in rows] == [1.0, 1.0]
    assert rows == logged(parts)
    tiny.load("tiny-sd3").load_lora_weights(whole / "lora")
    assert "rewards: `jpeg`" in (whole / "lora" / "README.md").read_text()


def test_a_run_of_nft_resumes_and_its_lora_loads(prompts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small = [word.replace("grpo.", "nft.") for word in SMALL if "window" not in word]
    words = [*prompts, *small, "method=nft"]
    assert train_adversarial.main([*words, f"out={whole}", "nft.steps=2"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "nft.steps=1"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "nft.steps=2", "resume=true"]) == 0
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    tiny.load("tiny-sd3").load_lora_weights(whole / "lora")
    assert "DiffusionNFT" in (whole / "lora" / "README.md").read_text()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.new("RGB", (64, 64), (250, 20 * i, 0)).save(folder / f"{i}.png")
    return folder


def test_a_run_with_a_critic_resumes_critic_included(prompts, tmp_path, pictures):
    words = [*prompts, *SMALL, f"references={pictures}", "critic.replay=4", "reward=0.1*jpeg"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_adversarial.main([*words, f"out={whole}", "grpo.steps=3"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "grpo.steps=1"]) == 0
    assert train_adversarial.main([*words, f"out={parts}", "grpo.steps=3", "resume=true"]) == 0
    for name in ("lora/pytorch_lora_weights.safetensors", "critic/critic.safetensors"):
        one, two = (load_file(folder / name) for folder in (whole, parts))
        assert all(torch.equal(one[key], two[key]) for key in one)
    rows = logged(whole)
    assert rows == logged(parts)
    assert rows[0]["critic_accuracy"] == 0.5  # a new head knows nothing
    assert rows[0]["critic_loss"] == pytest.approx(1.3)
    assert rows[2]["critic_loss"] < 1.3
    reward = rewards.load(f"critic({whole / 'critic'})", imports=True)
    assert reward(torch.rand(2, 3, 64, 64), ["", ""]).isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "set prompts=FILE, out=FOLDER and reward=SPEC, or references="),
        (["grpo.kk=2"], "did you mean 'grpo.k'"),
        (["grpo.k=1"], "grpo.k is 1 but must be a whole number, 2 or more"),
        (["grpo.window_start=8", "grpo.num_inference_steps=4"], "no moves to learn from"),
        (["reward=nothing"], "nothing"),
        (["references=nowhere"], "nowhere"),
        (["critic.trigger=never"], "critic.trigger is 'never'"),
        (["critic_weight=-1"], "critic_weight is -1.0 but must be a number not below 0"),
        (["critic_kind=kind"], "must be 'features' or 'preference'"),
        (["critic_kind=preference"], "a critic needs references="),
        (["critic_from=somewhere"], "a critic needs references="),
        (["reward=dino(tiny)"], "the reward dino(tiny) compares with references; set references="),
        (["references=.", "critic_weight=0"], "references=. serve nothing"),
        (["references=.", "critic_weight=0", "critic_from=somewhere"], "a critic_weight above 0"),
        (["references=.", "critic_kind=preference"], "set paired=true"),
        (["references=.", "critic_from=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(prompts, tmp_path, words, message, capsys):
    given = [*prompts, f"out={tmp_path / 'out'}", "reward=jpeg"] if words else []
    assert train_adversarial.main([*given, *words]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert message in told
    assert not (tmp_path / "out").exists()


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        train_adversarial.main(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "(default:" in line]
    assert len(lines) == len(train_adversarial.NOTES)
