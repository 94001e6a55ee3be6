"""scripts/score.py end to end on drawn pictures, offline."""

import json
import math
import re
import resource

import pytest
import torch
from PIL import Image

import rewards
from rewards.images import to_images
from tilt.commands import score
from tilt.score_table import Table, read_table

PROMPTS = ["a red circle", "two blue stars", "a green square"]


def refusal(told: str) -> str:
    """What stderr holds besides the lines on what is being loaded."""
    return re.sub(r"^tilt score: loading .*\n", "", told, flags=re.M)


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
        total, parts = rewards.load(spec, imports=True).evaluate(images, PROMPTS)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["reward"] for row in rows] == pytest.approx(total.tolist(), abs=1e-5)
    assert [row["jpeg"] for row in rows] == pytest.approx(parts["jpeg"].tolist(), abs=1e-6)
    assert (folder / "scores.csv.histogram.png").is_file()
    assert "missing" in capsys.readouterr().out


@pytest.fixture
def seen(monkeypatch):
    """The prompts that were scored; the third would be followed by Ctrl-C."""
    prompts_seen = []
    original = rewards.WeightedSum.evaluate

    def evaluate(self, images, prompts, **kwargs):
        if len(prompts_seen) == 2:
            raise KeyboardInterrupt
        prompts_seen.extend(prompts)
        return original(self, images, prompts, **kwargs)

    monkeypatch.setattr(rewards.WeightedSum, "evaluate", evaluate)
    return prompts_seen


def test_an_interrupted_run_is_carried_on_without_scoring_again(folder, seen, capsys):
    command = [str(folder), "--reward", "jpeg", "--batch-size", "1", "--device", "cpu"]
    assert score.main(command) == 130
    assert "2 of 3 are kept" in capsys.readouterr().err
    seen.clear()
    assert score.main([*command, "--resume"]) == 0
    assert seen == PROMPTS[2:]
    assert len(read_table(folder / "scores.csv")) == 3
    assert score.main([*command, "--resume"]) == 0
    assert seen == PROMPTS[2:]


def absent(images, prompts):
    """Brightness, but NaN for the prompts in `away`."""
    asked.extend(prompts)
    return [
        math.nan if p in away else float(x.mean()) for x, p in zip(images, prompts, strict=True)
    ]


asked: list[str] = []
away: set[str] = set()


