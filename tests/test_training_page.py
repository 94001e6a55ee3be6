"""The report of a training run, of a folder that is scripted here."""

import json
import math
import re
import shutil

import pytest
import torch
from saved_runs import NASTY, Page, noise, read

from finetune import checks
from finetune.gdro import _watched
from rewards.compare import hacked
from tilt.report import training as page
from tilt.report.saved import read_evaluation

STEPS = [0, 50, 100, 150, 200, 250]
TRAIN = [0.30, 0.42, 0.55, 0.66, 0.74, 0.80]
HELD = [0.31, 0.40, 0.50, 0.56, 0.55, 0.58]
QUALITY = [3.90, 3.95, 3.80, 3.60, 3.30, 3.35]  # falls at 100, 150 and 200: an alarm at 200
SETTINGS = """out: runs/tuned
model: tiny-sd3
reward: ocr <b>
check:
  every: 50
  best: held_out/corrected
  prompts: "<script>.txt"
"""


def training(out, *, quality=QUALITY, log=True, grids=True, settings=SETTINGS, steps=STEPS):
    """A folder as scripts/training.py fills it."""
    out.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for step, train, held, q in zip(steps, TRAIN, HELD, quality, strict=False):
        row = {"step": step, 'held_out/ocr "><b>': held / 2, "held_out/reward": held}
        row |= {"held_out/quality": q, "train/reward": train, 'train/ocr "><b>': train / 2}
        row["held_out/corrected"] = checks.corrected(held, q)
        checks.append(out / "checks.csv", row)
        if grids:
            (out / "grids").mkdir(exist_ok=True)
            noise(g, 256, 512, 8).save(out / "grids" / f"{step:06d}.png")
    for step in range(10, 260, 10) if log else ():
        values = {"reward": 0.3 + step / 500, "loss": 1 / step, "grad_norm": 0.5, "seconds": 2.0}
        checks.append(out / "log.csv", {"step": step} | values)
    if settings:
        (out / "settings.yaml").write_text(settings, encoding="utf-8")
    return out


