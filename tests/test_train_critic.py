"""train_critic.py on stored rollouts: it tells styles apart, resumes, goes on, refuses mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from test_rollouts import made

import rewards
from finetune import checks
from finetune.shards import Rollouts
from rewards.images import to_images
from rewards.models.critic import CriticReward, FeatureModel
from tilt.commands import train_critic

PROMPTS = tuple(
    f"{number} {thing}" for number in ("one", "two") for thing in ("cats", "stars", "a")
)
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Four pictures of each of six prompts."""
    folder = tmp_path_factory.mktemp("samples") / "run"
    made(folder, prompts=PROMPTS, images=4, call=CALL)
    return folder


def pictures_of(folder: Path) -> list[tuple[str, Any]]:
    shards = Rollouts(folder).shards
    prompts = [row["prompt"] for shard in shards for row in shard.table(["prompt"])]
    return list(zip(prompts, (x for shard in shards for x in shard.images()), strict=True))


@pytest.fixture(scope="module")
def style(samples, tmp_path_factory) -> Path:
    """The samples inverted, at twice the size, and pairs.json, which gives each its prompt."""
    folder = tmp_path_factory.mktemp("style")
    pairs: dict[str, list[str]] = {}
    for i, (prompt, picture) in enumerate(pictures_of(samples)):
        larger = ImageOps.scale(ImageOps.invert(picture), 2)
        larger.save(folder / f"{i:02}.png")
        pairs.setdefault(prompt, []).append(f"{i:02}.png")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture
def words(samples, style) -> list[str]:
    return [f"--rollouts={samples}", f"--references={style}", "--batch=4", "--tower=random:0"]


def run(*words: str) -> None:
    assert train_critic.main(list(words)) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "critic.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_another_style_is_told_apart_on_prompts_that_are_not_trained_on(
    words, samples, style, tmp_path, capsys
):
    out = tmp_path / "critic"
    run(
        *words,
        f"--out={out}",
        "--steps=30",
        "--log-every=15",
        "--critic.lr=1e-2",
        "--held-out=0.34",
    )
    rows = checks.read(out / "log.csv")
    assert [row["step"] for row in rows] == [15, 30]
    assert rows[1]["held_out_accuracy"] > 0.9
    assert rows[1]["held_out_margin"] > 0
    told = capsys.readouterr().out
    assert f"held-out accuracy {rows[1]['held_out_accuracy']:.3f}, training accuracy" in told
    reward = rewards.load(f"critic({out})", imports=True)
    prompts, pictures = zip(*pictures_of(samples), strict=True)
    fake = to_images(list(pictures))
    real = to_images([Image.open(style / f"{i:02}.png") for i in range(len(prompts))])
    with torch.no_grad():
        assert reward(real, prompts).mean() > reward(fake, prompts).mean()


def test_samples_like_their_references_are_not_told_apart(words, samples, style, tmp_path):
    for i, (_, picture) in enumerate(pictures_of(samples)):
        picture.save(tmp_path / f"{i}.png")
    out = tmp_path / "critic"
    run(
        *words,
        f"--references={tmp_path}",
        f"--out={out}",
        "--steps=10",
        "--held-out=0.5",
        "--batch=12",
    )
    (row,) = checks.read(out / "log.csv")
    assert 0.2 < row["held_out_accuracy"] < 0.8


