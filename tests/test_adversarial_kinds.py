"""train_adversarial.py: a preference as critic, a critic to begin with, likeness as reward."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_launch import logged

import rewards
from finetune.adversarial import likened
from finetune.references import load_references
from tilt.commands import train_adversarial

PROMPTS = ['the word "CAT"', 'the word "SUN"']
pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = [
    *("--grpo.groups=2", "--grpo.k=2", "--grpo.rank=2", "--grpo.num-inference-steps=3"),
    *("--grpo.window-size=1", "--log-every=1"),
]


@pytest.fixture
def words(tmp_path):
    """Settings of a small run whose references are red for one prompt, striped for the other."""
    stripes = Image.new("L", (64, 64)).point(lambda _: 0)
    for x in range(0, 64, 8):
        stripes.paste(255, (x, 0, x + 4, 64))
    for i in range(2):
        Image.new("RGB", (64, 64), (250, 40 * i, 0)).save(tmp_path / f"red{i}.png")
        stripes.rotate(90 * i).convert("RGB").save(tmp_path / f"stripes{i}.png")
    files = [[f"{name}{i}.png" for i in range(2)] for name in ("red", "stripes")]
    (tmp_path / "pairs.json").write_text(json.dumps(dict(zip(PROMPTS, files, strict=True))))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--references={tmp_path / 'pairs.json'}",
        *SMALL,
    ]


def run(*words: str) -> None:
    assert train_adversarial.main(list(words)) == 0


def test_a_preference_critic_resumes_exactly_and_another_run_begins_with_it(words, tmp_path):
    whole, parts, later = (tmp_path / name for name in ("whole", "parts", "later"))
    kind = ["--critic-kind=preference", "--critic-layers=1", "--critic.lr=1e-4"]
    learning = [*words, "--paired", *kind, "--critic.replay=2"]
    run(*learning, f"--out={whole}", "--grpo.steps=2")
    run(*learning, f"--out={parts}", "--grpo.steps=1")
    run(*learning, f"--out={parts}", "--grpo.steps=2", "--resume")
    for name in ("lora/pytorch_lora_weights.safetensors", "critic/critic.safetensors"):
        one, two = (load_file(folder / name) for folder in (whole, parts))
        assert all(torch.equal(one[key], two[key]) for key in one)
    rows = logged(whole)
    assert rows == logged(parts)
    assert [row["critic_updated"] for row in rows] == [1.0, 1.0]
    config = json.loads((whole / "critic" / "critic.json").read_text())
    assert config == {"kind": "preference", "tower": "tiny", "layers": 1}
    run(*words, "--paired", f"--critic-from={whole / 'critic'}", f"--out={later}", "--grpo.steps=1")
    (first,) = logged(later)
    assert first["critic_real"] != rows[0]["critic_real"]  # that of the tower before it learned
    learned = rewards.load(f"critic({whole / 'critic'})", imports=True)
    pairs = load_references(tmp_path / "pairs.json", (64, 64), paired=True)
    real = pairs.draw([p for p in PROMPTS for _ in "ab"], torch.Generator())
    expected = learned(real, [p for p in PROMPTS for _ in "ab"]).mean()
    assert first["critic_real"] == pytest.approx(float(expected), abs=1e-4)


def test_likeness_is_to_references_of_the_samples_own_prompt_or_of_the_style(words, tmp_path):
    reward = rewards.load("jpeg + 0.5*dino(tiny, mode=hybrid)")
    paired, style = (
        load_references(tmp_path / "pairs.json", (64, 64), paired=p) for p in (True, False)
    )
    samples = paired.draw([*PROMPTS, PROMPTS[0]], torch.Generator())
    prompts = [*PROMPTS, PROMPTS[1]]  # the last sample is like another prompt's references
    total, parts = likened(reward, paired, 0)(samples, prompts)
    torch.testing.assert_close(parts["dino"][:2], torch.ones(2))
    assert parts["dino"][2] < 0.99
    torch.testing.assert_close(total, parts["jpeg"] + 0.5 * parts["dino"])
    torch.testing.assert_close(
        likened(reward, style, 0)(samples, prompts)[1]["dino"], torch.ones(3)
    )
    # a few pictures of a style: which ones depends on the seed alone
    found = [
        likened(reward, style, seed, most=1)(samples, prompts)[0] for seed in (0, 0, *range(8))
    ]
    assert torch.equal(found[0], found[1])
    assert not all(torch.equal(found[0], other) for other in found[2:])


def test_a_rule_and_likeness_train_without_a_critic(words, tmp_path):
    out = tmp_path / "out"
    run(
        *words,
        f"--out={out}",
        "--reward=jpeg + 0.5*dino(tiny)",
        "--critic-weight=0",
        "--grpo.steps=1",
    )
    (row,) = logged(out)
    assert row["reward"] == pytest.approx(row["jpeg"] + 0.5 * row["dino"], abs=1e-5)
    assert not [name for name in row if name.startswith("critic")]
    assert not (out / "critic").exists()
    assert "pairs.json" in (out / "lora" / "README.md").read_text()


def test_what_cannot_be_compared_is_refused(words, tmp_path, capsys):
    (tmp_path / "unseen.txt").write_text('the word "OWL"\n')
    checks = [
        "--reward=dino(tiny)",
        "--check.every=1",
        f"--check.prompts={tmp_path / 'unseen.txt'}",
    ]
    for given, message in (
        (checks, "checks have no references to compare with; set --check.reward"),
        (
            [*checks, "--check.reward=jpeg", "--check.quality=dino(tiny)"],
            "checks have no references",
        ),
        (["--reward=critic(random:0)"], "name it"),
    ):
        assert train_adversarial.main([*words, f"--out={tmp_path / 'out'}", *given]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
