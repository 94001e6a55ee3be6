"""train_adversarial.py on the embedded model: it resumes, its LoRA loads, mistakes are refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_launch import logged
from tiny_pipelines import flux

import rewards
from steering import tiny
from tilt import training
from tilt.commands import train_adversarial

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = [
    *(
        "--reward=jpeg",
        "--grpo.groups=2",
        "--grpo.k=2",
        "--grpo.rank=2",
        "--grpo.num-inference-steps=3",
    ),
    *("--grpo.window-size=1", "--log-every=1"),
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('the word "CAT"\nthe word "SUN"\n')
    return [f"--prompts={file}"]


def test_a_run_resumes_and_its_lora_loads(prompts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*prompts, *SMALL, "--grpo.guidance-scale=2"]
    assert train_adversarial.main([*words, f"--out={whole}", "--grpo.steps=2"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", "--grpo.steps=1"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", "--grpo.steps=1"]) == 2
    encoded = (parts / ".conditioning" / "given" / "index.json").stat().st_mtime_ns
    assert train_adversarial.main([*words, f"--out={parts}", "--grpo.steps=2", "--resume"]) == 0
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = logged(whole)
    assert [row["ratio"] for row in rows] == [1.0, 1.0]
    assert rows == logged(parts)
    assert (parts / ".conditioning" / "given" / "index.json").stat().st_mtime_ns == encoded
    tiny.load("tiny-sd3").load_lora_weights(whole / "lora")
    assert "rewards: `jpeg`" in (whole / "lora" / "README.md").read_text()


@pytest.mark.parametrize(("method", "title"), [("nft", "DiffusionNFT"), ("awm", "AWM")])
def test_a_run_of_regression_resumes_and_its_lora_loads(method, title, prompts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small = [word.replace("grpo.", f"{method}.") for word in SMALL if "window" not in word]
    words, steps = [*prompts, *small, f"--method={method}"], f"--{method}.steps"
    assert train_adversarial.main([*words, f"--out={whole}", f"{steps}=2"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", f"{steps}=1"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", f"{steps}=2", "--resume"]) == 0
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    tiny.load("tiny-sd3").load_lora_weights(whole / "lora")
    assert title in (whole / "lora" / "README.md").read_text()


@pytest.mark.parametrize(("words", "told"), [([], 3.5), (["--grpo.guidance-scale=2"], 2.0)])
def test_a_distilled_network_is_told_the_guidance_of_its_pipeline_or_that_asked_for(
    words, told, prompts, tmp_path, monkeypatch
):
    """FLUX.1-dev's; its call has 3.5 where nothing is said."""
    seen = []

    def look(trainer, steps, settings, watch, shown, *rest):
        seen.append(trainer.samples.task.given.form)
        seen.append(watch.call)
        trainer.train_step()

    (tmp_path / "unseen.txt").write_text("a star\n")
    monkeypatch.setattr(train_adversarial.loading, "load_pipeline", lambda *_, **__: flux())
    monkeypatch.setattr(training, "loop", look)
    more = ["--grpo.targets=to_q", "--call.height=16", "--call.width=16", "--check.every=1"]
    more += [f"--check.prompts={tmp_path / 'unseen.txt'}", f"--out={tmp_path / 'out'}", *words]
    assert train_adversarial.main([*prompts, *SMALL, *more]) == 0
    assert seen[0].embedded
    assert seen[0].call.get("guidance_scale", 3.5) == told
    assert seen[1].get("guidance_scale", 3.5) == told


def test_a_network_in_bfloat16_and_its_critic(prompts, tmp_path, pictures):
    words = [*prompts, *SMALL, f"--references={pictures}", "--critic.replay=4", "--reward=0.1*jpeg"]
    words += [
        "--dtype=bfloat16",
        "--grpo.kl=0.1",
        "--grpo.guidance-scale=2",
        "--negative-prompt=blue",
    ]
    assert train_adversarial.main([*words, f"--out={tmp_path / 'one'}", "--grpo.steps=1"]) == 0
    second = [f"--lora={tmp_path / 'one/lora'}", f"--out={tmp_path / 'two'}", "--grpo.steps=2"]
    assert train_adversarial.main([*words, *second]) == 0
    state = torch.load(tmp_path / "two/state.pt", weights_only=True)
    kept = [*state["weights"].values(), *state["anchor"].values()]
    kept += list(state["score"]["module"].values())
    assert {value.dtype for value in kept} == {torch.float32}
    assert [row["ratio"] for row in logged(tmp_path / "two")] == [1.0, 1.0]
    assert logged(tmp_path / "two")[1]["kl"] > 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.new("RGB", (64, 64), (250, 20 * i, 0)).save(folder / f"{i}.png")
    return folder