@pytest.mark.parametrize(
    "kind", [[], ["--kind=preference", "--paired", "--references={style}/pairs.json"]]
)
def test_six_steps_are_three_and_a_resumed_three_bit_for_bit(
    words, style, tmp_path, kind, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [
        *words,
        *(word.format(style=style) for word in kind),
        "--critic.replay=3",
        "--log-every=1",
    ]
    run(*words, f"--out={whole}", "--steps=6")
    run(*words, f"--out={parts}", "--steps=3")
    half = weights(parts)
    run(*words, f"--out={parts}", "--steps=6", "--resume")
    assert not same(half, weights(parts))
    assert same(weights(whole), weights(parts))
    rows = checks.read(whole / "log.csv")
    assert len(rows) == 6
    assert rows == checks.read(parts / "log.csv")
    text = (whole / "settings.yaml").read_text()
    assert "replay: 3" in text
    again = [f"--config={whole / 'settings.yaml'}", "--resume"]
    before = weights(whole)
    monkeypatch.setattr(train_critic.training, "critic_of", never)  # nothing is left to do
    capsys.readouterr()
    run(*again)
    assert same(before, weights(whole))
    assert capsys.readouterr().out.endswith(
        f"training accuracy {rows[-1]['accuracy']:.3f}: {whole}\n"
    )
    with pytest.raises(AssertionError, match="was loaded"):
        train_critic.main([*again, "--steps=7"])


def never(*_, **__):
    raise AssertionError("a model was loaded")


def test_references_that_changed_under_the_same_name_are_refused(words, style, tmp_path, capsys):
    copied = [*words, f"--references={shutil.copytree(style, tmp_path / 'style')}"]
    run(*copied, f"--out={tmp_path / 'out'}", "--steps=1")
    Image.new("RGB", (64, 64)).save(tmp_path / "style" / "03.png")
    again = [*copied, f"--out={tmp_path / 'out'}", "--steps=2", "--resume"]
    assert train_critic.main(again) == 2
    assert "was begun when --references stood for other contents" in capsys.readouterr().err


def test_a_critic_goes_on_from_another_with_older_samples(words, samples, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    CriticReward(FeatureModel("random:0", hidden=8, seed=5)).save(first)
    made(tmp_path / "later", prompts=(*PROMPTS[:2], "new"), images=2, call=CALL)
    several = ["--rollouts", str(samples), str(tmp_path / "later")]
    run(
        *words,
        *several,
        f"--out={second}",
        f"--critic-from={first}",
        "--steps=1",
        "--critic.lr=1e-6",
    )
    one, two = weights(first), weights(second)
    assert not same(one, two)
    for name, value in one.items():  # Adam moves a weight by its rate at most
        torch.testing.assert_close(two[name], value, rtol=0, atol=1.1e-6)
    assert json.loads((second / "critic.json").read_text())["hidden"] == 8


def test_a_prompt_is_on_one_side_and_stays_there():
    samples = [(prompt, bytes([i])) for prompt in "abcdefghij" for i in range(2)]
    seen, unseen = train_critic.split(samples, 0.2, 0)
    left_out = {prompt for prompt, _ in unseen}
    assert len(left_out) == 2
    assert not left_out & {prompt for prompt, _ in seen}
    assert sorted(seen + unseen) == samples
    turned, _ = train_critic.split(samples[::-1], 0.2, 0)
    assert sorted(turned) == seen
    assert train_critic.split(samples, 0.0, 0) == (samples, [])
    assert left_out <= {p for p, _ in train_critic.split(samples, 0.4, 0)[1]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rollouts="], "rollouts is [''] but must be a list of names"),
        (["--rollouts={tmp}"], "holds no rollouts; make some first"),
        (["--references={tmp}"], "at least two reference images but got 0"),
        (["--paired"], "holds images but not their prompts"),
        (["--paired", "--references={tmp}/few.json"], "5 prompts have no reference image"),
        (["--kind=features2"], "kind is 'features2' but must be 'features' or 'preference'"),
        (["--kind=preference"], "set --paired"),
        (
            ["--critic-from=random:1"],
            "has a fixed kind, tower and layers, of which tower is random:1",
        ),
        (["--critic-from={tmp}"], "holds none of ['critic.json']"),
        (["--stesp=3"], "did you mean --steps?"),
        (["--batch=0"], "batch is 0 but must be a whole number"),
        (["--held-out=1"], "held_out is 1.0 but must be a number in [0, 1)"),
        (["--held-out=0.95"], "leaves none of 6 prompts to train on"),
        (["--out={tmp}/done"], "is not empty: it holds other files"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(words, style, tmp_path, given, message, capsys):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "state.pt").touch()
    few = {PROMPTS[0]: [str(style / "00.png"), str(style / "01.png")]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    given = [word.format(tmp=tmp_path) for word in given]
    assert train_critic.main([*words, f"--out={tmp_path / 'out'}", *given]) == 2
    told = capsys.readouterr().err.splitlines()
    assert train_critic.OPTIONS.in_words(message) in told[-1]
    assert all("loading" in line for line in told[:-1])
    assert not (tmp_path / "out").exists()


def test_runs_of_several_sizes_are_refused(words, samples, tmp_path, capsys):
    small = tmp_path / "small"
    made(small, prompts=PROMPTS[:1], call=CALL | {"height": 32, "width": 48})
    several = ["--rollouts", str(samples), str(small)]
    assert train_critic.main([*words, *several, f"--out={tmp_path / 'out'}"]) == 2
    assert "rollouts must have one size (h, w) but have" in capsys.readouterr().err