def evaluation(folder):
    def interval(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    def variant(mean):
        more = {"difference": interval(mean - 0.5), "wins": interval(0.6)}
        return {"mean": interval(mean), **more, "values": [mean] * 3}

    alone = {"mean": {"mean": 0.25, "low": None, "high": None}, "values": [0.25]}
    known = {"base": {"mean": interval(0.5), "values": [0.5] * 3}}
    known |= {"tuned": variant(0.6125), "steered": variant(0.7), "both": variant(0.8)}
    sections = {
        "Rewards <i>": [
            {"name": "reward", "less_is_better": False, "prompts": [0, 1, 2], "variants": known},
            {"name": "none", "less_is_better": True, "prompts": [], "variants": {}},
        ],
        "Text": [
            {"name": "cer", "less_is_better": True, "prompts": [0], "variants": {"base": alone}}
        ],
    }
    content = {"command": "python scripts/evaluate.py '<script>'", "sections": sections}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_alarm_s_moment_is_the_one_of_the_comparison(tmp_path):
    out = training(tmp_path / "run")
    found = page.alarms(checks.read(out / "checks.csv"))
    raised = hacked(torch.tensor(TRAIN), torch.tensor(QUALITY), 3)
    assert (
        found["held_out/quality"] == [s for s, r in zip(STEPS, raised, strict=True) if r] == [200]
    )
    assert "held_out/reward" not in found
    text = page.write(out).read_text("utf-8")
    assert "held_out/quality fell while train/reward rose" in text
    assert "first seen at step 200" in text
    assert Page(text).all("text", "mark")


def test_it_is_titled_by_the_prompts_and_its_curves_are_explained(tmp_path):
    out = training(tmp_path / "some-folder")
    (out / "checks.json").write_text(json.dumps({"held_out": ["<one>", "two"], "trained_on": []}))
    found = read(page.write(out))
    assert found.all("h1")[0][1] == "Fine-tuning of tiny-sd3, checked on <one>, two"
    notes = [text for _, text in found.all("p", "note")]
    assert "Each row shows one held-out prompt: <one>; two." in notes
    assert "Norm of the gradient before clipping." in notes
    (out / "checks.json").unlink()
    assert read(page.write(out)).all("title")[0][1] == "Fine-tuning of tiny-sd3"
    (out / "settings.yaml").write_text("model: null\n")
    assert read(page.write(out)).all("title")[0][1] == "Fine-tuning"


def test_no_alarm_is_said_too(tmp_path):
    out = training(tmp_path / "run", quality=[3.0, 3.1, 3.2, 3.3, 3.4, 3.5])
    text = page.write(out).read_text("utf-8")
    assert "No alarm" in text
    assert "Alarm" not in text
    assert page.alarms([]) == page.alarms([{"step": 0, "held_out/reward": 1.0}]) == {}


def test_the_numbers_are_those_of_the_tables(tmp_path):
    out = training(tmp_path / "run")
    found = read(page.write(out))
    shown = {float(attrs["value"] or "") for attrs, _ in found.all("data")}
    rows = checks.read(out / "checks.csv")
    for row in rows:
        assert {value for name, value in row.items() if name != "step"} <= shown
    best = max(rows, key=lambda row: row["held_out/corrected"])["step"]
    marked = [text for _, text in found.all("figcaption") if ", best" in text]
    assert [re.match(r"step (\d+)", text)[1] for text in marked] == [str(int(best))]  # type: ignore


def test_curves_pass_through_the_checks(tmp_path):
    """The path's points, put back through the axes, are the rewards."""
    found = read(page.write(training(tmp_path / "run")))
    path = found.all("path", "s0")[0][0]["d"] or ""
    points = [tuple(map(float, p.split())) for p in path.lstrip("M").split("L")]
    assert len(points) == len(STEPS)
    for values, axis, sign in ((STEPS, 0, 1), (TRAIN, 1, -1)):
        seen = [p[axis] for p in points]
        scale = (seen[-1] - seen[0]) / (values[-1] - values[0])
        assert sign * scale > 0
        for value, place in zip(values, seen, strict=True):
            assert place == pytest.approx(seen[0] + scale * (value - values[0]), abs=0.11)


def test_the_evaluation_has_a_column_a_variant(tmp_path):
    out = training(tmp_path / "run")
    evaluation(out / "eval")
    text = page.write(out).read_text("utf-8")
    heads = [text for attrs, text in Page(text).all("th") if attrs.get("scope") == "col"]
    assert heads[:6] == ["", "prompts", "base", "tuned", "steered", "both"]
    assert '<data value="0.6125">0.613</data> [0.513, 0.713]' in text.replace("0.612<", "0.613<")
    assert "./eval/evaluation.json" in text
    assert not re.search(r">-?(nan|None)", text)


def test_what_is_not_there_is_left_out(tmp_path):
    bare = training(tmp_path / "a", log=False, grids=False, settings="")
    found = read(page.write(bare))
    assert not found.all("img")
    (tmp_path / "b").mkdir()
    checks.append(tmp_path / "b" / "log.csv", {"step": 10, "loss": math.nan, "drift": math.inf})
    found = read(page.write(tmp_path / "b"))
    assert len(found.all("figure", "chart")) == 2
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"neither log\.csv nor checks\.csv"):
        page.write(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("checks.json", "[]", "contains a list"),
        ("evaluation.json", '{"a": 1}', "has no 'sections'"),
        ("eval/evaluation.json", "{", "Expecting"),
        ("checks.json", '{"held_out": [1]}', "held_out is invalid"),
        ("settings.yaml", "a: [", "expected node"),
        ("settings.yaml", "check: 3", "no mapping"),
        ("evaluation.json", '{"sections": []}', "sections is invalid"),
        ("evaluation.json", '{"sections": {"Text": {}}}', "section 'Text' is invalid"),
        ("evaluation.json", '{"sections": {"Text": [{"name": "cer"}]}}', "'Text' is invalid"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, why):
    out = training(tmp_path / "run", grids=False)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*{why}"):
        page.write(out)


@pytest.mark.parametrize("inside", ["name", "prompts", "variants", "mean", "low", "difference"])
def test_an_evaluation_that_is_damaged_inside_is_named(tmp_path, inside):
    """Any part of it may have another type."""
    evaluation(tmp_path)
    file = tmp_path / "evaluation.json"
    content = json.loads(file.read_text())
    assert read_evaluation(file) == content
    measure = content["sections"]["Rewards <i>"][0]
    tuned = measure["variants"]["tuned"]
    at = {"mean": tuned, "difference": tuned, "low": tuned["mean"]}.get(inside, measure)
    was = type(at[inside])
    for wrong in (None, [], {}, "x", True):
        if was is not type(wrong):
            at[inside] = wrong
            file.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=r"evaluation\.json is damaged .*'Rewards <i>'"):
                read_evaluation(file)


def test_names_and_settings_stay_text(tmp_path):
    out = training(tmp_path / NASTY[0].replace("/", ""), settings=SETTINGS)
    evaluation(out)
    found = read(page.write(out))
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "b"}
    assert any("reward: ocr <b>" in text for _, text in found.all("code"))
    for attrs, _ in found.all("a"):
        assert (out / (attrs["href"] or "")).exists()


def test_many_large_grids_are_thinned_out_and_stay_small(tmp_path):
    out = tmp_path / "run"
    steps = [10 * i for i in range(60)]
    (out / "grids").mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    noise(g, 512, 1024, 4).save(out / "grid.png")
    for i, step in enumerate(steps):
        checks.append(out / "checks.csv", {"step": step, "held_out/reward": -abs(i - 17)})
        shutil.copy(out / "grid.png", out / "grids" / f"{step:06d}.png")
    path = page.write(out)
    assert path.stat().st_size < 8e6
    found = read(path)
    captions = [re.match(r"step (\d+)", text) for _, text in found.all("figcaption")]
    shown = [int(step[1]) for step in captions if step]
    assert len(shown) <= 24
    assert {0, 170, 590} <= set(shown)
    assert shown == sorted(shown)


def test_checks_without_any_score_have_no_best(tmp_path):
    for step in (0, 5):
        checks.append(tmp_path / "checks.csv", {"step": step, "held_out/reward": math.nan})
    assert "(best)" not in page.write(tmp_path).read_text(encoding="utf-8")


def test_what_trainers_log_is_explained():
    scores, pred = torch.rand(1, 2), torch.rand(1, 2, 3)
    own = {"loss", "best_image", *_watched(scores, scores, pred, pred, pred, 0.1)}  # of GDRO
    own |= {"moved", "kl", "clipped", "ratio", "flat_groups", "dropped", "grad_norm", "seconds"}
    assert own - page._MEANS.keys() == set()
