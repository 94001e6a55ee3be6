"""Evaluation: its statistics against enumeration and closed forms, and the script end to end."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math

import numpy as np
import pytest
import torch
from pictures import assert_same_pictures
from PIL import Image
from torch import Tensor

from finetune import checks, lora
from finetune.network import part_of, targets_of
from rewards.geneval.rules import TASKS, overall
from rewards.models.ocr import MODES, distance
from steering import generators, tiny
from tilt import loading
from tilt.commands import evaluate as script
from tilt.measures import (
    Measure,
    compared,
    markdown,
    numbers,
    of_tasks,
    of_text,
    spread,
)
from tilt.statistics import bootstrap, wins
from tilt.variants import open_folder

PROMPTS = ('the word "CAT"', "three stars", "a red circle")
CALL = ["--call.num-inference-steps=4", "--call.guidance-scale=1.0"]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_interval_is_that_of_all_resamples():
    v, w = tensor(0.0, 1.0, 3.0, 7.0), tensor(1.0, 2.0, 1.5, 0.5)
    every = [torch.tensor(rows) for rows in itertools.product(range(4), repeat=4)]
    means = torch.stack([(w[i] * v[i]).sum() / w[i].sum() for i in every])
    found = bootstrap(v, draws(), weights=w, samples=40_000)
    assert found.mean == pytest.approx(float((w * v).sum() / w.sum()))
    slack = 4 * math.sqrt(0.025 * 0.975 / 40_000)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        assert (means < end - 1e-9).double().mean() <= share + slack
        assert (means <= end + 1e-9).double().mean() >= share - slack


def test_the_interval_of_many_prompts_is_the_normal_one():
    v = torch.randn(400, generator=draws(1), dtype=torch.float64)
    found = bootstrap(v, draws(), samples=8000)
    half = 1.96 * float(v.std()) / 20
    assert found.low == pytest.approx(found.mean - half, abs=0.06 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.06 * half)


def test_the_error_rate_is_all_errors_over_all_letters():
    wanted, read = ["CAT", "HOUSES", "IT"], ["CAT", "HORSE", "ITALIC"]
    cer = [MODES["cer"](text, [word]) for text, word in zip(read, wanted, strict=True)]
    columns = {
        name: {"base": tensor(*column)[:, None]}
        for name, column in (("exact", [1, 0, 0]), ("cer", cer))
    }
    _, measure = of_text(columns, {"": ""}, [0, 1, 2], [len(word) for word in wanted])
    errors = sum(
        distance(text.lower(), word.lower()) for text, word in zip(read, wanted, strict=True)
    )
    assert compared(measure, 0)["base"]["mean"].mean == pytest.approx(errors / 11)


def test_tasks_count_the_same_whatever_their_sizes_and_each_keeps_its_prompts():
    tags = [task for n, task in enumerate(TASKS, 2) for _ in range(n)]
    scores = torch.rand(len(tags), 1, generator=draws(2)).double()
    measures = of_tasks({"base": scores}, list(range(len(tags))), tags, TASKS)
    found = compared(measures[-1], 0)["base"]["mean"]
    assert found.mean == pytest.approx(overall(scores.flatten().tolist(), tags))
    assert [m.name for m in measures] == [*TASKS, "mean of 6 tasks"]
    assert measures[1].rows == [2, 3, 4]
    level = tensor(*(float(TASKS.index(tag)) for tag in tags))
    steady = bootstrap(level, draws(), strata=tags)
    assert (steady.low, steady.high) == (steady.mean, steady.mean)


def test_wins_count_ties_half():
    assert wins(tensor(1, 0, 2), tensor(0, 0, 3)).tolist() == [1, 0.5, 0]
    a = torch.randint(3, (50, 4), generator=draws(3))
    b = torch.randint(3, (50, 4), generator=draws(4))
    each = [
        sum(1 if x > y else 0.5 if x == y else 0 for x, y in zip(*row, strict=True)) / 4
        for row in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert wins(a, b).mean(-1).tolist() == each
    assert torch.equal(wins(a, b) + wins(b, a), torch.ones(50, 4).double())


def test_a_difference_is_paired():
    base = torch.randn(20, 3, generator=draws(5)).double()
    row = compared(Measure("r", {"base": base, "tuned": base + 0.25}, list(range(20))), 0)["tuned"]
    assert [row["difference"].low, row["difference"].high] == pytest.approx([0.25, 0.25])
    assert row["mean"].high - row["mean"].low > 0.1
    assert row["wins"].mean == 1
    less = Measure("r", {"base": base, "tuned": base + 0.25}, list(range(20)), less=True)
    assert compared(less, 0)["tuned"]["wins"].mean == 0


def test_equal_variants_tie():
    same = torch.rand(5, 2).double()
    row = compared(Measure("r", {"base": same, "tuned": same.clone()}, list(range(5))), 0)["tuned"]
    assert (row["difference"].low, row["difference"].high, row["wins"].mean) == (0, 0, 0.5)


def test_spread_is_the_mean_over_pairs():
    x = torch.randn(3, 4, 5, generator=draws(6))
    pairs = list(itertools.combinations(range(4), 2))
    cosine = torch.nn.functional.cosine_similarity
    slow = [sum(1 - float(cosine(s[i], s[j], dim=0)) for i, j in pairs) / len(pairs) for s in x]
    assert spread(x).tolist() == pytest.approx(slow, abs=1e-6)
    alike, apart = torch.ones(4, 4), 3 * torch.eye(4)
    assert spread(torch.stack([alike, apart])).tolist() == pytest.approx([0, 1], abs=1e-12)


def test_prompts_without_a_value_are_left_out_of_every_variant():
    values = {"base": tensor(1, 2, math.nan)[:, None], "tuned": tensor(3, math.inf, 1)[:, None]}
    measure = Measure("r", values, [4, 5, 6], tensor(1, 2, 3), ["a", "b", "a"]).finite()
    assert measure.rows == [4]
    assert measure.values["base"].tolist() == [[1]]
    assert measure.weights is not None
    assert (measure.weights.tolist(), measure.strata) == ([1], ["a"])
    none = measure.only([False])
    assert "no prompt has a value" in markdown([none], 0)
    assert numbers(none, 0)["variants"] == {}


def test_one_prompt_has_a_mean_and_no_interval():
    measure = Measure("r", {"base": tensor(0.5)[:, None]}, [0])
    assert "| 0.500 |" in markdown([measure], 0)
    told = numbers(measure, 0)["variants"]["base"]
    assert told == {"mean": {"mean": 0.5, "low": None, "high": None}, "values": [0.5]}
    with pytest.raises(ValueError, match="finite values"):
        bootstrap(tensor(1, math.nan), draws())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with prompts, a LoRA and an evaluation of all four variants in out/."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    pipe = tiny.load("tiny-sd3")
    part = part_of(pipe)
    network = getattr(pipe, part)
    for name, weight in lora.attach(network, targets_of(network), 2, 2, draws()).items():
        if "lora_B" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=draws(1)))
    lora.save(type(pipe), part, network, folder / "lora")
    assert script.main(words(folder)) == 0
    return folder


def words(folder, **changed: object) -> list[str]:
    given = {
        "prompts": folder / "prompts.txt",
        "out": folder / "out",
        "lora": folder / "lora",
        "images": 2,
        "reward": "jpeg + 0*clip(tiny)",
        "steer": "jpeg",
        "particles": 2,
        "filter.num_scores": 1,
    }
    return [
        f"--{key.replace('_', '-')}={value}"
        for key, value in (given | changed).items()
        if value is not None
    ] + CALL


def pixels(folder, variant: str, prompt: int) -> list[np.ndarray]:
    files = [folder / "out" / variant / f"{prompt:04d}-{j:02d}.png" for j in range(2)]
    return [np.array(Image.open(file)) for file in files]


def test_plain_variants_are_the_pipelines_own_pictures(done):
    prompts, call = [PROMPTS[1]] * 2, tiny.call_defaults("tiny-sd3")
    call |= {"num_inference_steps": 4, "guidance_scale": 1.0}
    pipe = tiny.load("tiny-sd3")
    for variant in ("base", "tuned"):
        if variant == "tuned":
            pipe.load_lora_weights(done / "lora")
        stock = pipe(prompts, generator=generators(0, prompts, 1), **call).images
        assert_same_pictures(pixels(done, variant, 1), stock)
    differ = [
        not np.array_equal(*pair)
        for pair in zip(pixels(done, "base", 1), pixels(done, "tuned", 1), strict=True)
    ]
    assert all(differ)


def test_the_numbers_are_those_of_the_pictures(done):
    told = json.loads((done / "out" / "evaluation.json").read_text())
    assert told["prompts"] == list(PROMPTS)
    sections = told["sections"]
    assert list(sections) == ["Rewards", "Text", "GenEval's tasks", "Diversity"]
    assert [m["name"] for m in sections["Rewards"]] == ["jpeg", "clip"]
    assert [m["prompts"] for m in sections["Text"]] == [[0]] * 4
    tasks = {m["name"]: m["prompts"] for m in sections["GenEval's tasks"]}
    assert tasks == {"counting": [1], "colors": [2], "mean of 2 tasks": [1, 2]}
    for variant in ("base", "tuned", "steered", "both"):
        with (done / "out" / variant / "rewards.csv").open(newline="") as file:
            scores = [float(row["jpeg"]) for row in csv.DictReader(file)]
        row = sections["Rewards"][0]["variants"][variant]
        assert row["mean"]["mean"] == pytest.approx(sum(scores) / 6)
        assert ("wins" in row) == (variant != "base")
    text = (done / "out" / "evaluation.md").read_text()
    assert text.count("\n## ") == 4
    assert "tilt evaluate --prompts=" in text
    with Image.open(done / "out" / "grid.png") as page:
        assert page.width > 4 * 2 * 128


def test_resuming_draws_what_is_missing_and_scores_by_another_reward(done, capsys):
    before = json.loads((done / "out" / "evaluation.json").read_text())
    lost = done / "out" / "both" / "0002-01.png"
    content = lost.read_bytes()
    lost.unlink()
    kept = done / "out" / "both" / "0001-01.png"
    stamp = kept.stat().st_mtime_ns
    assert script.main([*words(done, reward="clip(tiny)"), "--resume"]) == 0
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == stamp
    after = json.loads((done / "out" / "evaluation.json").read_text())
    assert after["sections"]["Rewards"] == before["sections"]["Rewards"][1:]
    assert after["sections"]["Diversity"] == before["sections"]["Diversity"]
    capsys.readouterr()
    for changed, message in (
        ({}, "add --resume"),
        ({"seed": 1}, "begun with --seed 0, not 1"),
        ({"dtype": "bfloat16"}, "begun with --dtype 'float32', not 'bfloat16'"),
    ):
        more = ["--resume"] if changed else []
        assert script.main([*words(done, **changed), *more]) == 2
        assert message in capsys.readouterr().err


def test_the_setting_that_made_other_weights_is_named(tmp_path):
    """Also to an evaluation that an older version began, which did not record it."""
    about = {"model": "m", "dtype": "float32", "lora": None, "quantize": "none"}
    about |= {"weights": {"unet": "1"}}
    before = {name: about[name] for name in ("model", "weights")}
    open_folder(tmp_path / "new", about, {}, resume=False)
    open_folder(tmp_path / "old", before, {}, resume=False)
    for run, name, other in (
        ("new", "dtype", "bfloat16"),
        ("new", "lora", "1f3a"),
        ("new", "quantize", "8bit"),
        ("old", "quantize", "8bit"),
    ):
        changed = about | {name: other, "weights": {"unet": "2"}}
        with pytest.raises(ValueError, match=f"begun with {name}={about[name]!r}, not '{other}'"):
            open_folder(tmp_path / run, changed, {}, resume=True)
    open_folder(tmp_path / "old", about, {}, resume=True)


def test_the_report_of_the_training_around_it_gets_the_table(done, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    assert script.main([*words(done), "--resume"]) == 0
    capsys.readouterr()
    checks.append(done / "log.csv", {"step": 1, "loss": 0.5})
    monkeypatch.setattr(loading, "load_pipeline", never)
    assert script.main([*words(done), "--resume"]) == 0  # it is finished
    with pytest.raises(AssertionError, match="was loaded"):
        script.main([*words(done, images=3), "--resume"])
    assert str(done / "report.html") in capsys.readouterr().out
    text = (done / "report.html").read_text(encoding="utf-8")
    told = json.loads((done / "out" / "evaluation.json").read_text())["sections"]
    for measure in (m for section in told.values() for m in section):
        assert html.escape(measure["name"]) in text
    mean = told["Rewards"][0]["variants"]["tuned"]["mean"]["mean"]
    assert f'<data value="{mean!r}">' in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"reward": None}, "set --prompts FILE, --out FOLDER and --reward SPEC"),
        ({"reward": ""}, "--reward is ''; give it a value, or leave it out"),
        ({"reward": "clop(tiny)"}, "did you mean 'clip'"),
        ({"reward": "ocr"}, "cannot score the prompt 'three stars'"),
        ({"reward": "dino(tiny)"}, "compares with reference images"),
        ({"steer": "ocr"}, "cannot score the prompt 'three stars'"),
        ({"particles": 0}, "must be set together"),
        ({"particles": 1}, "must be set together"),
        ({"steer": None}, "must be set together"),
        ({"images": 0}, "images is 0"),
        ({"objects": "clip(tiny)"}, "must be a single objects(...)"),
        ({"embed": "jpeg"}, "has no features"),
        ({"filter.reward_scal": 3}, "reward_scal"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    changed, message, done, no_model, capsys, tmp_path
):
    assert script.main(words(done, **({"out": tmp_path / "new"} | changed))) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": "no/such/lora"}, "there is no no/such/lora"),
        ({"call.num_inference_stps": 3}, "num_inference_stps"),
        ({"filter.score_to": 0.06}, "no step to score"),
    ],
)
def test_what_cannot_work_is_refused_before_a_picture_is_drawn(
    changed, message, done, capsys, tmp_path
):
    assert script.main(words(done, **({"out": tmp_path / "new"} | changed))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_other_folders_are_left_alone(done, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert script.main(words(done, out=tmp_path)) == 2
    (tmp_path / "manifest.json").write_text('{"plan": {}}')
    assert script.main([*words(done, out=tmp_path), "--resume"]) == 2
    told = capsys.readouterr().err
    assert "is not empty" in told
    assert "is not of an evaluation" in told