def test_what_has_no_score_is_asked_for_again(folder, capsys):
    command = [str(folder), "--reward", "test_score_script:absent", "--device", "cpu"]
    away.update(PROMPTS[1:])
    assert score.main(command) == 0
    away.clear()
    asked.clear()
    assert score.main([*command, "--resume"]) == 0
    assert asked == PROMPTS[1:]
    rows = read_table(folder / "scores.csv")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(math.isfinite(row["reward"]) for row in rows)
    assert score.main([*command, "--resume"]) == 0
    assert asked == PROMPTS[1:]
    assert "is complete" in capsys.readouterr().out


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
        (["{folder}", "--reward", "reward=jpeg + 2*clip(tiny)"], "is called 'reward'"),
        (["{folder}", "--reward", "mean(image=jpeg, clip(tiny))"], "is called 'image'"),
        (["{folder}", "--reward", "2*prompt=jpeg"], "is called 'prompt'"),
        (["{folder}", "--reward", "dino(tiny)"], "0.png has none"),
        (["{folder}", "--reward", "jpeg + delta(jpeg2=jpeg)"], "0.png has none"),
        (["{folder}", "--reward", "jpeg", "--out", "{folder}/0.png/s.csv"], "cannot be written"),
        (["{folder}", "--reward", "jpeg", "--calibrate", "{folder}/0.png/x"], "cannot be written"),
        (["{folder}", "--reward", "jpeg", "--calibrate", "{folder}"], "cannot be written"),
        (["{folder}", "--frobnicate"], "--help"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(folder, options, message, seen, capsys):
    assert score.main([option.format(folder=folder) for option in options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert refusal(told).count("\n") == 1
    assert not seen
    assert not list(folder.glob("scores*"))


def test_every_reward_is_listed(capsys):
    assert score.main(["--list"]) == 0
    listed, more = capsys.readouterr().out.split("\n\n")
    names = [line.split()[0] for line in listed.splitlines() if line[0] != " "]
    assert names == list(rewards.available())
    assert [line.split()[0] for line in more.splitlines()[1:]] == list(rewards.aggregators())


def test_a_reward_without_a_card_is_listed_as_such(monkeypatch, capsys):
    class Mine:
        def __init__(self) -> None: ...

    monkeypatch.setattr("rewards.models.jpeg.JpegReward", Mine)
    assert score.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "jpeg" in printed
    assert "none yet" in printed
    assert "Radford et al. 2021" in printed


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


def lines(folder, *entries):
    file = folder / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return [str(file), "--device", "cpu", "--out", str(folder / "list.csv"), "--reward"]


def columns(folder, *names):
    return [tuple(row[name] for name in names) for row in read_table(folder / "list.csv")]


def test_new_pictures_are_added_to_a_finished_table(folder, seen):
    entries = [{"image": f"{i}.png", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    assert score.main([*lines(folder, entries[1]), "jpeg"]) == 0
    seen.clear()
    command = [*lines(folder, *entries), "jpeg", "--resume"]
    assert score.main(command) == 0
    assert seen == [PROMPTS[0], PROMPTS[2]]
    assert columns(folder, "prompt") == [(prompt,) for prompt in PROMPTS]
    rows = columns(folder, "reward")
    (folder / "list.csv").unlink()
    seen.clear()
    assert score.main([*lines(folder, *entries), "jpeg"]) == 0
    assert columns(folder, "reward") == rows


def test_a_complete_table_is_not_written_again_but_drawn_and_calibrated(folder, seen, capsys):
    entries = [{"image": f"{i}.png", "prompt": PROMPTS[i]} for i in range(2)]
    command = [*lines(folder, *entries), "jpeg"]
    assert score.main(command) == 0
    seen.clear()
    before = (folder / "list.csv").stat().st_mtime_ns
    (folder / "list.csv.histogram.png").unlink()
    assert score.main([*command, "--resume", "--calibrate", str(folder / "scale.json")]) == 0
    assert "list.csv is complete" in capsys.readouterr().out
    assert not seen
    assert (folder / "list.csv").stat().st_mtime_ns == before
    assert (folder / "list.csv.histogram.png").is_file()
    kept = json.loads((folder / "scale.json").read_text())["components"]["jpeg"]
    assert kept == sorted(value for (value,) in columns(folder, "reward"))


@pytest.mark.parametrize("finished", [True, False])
def test_scores_of_another_spec_prompt_or_picture_are_not_taken_over(folder, capsys, finished):
    first, second = ({"image": f"{i}.png", "prompt": "x"} for i in range(2))
    table = folder / "list.csv"
    assert score.main([*lines(folder, first, second), "jpeg"]) == 0
    if not finished:
        rows = [{"reward": score.versioned("jpeg")}, *read_table(table)]
        rows = "".join(json.dumps(row) + "\n" for row in rows)
        table.rename(folder / "list.csv.part").write_text(rows)
    held = {path: path.read_bytes() for path in folder.iterdir() if path.name != "list.jsonl"}
    for entries, spec, message in [
        ([first, second], "jpeg(scale=flow_grpo)", "was scored by 'jpeg ["),
        ([first, second | {"prompt": "y"}], "jpeg", "1.png with the prompt 'x'"),
        ([first], "jpeg", "not asked for (1)"),
    ]:
        capsys.readouterr()
        assert score.main([*lines(folder, *entries), spec, "--resume"]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert refusal(told).count("\n") == 1
    assert held == {p: p.read_bytes() for p in folder.iterdir() if p.name != "list.jsonl"}


def test_scores_of_another_version_of_a_reward_are_not_mixed_with(folder, capsys, monkeypatch):
    first, second = ({"image": f"{i}.png", "prompt": "x"} for i in range(2))
    assert score.main([*lines(folder, first), "jpeg"]) == 0
    assert score.main([*lines(folder, first), "jpeg", "--resume"]) == 0
    monkeypatch.setattr(rewards, "identity", lambda spec: "abc")
    capsys.readouterr()
    for entries in ([first], [first, second]):
        assert score.main([*lines(folder, *entries), "jpeg", "--resume"]) == 2
        told = capsys.readouterr().err
        assert re.search(r"scored by 'jpeg \[version \w+\]', not 'jpeg \[version abc\]'", told)


def test_one_picture_under_two_prompts_has_two_rows(folder, seen):
    entries = [{"image": "0.png", "prompt": prompt} for prompt in PROMPTS]
    command = [*lines(folder, *entries), "clip(tiny)", "--batch-size", "1"]
    assert score.main(command) == 130
    seen.clear()
    assert score.main([*command, "--resume"]) == 0
    assert seen == PROMPTS[2:]
    assert columns(folder, "prompt") == [(prompt,) for prompt in PROMPTS]
    assert len(set(columns(folder, "reward"))) == 3


def test_other_references_are_another_row(folder, capsys):
    entries = [{"image": "0.png", "prompt": "x", "references": [f"{i}.png"]} for i in range(2)]
    assert score.main([*lines(folder, *entries), "dino(tiny)"]) == 0
    (same,), (other,) = columns(folder, "reward")
    assert same == pytest.approx(1, abs=1e-4)
    assert other < 0.99
    changed = entries[1] | {"references": ["2.png"]}
    assert score.main([*lines(folder, entries[0], changed), "dino(tiny)", "--resume"]) == 2
    assert "not asked for (1)" in capsys.readouterr().err


def test_one_picture_is_no_sample_to_calibrate_on(folder, seen, capsys):
    command = [*lines(folder, {"image": "0.png", "prompt": "x"}), "jpeg"]
    assert score.main([*command, "--calibrate", str(folder / "scale.json")]) == 2
    assert "two images or more" in capsys.readouterr().err
    assert not seen


def test_a_full_disk_is_told_in_one_sentence(folder, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Table, "add", full)
    assert score.main([str(folder), "--reward", "jpeg", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "tilt score: [Errno 28] No space left on device"
    )


@pytest.mark.parametrize("room", [0, 100, 300, 1000])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(folder, room, capsys):
    """Files cannot grow past some bytes, as on a full disk; then they can again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [str(folder), "--reward", "jpeg", "--batch-size", "1", "--device", "cpu"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = score.main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("tilt score: ")
    assert "scores.csv" in last
    assert score.main([*command, "--resume"]) == 0
    assert len(read_table(folder / "scores.csv")) == 3