def test_a_run_is_not_carried_on_with_other_files_under_the_same_names(prompts, tmp_path, capsys):
    style = tmp_path / "style"
    style.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (250, 20 * i, 0)).save(style / f"{i}.png")
    (tmp_path / "unseen.txt").write_text("a star\n")
    words = [
        *prompts,
        *SMALL,
        f"--references={style}",
        f"--out={tmp_path / 'out'}",
        "--check.every=9",
    ]
    words += [
        f"--check.prompts={tmp_path / 'unseen.txt'}",
        "--check.images=1",
        "--check.train-prompts=0",
    ]
    assert train_adversarial.main([*words, "--grpo.steps=1"]) == 0
    changes = {
        "check.prompts": lambda: (tmp_path / "unseen.txt").write_text("a circle\n"),
        "references": lambda: Image.new("RGB", (64, 64)).save(style / "1.png"),
        "prompts": lambda: (tmp_path / "prompts.txt").write_text('the word "DOG"\n'),
    }
    capsys.readouterr()
    for name, change in changes.items():  # each is told before those that changed already
        change()
        assert train_adversarial.main([*words, "--grpo.steps=2", "--resume"]) == 2
        assert f"was begun when --{name} stood for other contents" in capsys.readouterr().err


def test_a_run_with_a_critic_resumes_critic_included(prompts, tmp_path, pictures):
    words = [*prompts, *SMALL, f"--references={pictures}", "--critic.replay=4", "--reward=0.1*jpeg"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_adversarial.main([*words, f"--out={whole}", "--grpo.steps=3"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", "--grpo.steps=1"]) == 0
    assert train_adversarial.main([*words, f"--out={parts}", "--grpo.steps=3", "--resume"]) == 0
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
        (["--grpo.kk=2"], "did you mean --grpo.k?"),
        (["--grpo.k=1"], "grpo.k is 1 but must be a whole number, 2 or more"),
        (["--grpo.window-start=8", "--grpo.num-inference-steps=4"], "no moves to learn from"),
        (["--reward=nothing"], "nothing"),
        (["--references=nowhere"], "nowhere"),
        (["--critic.trigger=never"], "critic.trigger is 'never'"),
        (["--critic-weight=-1"], "critic_weight is -1.0 but must be a number not below 0"),
        (["--critic-kind=kind"], "must be 'features' or 'preference'"),
        (["--critic-kind=preference"], "a critic needs references="),
        (["--critic-from=somewhere"], "a critic needs references="),
        (
            ["--reward=dino(tiny)"],
            "the reward dino(tiny) compares with references; set references=",
        ),
        (["--references={folder}", "--critic-weight=0"], "has no effect: critic_weight is 0"),
        (
            ["--references={folder}", "--critic-weight=0", "--critic-from=x"],
            "a critic_weight above 0",
        ),
        (["--references={folder}", "--critic-kind=preference"], "set paired=true"),
        (["--references={folder}", "--critic-from=/nowhere"], "/nowhere"),
        (
            ["--call.guidance-scale=4"],
            "call.guidance_scale has no effect in training; set grpo.guidance_scale=",
        ),
        (["--call.guidance-scale=4", "--method=nft"], "set nft.guidance_scale= instead"),
        (["--call.num-inference-steps=4"], "set grpo.num_inference_steps= instead"),
        (["--call.negative-prompt=blue"], "set negative_prompt= instead"),
        (["--call.eta=1"], "eta= clashes with steer()"),
        (["--negative-prompt=blue"], "has no effect without guidance; set grpo.guidance_scale"),
        (
            ["--grpo.guidance-scale=0.5"],
            "guidance_scale is 0.5, but pipelines treat values below 1",
        ),
        (
            ["--grpo.sde=flow", "--model=tiny-sd"],
            "sde is 'flow', which is for flows, but this network is trained with betas",
        ),
        (
            ["--method=nft", "--nft.guidance-scale=0"],
            "guidance_scale is 0.0, but pipelines treat values",
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(prompts, tmp_path, words, message, capsys):
    given = [*prompts, f"--out={tmp_path / 'out'}", "--reward=jpeg"] if words else []
    words = [word.format(folder=tmp_path) for word in words]
    assert train_adversarial.main([*given, *words]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert train_adversarial.OPTIONS.in_words(message) in told
    assert not (tmp_path / "out").exists()
