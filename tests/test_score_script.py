"""scripts/score.py end to end on drawn pictures, offline."""

import json

import pytest
import torch
from PIL import Image

import rewards
from rewards.images import to_images
from rewards.table import read_table
from scripts import score

PROMPTS = ["a red circle", "two blue stars", "a green square"]


@pytest.fixture
def folder(tmp_path):
    colours = [(220, 40, 40), (40, 90, 220), (40, 170, 70)]
    lines = []
    for i, (prompt, colour) in enumerate(zip(PROMPTS, colours, strict=True)):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "prompt": prompt})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_the_table_holds_what_the_reward_gives(folder, capsys):
    spec = "clip(tiny) + 0*jpeg"
    assert score.main([str(folder), "--reward", spec, "--batch-size", "2", "--device", "cpu"]) == 0
    rows = read_table(folder / "scores.csv")
    images = to_images([Image.open(folder / f"{i}.png") for i in range(3)])
    with torch.no_grad():
        total, parts = rewards.load(spec).evaluate(images, PROMPTS)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["reward"] for row in rows] == pytest.approx(total.tolist(), abs=1e-5)
    assert [row["jpeg"] for row in rows] == pytest.approx(parts["jpeg"].tolist(), abs=1e-6)
    assert (folder / "scores.csv.histogram.png").is_file()
    assert "missing" in capsys.readouterr().out


def test_an_interrupted_run_is_carried_on_without_scoring_again(folder, monkeypatch, capsys):
    command = [str(folder), "--reward", "jpeg", "--batch-size", "1", "--device", "cpu"]
    seen = []
    original = rewards.WeightedSum.evaluate

    def evaluate(self, images, prompts, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(prompts)
        return original(self, images, prompts, **kwargs)

    monkeypatch.setattr(rewards.WeightedSum, "evaluate", evaluate)
    assert score.main(command) == 130
    assert "2 of 3 are kept" in capsys.readouterr().err
    seen.clear()
    assert score.main([*command, "--resume"]) == 0
    assert seen == PROMPTS[2:]
    assert len(read_table(folder / "scores.csv")) == 3
    assert score.main([*command, "--resume"]) == 0
    assert seen == PROMPTS[2:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a folder"),
        (["nowhere", "--reward", "jpeg"], "neither a folder"),
        (["{folder}", "--reward", "jpg"], "did you mean 'jpeg'"),
        (["{folder}", "--reward", "ocr"], "quotes no text"),
        (["{folder}", "--reward", "jpeg", "--out", "a.xls"], "must end in"),
        (["{folder}", "--reward", "jpeg", "--device", "abacus"], "abacus"),
        (["{folder}", "--reward", "jpeg", "--batch-size", "0"], "whole number"),
        (["{folder}", "--frobnicate"], "--help"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(folder, options, message, capsys):
    assert score.main([option.format(folder=folder) for option in options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(folder.glob("*.part"))


def test_every_reward_is_listed(capsys):
    assert score.main(["--list"]) == 0
    listed, more = capsys.readouterr().out.split("\n\n")
    names = [line.split()[0] for line in listed.splitlines() if line[0] != " "]
    assert names == list(rewards.available())
    assert [line.split()[0] for line in more.splitlines()[1:]] == list(rewards.aggregators())


def test_a_calibration_file_is_written_that_specs_can_use(folder, tmp_path):
    scale, more = tmp_path / "scale.json", tmp_path / "more.csv"
    command = [str(folder), "--device", "cpu", "--reward"]
    assert score.main([*command, "jpeg + 0*clip(tiny)", "--calibrate", str(scale)]) == 0
    spec = f"calibrated(jpeg, file={scale})"
    assert score.main([*command, spec, "--out", str(more)]) == 0
    values = [row["reward"] for row in read_table(more)]
    assert sum(values) == pytest.approx(0, abs=1e-2)
    assert sum(value**2 for value in values) / 3 == pytest.approx(1, abs=1e-2)


def test_no_picture_is_overwritten_and_the_histogram_is_no_sample(folder):
    (folder / "metadata.jsonl").unlink()
    before = (folder / "1.png").read_bytes()
    command = [str(folder), "--reward", "jpeg", "--prompt", "x", "--device", "cpu", "--out"]
    for name in ("1.csv", "again.csv"):
        assert score.main([*command, str(folder / name)]) == 0
        assert len(read_table(folder / name)) == 3
    assert (folder / "1.png").read_bytes() == before
