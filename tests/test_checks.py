"""Checks during training: what is drawn, what is kept, and which step counts as the best."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from pictures import assert_same_pictures

import rewards
from finetune import checks
from finetune.checks import Check, Sheet, Watch
from steering import tiny
from tilt.training import metrics

CALL = tiny.call_defaults("tiny-sd3") | {"num_inference_steps": 2, "guidance_scale": 1.0}
PROMPTS = ["a red star", "two circles", 'the word "CAT"']


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.load("tiny-sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompts_pictures_do_not_depend_on_which_others_are_drawn(pipe):
    scorers = {"reward": rewards.load("jpeg + 0*clip(tiny)"), "quality": rewards.load("jpeg")}
    check = Check(images=2)
    every = checks.draw(pipe, PROMPTS, range(3), scorers, check, CALL)
    alone = checks.draw(pipe, PROMPTS, [2], scorers, check, CALL)
    assert [number for number, _ in every.images] == [0, 1, 2]
    assert_same_pictures(every.images[2][1], alone.images[0][1])
    assert every.scores.keys() == {"reward", "jpeg", "clip", "quality"}
    # a level in 1 % of the values changes the size of a JPEG by less than 1 %
    assert every.scores["reward"][4:] == pytest.approx(alone.scores["reward"], rel=0.01)
    other = checks.draw(pipe, PROMPTS, [2], scorers, Check(images=2, seed=2), CALL)
    with pytest.raises(AssertionError, match="grey levels off"):
        assert_same_pictures(other.images[0][1], alone.images[0][1])


@pytest.mark.parametrize("spec", ["jpeg", "min(clip(tiny), jpeg)", "jpeg + 0*clip(tiny)"])
def test_the_metrics_are_known_before_any_check(pipe, spec):
    scorers = {"reward": rewards.load(spec)}
    sheet = checks.draw(pipe, PROMPTS, [0], scorers, Check(images=1), CALL)
    watch = Watch(Check(), PROMPTS[:1], PROMPTS[1:], scorers, CALL, tiny.load)
    splits = ("held_out", "train")
    assert set(metrics(watch)) == {f"{split}/{name}" for split in splits for name in sheet.scores}


def test_the_check_sees_the_network_in_training_and_nothing_else_stays(pipe):
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.5)  # not what is on the disk
    loaded = []

    def load(**components):
        loaded.append(tiny.load("tiny-sd3", **components))
        return loaded[-1]

    watch = Watch(
        Check(images=2, quality="x"),
        PROMPTS[:1],
        PROMPTS[1:],
        {"reward": rewards.load("jpeg"), "quality": rewards.load("0.001*jpeg")},
        CALL,
        load,
    )
    row, grid = watch.look("transformer", pipe.transformer, Accelerator(cpu=True))
    assert row.keys() == set(metrics(watch))
    assert loaded[0].transformer is pipe.transformer
    mine = checks.draw(pipe, PROMPTS[1:], range(2), watch.rewards, watch.check, CALL)
    assert row["held_out/reward"] == pytest.approx(checks.means([mine])["reward"])
    expected = row["held_out/reward"] * (row["held_out/quality"] - 3) + 0.2
    assert row["held_out/corrected"] == pytest.approx(expected)
    assert grid.size == (128, 128)
    unseen = Watch(watch.check, [], watch.unseen, watch.rewards, CALL, load)
    only, _ = unseen.look("transformer", pipe.transformer, Accelerator(cpu=True))
    assert only == {name: value for name, value in row.items() if not name.startswith("train")}


def test_means_leave_no_answers_out():
    sheets = [Sheet({"a": [1.0, float("nan")]}), Sheet({"a": [3.0]})]
    assert checks.means(sheets) == {"a": 2.0}


ROWS = [{"step": float(i), "m": value} for i, value in enumerate([0.1, 0.5, 0.5, 0.2])]


def test_the_first_of_the_best_counts_and_patience_is_counted_from_it():
    assert checks.best_row(ROWS, "m")["step"] == 1
    assert checks.is_over(ROWS, Check(best="m", patience=2))
    assert not checks.is_over(ROWS, Check(best="m", patience=3))
    assert not checks.is_over(ROWS, Check(best="m"))
    assert not checks.is_over([], Check(best="m", patience=1))
    with pytest.raises(ValueError, match=r"no metric 'x'; there are \['m'\]"):
        checks.best_row(ROWS, "x")


def test_a_table_is_read_as_written_and_rewound(tmp_path):
    file = tmp_path / "log.csv"
    for row in ROWS:
        checks.append(file, row | {"step": int(row["step"])})
    assert checks.read(file) == ROWS
    checks.rewind(file, 1)
    assert checks.read(file) == ROWS[:2]
    checks.rewind(file, -1)
    assert checks.read(file) == []
    checks.rewind(tmp_path / "none.csv", 5)


@pytest.mark.parametrize("change", [{"every": -1}, {"images": 0}, {"patience": -2}])
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match="but"):
        Check(**change)
