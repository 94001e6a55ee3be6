"""A trainer on rollouts that other jobs draw and score meanwhile."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import checks, following
from finetune.gdro import GdroTrainer
from finetune.shards import Rollouts, add_rewards
from tilt.commands import rollout, score, train_gdro

FILE = "lora/pytorch_lora_weights.safetensors"
SMALL = ["--gdro.groups=2", "--gdro.k=2", "--gdro.rank=2", "--gdro.lr=1e-2", "--log-every=1"]
PLAN = ["--images=2", "--prompts-per-shard=1", "--call.num-inference-steps=1"]
PLAN.append("--call.guidance-scale=1.0")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three shards of a prompt each, not scored."""
    folder = tmp_path_factory.mktemp("following")
    words = "".join(f'the word "{word}"\n' for word in ("CAT", "SUN", "OWL"))
    (folder / "prompts.txt").write_text(words)
    line = [f"--prompts={folder / 'prompts.txt'}", f"--out={folder / 'run'}", *PLAN]
    assert rollout.main(line) == 0
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy, of which the last shard is scored; it was drawn by the LoRA of step 1."""
    folder = shutil.copytree(made / "run", tmp_path / "run")
    scored(folder, 2)
    (folder / "00002/lora.json").write_text('{"step": 1}')
    return folder


def scored(folder: Path, number: int) -> None:
    add_rewards(Rollouts(folder).shards[number], {"reward": [float(number), 5.0]}, "jpeg")


def trained(run: Path, out: Path, *words: str) -> int:
    return train_gdro.main([f"--rollouts={run}", f"--out={out}", *SMALL, *words])


def test_shards_are_seen_as_they_are_scored_and_a_resumed_run_sees_the_same(
    run, tmp_path, monkeypatch
):
    """Shard 0 is scored after step 1; the trainer looks before steps 0, 3 and 6."""
    step = GdroTrainer.train_step

    def then(self):
        found = step(self)
        if self.step == 1:
            scored(run, 0)
        return found

    monkeypatch.setattr(GdroTrainer, "train_step", then)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert trained(run, whole, "--follow=3", "--gdro.steps=4") == 0
    (run / "00000/rewards.parquet").unlink()
    for steps in (2, 4):
        assert trained(run, cut, "--follow=3", f"--gdro.steps={steps}", "--resume") == 0
    rows = checks.read(whole / "log.csv")
    assert [row["shards"] for row in rows] == [1, 1, 1, 2]
    assert [row["staleness"] for row in rows] == [-1, 0, 1, (2 + 3) / 2]
    assert [row["loss"] for row in checks.read(cut / "log.csv")] == [row["loss"] for row in rows]
    one, two = load_file(whole / FILE), load_file(cut / FILE)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shards_that_were_scored_again_are_refused(run, tmp_path, capsys):
    assert trained(run, tmp_path / "out", "--follow=3", "--gdro.steps=1") == 0
    add_rewards(Rollouts(run).shards[2], {"reward": [1.0, 0.0]}, "jpeg")
    assert trained(run, tmp_path / "out", "--follow=3", "--gdro.steps=2", "--resume") == 2
    assert "the shards that it had seen were drawn or scored again" in capsys.readouterr().err
    assert trained(run, tmp_path / "out", "--gdro.steps=2", "--resume") == 2
    assert "was begun with --follow 3, not 0" in capsys.readouterr().err


def test_all_shards_give_what_a_run_without_looking_gives(run, tmp_path):
    for number in (0, 1):
        scored(run, number)
    for name, more in (("whole", []), ("looking", ["--follow=1"])):
        assert trained(run, tmp_path / name, "--gdro.steps=2", *more) == 0
    one, two = (load_file(tmp_path / name / FILE) for name in ("whole", "looking"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shards_without_a_lesson_are_not_waited_on_or_seen(run, monkeypatch):
    add_rewards(Rollouts(run).shards[0], {"reward": [1.0, 1.0]}, "jpeg")
    add_rewards(Rollouts(run).shards[1], {"reward": [1.0, float("nan")]}, "jpeg")
    found = following.wait(run, "reward")
    assert [shard.folder.name for shard in found.shards] == ["00002"]


def test_each_shard_is_drawn_by_the_newest_lora_and_says_which(run, made, tmp_path, monkeypatch):
    tuned = tmp_path / "tuned"
    assert following.newest(tuned) == (0, None)
    words = ["--follow=1", "--gdro.steps=2", "--save-lora-every=1"]
    assert trained(run, tuned, *words) == 0
    (tuned / "lora-000009").mkdir()  # without weights
    assert following.newest(tuned) == (2, tuned / "lora-000002")
    steps = iter([(0, None), (1, tuned / "lora-000001"), (2, tuned / "lora-000002")])
    monkeypatch.setattr(rollout, "newest", lambda out: next(steps))
    out = tmp_path / "drawn"
    line = [f"--prompts={made / 'prompts.txt'}", f"--out={out}", *PLAN, f"--follow={tuned}"]
    assert rollout.main(line) == 0
    plain, drawn = Rollouts(made / "run").shards, Rollouts(out).shards
    assert [shard.lora_step() for shard in drawn] == [0, 1, 2]
    notes = [json.loads((shard.folder / "lora.json").read_text())["lora"] for shard in drawn]
    assert notes[0] is None
    assert len(set(notes)) == 3
    same = [
        torch.equal(a.tensors()["latents"], b.tensors()["latents"])
        for a, b in zip(plain, drawn, strict=True)
    ]
    assert same == [True, False, False]
    (out / "00001/lora.json").unlink()  # killed before it was written
    steps = iter([(2, tuned / "lora-000002")])
    assert rollout.main([*line, "--resume"]) == 0
    assert [shard.lora_step() for shard in Rollouts(out).shards] == [0, 2, 2]


def test_shards_are_scored_as_they_are_drawn(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made / "run", tmp_path / "run")
    shutil.move(folder / "00001", tmp_path / "later")
    monkeypatch.setattr(following, "PAUSE", 0.05)

    def drawn() -> None:
        while not (folder / "00002/rewards.parquet").exists():
            time.sleep(0.05)
        shutil.move(tmp_path / "later", folder / "00001")

    worker = threading.Thread(target=drawn)
    worker.start()
    words: Any = [str(folder), "--reward", "jpeg", "--device", "cpu", "--follow"]
    assert score.main(words) == 0
    worker.join()
    assert all(shard.scored_by() == "jpeg" for shard in Rollouts(folder).shards)
    assert score.main(words) == 0


def test_what_cannot_be_followed_is_refused(run, tmp_path, capsys):
    twice = ["--rollouts", str(run), str(tmp_path), "--out=x", "--follow=1"]
    assert train_gdro.main(twice) == 2
    assert "--follow needs one folder" in capsys.readouterr().err
    assert rollout.main(["--prompts=a", "--out=b", "--lora=c", "--follow=d"]) == 2
    assert "leave one out" in capsys.readouterr().err
