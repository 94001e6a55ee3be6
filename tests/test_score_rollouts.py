"""scripts/score.py on rollouts: which columns a shard gets, and what is not scored again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_rollouts import made

import rewards
from finetune.shards import Rollouts, add_rewards
from rewards.images import to_images
from rewards.samples import open_picture
from tilt.commands import score


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts") / "run"
    made(folder)  # two shards: four images of two prompts, two of one
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def seen(monkeypatch):
    """How many images each evaluation had; an evaluation of the length in `stop` is Ctrl-C."""
    sizes: list[int] = []
    evaluate = rewards.WeightedSum.evaluate

    def watched(self, images, prompts, **kwargs):
        if len(images) == stop:
            raise KeyboardInterrupt
        sizes.append(len(images))
        return evaluate(self, images, prompts, **kwargs)

    stop = 0

    def stop_at(size):
        nonlocal stop
        stop = size

    monkeypatch.setattr(rewards.WeightedSum, "evaluate", watched)
    return sizes, stop_at


def nothing(images, prompts):
    return torch.zeros(len(images))


def call(folder, spec, *options):
    return score.main([str(folder), "--reward", spec, "--device", "cpu", *options])


def test_a_column_keeps_the_spec_that_it_was_scored_by(folder):
    assert call(folder, "jpeg + 0*clip(tiny)") == 0
    assert call(folder, "2*jpeg") == 0
    for shard in Rollouts(folder).shards:
        columns = shard.rewards()
        assert list(columns) == ["reward", "jpeg", "clip"]
        assert columns["reward"] == [2 * value for value in columns["jpeg"]]
        assert shard.scored_by() == shard.scored_by("jpeg") == "2*jpeg"
        assert shard.scored_by("clip") == "jpeg + 0*clip(source=tiny)"
        assert shard.scored_by("ocr") == ""


def test_resume_scores_what_is_not_of_this_very_spec(folder, seen):
    sizes, _ = seen
    assert call(folder, "jpeg + 0*clip(tiny)", "--resume") == 0
    assert call(folder, "jpeg + 0*clip(tiny)", "--resume") == 0
    assert sizes == [4, 2]
    assert call(folder, "jpeg", "--resume") == 0
    assert sizes == [4, 2] * 2
    shard = Rollouts(folder).shards[1]
    add_rewards(shard, {"jpeg": [0.0, 0.0]}, "another")
    assert call(folder, "jpeg", "--resume") == 0
    assert sizes == [4, 2] * 2 + [2]
    assert shard.rewards()["jpeg"] == shard.rewards()["reward"]


def test_another_version_of_a_reward_scores_anew(folder, seen, monkeypatch):
    sizes, _ = seen
    assert call(folder, "jpeg") == 0
    monkeypatch.setattr(rewards, "identity", lambda spec: "another")
    assert call(folder, "jpeg", "--resume") == 0
    assert call(folder, "jpeg", "--resume") == 0
    assert sizes == [4, 2] * 2


def absent(images, prompts):
    asked.append(len(images))
    return torch.full((len(images),), torch.nan if away else 0.5)


asked: list[int] = []
away: list[bool] = []


def test_shards_with_nan_are_scored_again_but_once_only(folder):
    """A run that is followed ends although a reward goes on giving NaN."""
    spec = "test_score_rollouts:absent"
    away.append(True)
    assert call(folder, spec) == 0
    assert asked == [4, 2]
    assert call(folder, spec, "--follow") == 0
    assert asked == [4, 2] * 2
    away.clear()
    assert call(folder, spec, "--resume") == 0
    assert asked == [4, 2] * 3
    assert call(folder, spec, "--resume") == 0
    assert asked == [4, 2] * 3


def test_what_is_finished_needs_no_reward(folder, seen, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("a reward was loaded")

    spec = "min(b=jpeg, a=0.5*clip(tiny)) + 0*jpeg"
    assert call(folder, spec) == 0
    before = capsys.readouterr().out
    monkeypatch.setattr(rewards, "load", never)
    assert call(folder, spec, "--resume") == 0
    assert capsys.readouterr().out == before
    with pytest.raises(AssertionError, match="was loaded"):
        call(folder, "jpeg", "--resume")


def test_rewards_at_one_end_are_told_with_what_to_do(folder, capsys):
    assert call(folder, "test_score_rollouts:nothing") == 0
    assert (
        "all images have the same reward, so there is nothing to learn. Make more"
        in capsys.readouterr().out
    )
    assert call(folder, "jpeg") == 0
    assert "nothing to learn" not in capsys.readouterr().out


def test_columns_that_only_some_shards_have_do_not_matter(folder, capsys):
    add_rewards(Rollouts(folder).shards[0], {"old": [0.0] * 4})
    assert call(folder, "jpeg") == 0
    assert "old" not in capsys.readouterr().out


def test_finished_shards_are_kept_after_an_interruption(folder, seen, capsys):
    sizes, stop_at = seen
    stop_at(2)
    assert call(folder, "jpeg") == 130
    assert "finished shards are kept" in capsys.readouterr().err
    stop_at(0)
    assert call(folder, "jpeg", "--resume") == 0
    assert sizes == [4, 2]


def test_rollouts_are_calibrated_on_too(folder, tmp_path):
    file = tmp_path / "new" / "scale.json"
    assert call(folder, "jpeg + 0*clip(tiny)", "--calibrate", str(file)) == 0
    kept = json.loads(file.read_text())["components"]
    values = [x for shard in Rollouts(folder).shards for x in shard.rewards()["clip"]]
    assert kept["clip(source=tiny)"] == sorted(values)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("jpeg", ["--out", "scores.csv"], "leave out --out"),
        ("jpeg", ["--prompt", "x"], "leave out --prompt"),
        ("reward=jpeg + 2*clip(tiny)", [], "is called 'reward'"),
        ("dino(tiny)", [], "these rollouts do not have for the prompt 'a red star'"),
        ("jpeg", ["--calibrate", "."], "cannot be written"),
    ],
)
def test_what_rollouts_cannot_take_is_refused(folder, seen, spec, options, message, capsys):
    assert call(folder, spec, *options) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert seen[0] == []


def test_the_references_of_the_prompts_reach_the_reward(tmp_path, capsys):
    for i, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20 + i, 16), colour).save(tmp_path / f"{colour}.png")
    named = [[str(tmp_path / f"{colour}.png")] for colour in ("red", "blue", "green")]
    run = made(tmp_path / "run", references=tuple(map(tuple, named)))
    assert call(tmp_path / "run", "dino(random:0) + 0*jpeg", "--batch-size", "3") == 0
    reward = rewards.load("dino(random:0)")
    for shard, files in zip(Rollouts(tmp_path / "run").shards, (named[:2], named[2:]), strict=True):
        given = [[open_picture(Path(name)) for name in names] for names in files for _ in range(2)]
        rows = [row["prompt"] for row in shard.table(["prompt"])]
        expected = reward(to_images(list(shard.images())), rows, references=given)
        assert shard.rewards()["dino"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(run.manifest["plan"]["references"][0])) == 1
    (tmp_path / "green.png").unlink()
    assert call(tmp_path / "run", "dino(random:0)") == 2
    assert "green.png" in capsys.readouterr().err


def test_images_have_no_frames_to_choose(folder, capsys):
    assert call(folder, "jpeg", "--video-score=min") == 2
    assert "there are no videos of several frames here" in capsys.readouterr().err
    assert not list(folder.glob("*/rewards.parquet"))
    assert call(folder / "elsewhere", "jpeg", "--score-frames=first") == 2
    said = capsys.readouterr().err
    assert "--score-frames is 'first' but has no effect, because" in said
