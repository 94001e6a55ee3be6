"""tilt compare: a table's columns, wins over a table, preference files, tournaments."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.samples import read_samples
from tilt.commands.compare import agreement_report, main, ranked, win_report
from tilt.pairwise_judge import GAP, SideBySideJudge, side_by_side
from tilt.score_table import write_table

JUDGE = "judge(url=http://127.0.0.1:1/v1, model=stub)"


def rows(seed=0, prompts="aabbbc", **columns):
    draws = np.random.default_rng(seed)
    found = [
        {"image": f"{i}.png", "prompt": p, "reward": draws.normal()} for i, p in enumerate(prompts)
    ]
    for name, values in columns.items():
        for row, value in zip(found, values, strict=True):
            row[name] = float(value)
    return found


def halves(picture):
    """The mean of the left and of the right image of a pair whose images have one width."""
    width = (picture.shape[1] - GAP) // 2
    return picture[:, :width].mean(), picture[:, width + GAP :].mean()


@pytest.fixture
def bright(monkeypatch):
    """A judge that prefers bright images, and a little the left one."""

    def answer(self, pictures, question):
        left, right = halves(*pictures)
        return f"The left is {left:.0f}.\n**Scores: {left / 26 + 0.1:.3f}, {right / 26:.3f}**"

    monkeypatch.setattr("rewards.backends.chat_endpoint.Endpoint.answer", answer)


def greys(folder, levels, size=(9, 7), prompt="a"):
    folder.mkdir(exist_ok=True)
    lines = []
    for level in levels:
        Image.new("RGB", size, (level,) * 3).save(folder / f"{level}.png")
        lines.append(json.dumps({"image": f"{level}.png", "prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_agreement_is_kendalls_over_all_and_what_is_missing_is_left_out():
    table = rows(clip=[1, 2, 3, math.nan, 5, 0], ocr=[1, 3, 2, 9, 4, 0])
    lines = agreement_report(table, ["clip", "ocr"]).splitlines()
    cells = lines[1].split()
    assert cells[:4] == ["clip,", "ocr", "5", "0.800"]  # one of ten pairs is discordant
    assert cells[4:6] == ["1.000", "1.000"]  # within the prompts a and b both order alike
    assert len(agreement_report(table).splitlines()) == 1 + 3


def test_wins_pair_images_by_prompt_and_turn():
    ours, theirs = rows(x=[1, 2, 3, 4, 5, 6]), rows(prompts="abcabb", x=[0, 3, 7, 2, 4, 5])
    # a: 1 > 0, 2 = 2; b: 3 = 3, 4 = 4, 5 = 5; c: 6 < 7
    said = win_report(ours, theirs, "x")
    assert f"wins        {(0.75 + 0.5 + 0) / 3:.3f} [" in said
    assert "difference  +0.000 [" in said
    with pytest.raises(ValueError, match="image 2 of the prompt 'a' is in only one of them"):
        win_report(ours, theirs[1:], "x")


def test_a_tournament_ranks_by_the_judge(tmp_path, bright):
    folder = greys(tmp_path / "a", [30, 240, 100, 10, 180])
    judge = rewards.load(JUDGE, imports=True).parts[0].reward
    (order,) = ranked(read_samples(folder), judge).values()
    assert [path.stem for path in order] == ["240", "180", "100", "30", "10"]


def test_two_images_side_by_side_keep_their_sizes():
    left, right = Image.new("RGB", (5, 9), "red"), Image.new("RGB", (7, 3), "blue")
    both = side_by_side(left, right)
    assert both.size == (5 + GAP + 7, 9)
    assert both.getpixel((4, 8)) == (255, 0, 0)
    assert both.getpixel((5 + GAP, 2)) == (0, 0, 255)


class Says:
    concurrency = 1

    def __init__(self, text):
        self.text = text

    def answer(self, pictures, question):
        assert "a star" in question
        return self.text


@pytest.mark.parametrize(
    "text", ["Scores: 7, 4", "scores: [7, 4]", "Scores: 0, 0\n**Scores:** 7 / 4.", "SCORES: 7; 4"]
)
def test_the_last_scores_of_an_answer_count(text):
    judge = SideBySideJudge(Says(text), [Image.new("RGB", (4, 4))] * 2, "a star")
    assert torch.equal(judge([(0, 1)]), torch.tensor([[7.0, 4.0]]))


def test_an_answer_without_scores_is_an_error():
    judge = SideBySideJudge(Says("both are good"), [Image.new("RGB", (4, 4))] * 2, "a star")
    with pytest.raises(ValueError, match="holds no line 'Scores: L, R'"):
        judge([(0, 1)])


def test_every_comparison_as_a_command(tmp_path, bright, capsys):
    table, base = tmp_path / "a.csv", tmp_path / "b.csv"
    write_table(table, rows(clip=range(6)), "x")
    write_table(base, rows(1, clip=range(6)), "x")
    assert main(["agreement", "--table", str(table)]) == 0
    assert main(["wins", "--table", str(table), "--baseline", str(base)]) == 0
    folder = greys(tmp_path / "images", [200, 30])
    file = folder / "choices.jsonl"
    choice = {"prompt": "a", "chosen": "200.png", "rejected": ["30.png"]}
    file.write_text(json.dumps(choice))
    words = ["preferences", "--file", str(file), "--reward"]
    assert main([*words, "jpeg(incompressibility)"]) == 0
    assert main(["tournament", "--images", str(folder), "--judge", JUDGE]) == 0
    out = capsys.readouterr().out
    assert "reward, clip" in out
    assert "6 pairs of 3 prompts" in out
    assert "all: 0." in out
    assert f"a\n  1. {folder / '200.png'}\n  2. {folder / '30.png'}\n" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["agreement", "--table", "none.csv"], "none.csv is not a table of scores"),
        (["agreement", "--table", "a.csv", "--columns", "clip", "x"], "no column 'x'"),
        (["agreement", "--table", "a.csv", "--columns", "clip"], "two columns or more"),
        (
            ["preferences", "--file", "none.jsonl", "--reward", "jpeg"],
            "not a readable file of choices",
        ),
        (["tournament", "--images", ".", "--judge", "jpeg"], "is not a judge"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(greys(tmp_path / "images", [200, 30]))
    write_table(tmp_path / "images" / "a.csv", rows(clip=range(6)), "x")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
