"""The app without its page: what a form may ask for, who waits for whom, and what a run tells."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import contextlib
import dataclasses
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from steering import steer
from steering.lineage import Moment, Score
from tilt import loading
from tilt.app import inputs as app_form
from tilt.app import run as app_run
from tilt.app import view as app_view
from tilt.app.run import Desk, Done, Ended, Picture, Studio, Waiting
from tilt.commands import app

FORM = {
    "prompt": " a cat ",
    "model": "tiny-sd3",
    "lora": "",
    "reward": "jpeg",
    "particles": 3,
    "steps": "5",
    "guidance": "",
    "reward_scale": 100.0,
    "potential": "difference",
    "num_scores": 2,
    "min_ess": 1.0,
    "seed": 0,
}


def parse(**changed):
    return app_form.parse(FORM | changed, 64)


def test_a_form_becomes_a_wish():
    wish = parse(lora=None, steps=" 7", guidance="3", min_ess=0.5)
    assert (wish.prompt, wish.reward, wish.particles, wish.lora) == ("a cat", "jpeg", 3, None)
    assert wish.call["num_inference_steps"] == 7
    assert wish.call["guidance_scale"] == 3.0
    assert (wish.settings.min_ess, wish.settings.num_scores) == (0.5, 2)


def test_what_is_left_empty_is_the_models_own():
    own = parse(steps="")
    assert own.call == app_form.tiny.call_defaults("tiny-sd3")
    assert parse(reward=" ").reward == "clip(tiny)"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": 3}, "prompt is 3: write text"),
        ({"prompt": "\ud83d"}, "UTF-8"),
        ({"model": ""}, "model is empty"),
        ({"model": None}, "model is empty"),
        ({"model": "tiny-sd33"}, "tiny-sd3"),
        ({"model": "/nowhere/at all"}, "no model /nowhere/at all"),
        ({"particles": 10_000}, "particles is 10000: give a whole number from 1 to 64"),
        ({"particles": 0}, "from 1 to 64"),
        ({"particles": 2.5}, "2.5"),
        ({"particles": None}, "particles is empty"),
        ({"particles": float("nan")}, "nan"),
        ({"particles": "8"}, "'8'"),
        ({"steps": "0"}, "steps is 0"),
        ({"steps": "ten"}, "steps is 'ten'"),
        ({"steps": "7.5"}, "steps is 7.5"),
        ({"steps": "1000000000"}, "from 1 to 1000"),
        ({"steps": "2"}, "no step to score"),
        ({"guidance": "inf"}, "guidance is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": float("inf")}, "seed is inf"),
        ({"reward_scale": float("nan")}, "λ is nan"),
        ({"reward_scale": None}, "λ is empty"),
        ({"potential": "diference"}, "'difference'"),
        ({"num_scores": 0}, "number of scores is 0"),
        ({"guidance": "strong"}, "guidance is 'strong'"),
        ({"min_ess": 1.5}, "min_ess"),
        ({"reward": "jpeg +"}, "jpeg"),
        ({"reward": "os:system('true')"}, "os:system would import code"),
        ({"reward": "jpeg + min(clip, 0.5*lcb(os:system, kappa=1))"}, "import code"),
        ({"reward": "min(jpeg, objects(detector=this:c))"}, "import code by detector='this:c'"),
        ({"reward": "clip(/etc)"}, "reaches outside of Tilt by source='/etc'"),
        ({"reward": "calibrated(jpeg, file=/etc/passwd)"}, "start the app with --reward"),
        ({"reward": "jpg"}, "did you mean 'jpeg'"),
        ({"reward": "critic"}, "critic(FOLDER)"),
    ],
)
def test_refused_in_one_sentence(changed, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        parse(**changed)
    assert "\n" not in str(refused.value)


def test_only_the_command_line_may_import_a_reward():
    assert app_form.parse(FORM | {"reward": "math:sqrt"}, 64, trusted="math:sqrt").own
    assert not app_form.parse(FORM | {"reward": "jpeg"}, 64, trusted="math:sqrt").own
    with pytest.raises(ValueError, match="--reward"):
        app_form.parse(FORM | {"reward": "math:log"}, 64, trusted="math:sqrt")


@pytest.mark.parametrize(
    ("weights", "model", "spec"),
    [
        ({"clip": 1.0, "ocr": 0.5}, "tiny-sd", "clip(tiny) + 0.5*ocr"),
        ({"clip": 2.0, "jpeg": -0.1}, "owner/model", "2*clip - 0.1*jpeg"),
        ({}, "tiny-sd", ""),
    ],
)
def test_the_builder_writes_a_spec(weights, model, spec):
    assert app_form.spec_of(weights, model) == spec


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="weight is empty"):
        app_form.spec_of({"clip": None}, "tiny-sd")


class Work:
    """Draws wishes in as many steps as are allowed, one `go` each; knows who is drawing."""

    def __init__(self):
        self.at_once = threading.Semaphore(1)
        self.go = threading.Semaphore(0)
        self.began = []

    def __call__(self, wish, emit):
        assert self.at_once.acquire(blocking=False), "two runs at once"
        try:
            self.began.append(wish.prompt)
            for step in range(3):
                emit(Moment(step, 3))
                assert self.go.acquire(timeout=30)
            if wish.prompt == "bad":
                raise ValueError("no such\n thing")
            if wish.prompt == "broken":
                raise RuntimeError("CUDA is on fire")
            emit(Done((), 0.0, Path("report.html")))
        finally:
            self.at_once.release()


def told(events):
    """The next event that says something."""
    return next(event for event in events if event is not None)


def rest(events):
    return [event for event in events if event is not None]


def wish(prompt):
    return dataclasses.replace(parse(), prompt=prompt)


def test_two_sessions_take_turns_in_order():
    work = Work()
    desk = Desk(work)
    first, second = desk.run("a", wish("one")), desk.run("b", wish("two"))
    assert told(first) == Moment(0, 3)
    assert told(second) == Waiting(1)
    work.go.release(6)
    assert isinstance(rest(first)[-1], Done)
    own = rest(second)
    assert own[:3] == [Moment(step, 3) for step in range(3)]
    assert isinstance(own[-1], Done)
    assert work.began == ["one", "two"]


def test_a_session_stops_its_own_run_only():
    work = Work()
    desk = Desk(work)
    first, second = desk.run("a", wish("one")), desk.run("b", wish("two"))
    assert told(first) == Moment(0, 3)
    assert told(second) == Waiting(1)
    desk.stop("b")
    assert rest(second) == [Ended("Stopped before its first step.", stopped=True)]
    work.go.release(3)
    assert isinstance(rest(first)[-1], Done)
    assert work.began == ["one"]


def test_stop_ends_a_run_at_its_next_step():
    work = Work()
    desk = Desk(work)
    events = desk.run("a", wish("one"))
    assert told(events) == Moment(0, 3)
    desk.stop("a")
    work.go.release()
    assert rest(events) == [Ended("Stopped at step 1 of 3.", stopped=True)]


def test_a_page_that_is_closed_stops_its_run():
    work = Work()
    desk = Desk(work)
    with contextlib.closing(desk.run("a", wish("one"))) as events:
        assert told(events) == Moment(0, 3)
    work.go.release()  # one step, not all
    second = desk.run("b", wish("two"))
    work.go.release(3)
    assert isinstance(rest(second)[-1], Done)


def test_who_comes_third_hears_when_the_line_moves():
    work = Work()
    desk = Desk(work)
    first, second, third = (desk.run(name, wish(name)) for name in "abc")
    assert told(first) == Moment(0, 3)
    assert told(second) == Waiting(1)
    assert told(third) == Waiting(2)
    desk.stop("b")
    assert told(third) == Waiting(1)
    work.go.release(6)
    assert isinstance(rest(first)[-1], Done)
    assert isinstance(rest(third)[-1], Done)
    assert rest(second)[-1].stopped


def test_what_goes_wrong_is_told_and_the_next_run_works(caplog):
    work = Work()
    desk = Desk(work)
    work.go.release(9)
    assert rest(desk.run("a", wish("bad")))[-1] == Ended("no such thing")
    broken = rest(desk.run("a", wish("broken")))[-1]
    assert "CUDA is on fire" in broken.sentence
    assert "A run failed" in caplog.text
    assert isinstance(rest(desk.run("a", wish("good")))[-1], Done)


CPU = torch.device("cpu")


def studio(tmp_path):
    return Studio(CPU, torch.float32, tmp_path)


def test_a_run_gives_what_steer_gives_and_keeps_the_model(model, tmp_path, monkeypatch):
    asked = parse(model=model)
    call = {"height": 16, "width": 16}
    asked = dataclasses.replace(asked, call=asked.call | call)
    desk = Desk(studio(tmp_path).draw)
    events = rest(desk.run("a", asked))
    moments = [event for event in events if isinstance(event, Moment)]
    assert [moment.step for moment in moments] == list(range(5))
    assert sum(moment.score is not None for moment in moments) == 2
    done = events[-1]
    assert isinstance(done, Done)

    pipe = loading.load_pipeline(model, torch.float32)
    reward = app_run.rewards.load("jpeg")
    same = steer(pipe, "a cat", reward, 3, asked.settings, progress=False, **asked.call)
    by_reward = same.rewards[0].sort(descending=True)
    assert [picture.reward for picture in done.pictures] == by_reward.values.tolist()
    for picture, index in zip(done.pictures, by_reward.indices.tolist(), strict=True):
        assert picture.particle == index
        with Image.open(picture.file) as image:
            assert image.tobytes() == same.images[0][index].tobytes()
    assert "a cat" in done.report.read_text(encoding="utf-8")
    assert sum(picture.weight for picture in done.pictures) == pytest.approx(1)

    monkeypatch.setattr("tilt.loading.load_pipeline", None)  # not needed again
    again = rest(desk.run("a", asked))[-1]
    assert [picture.reward for picture in again.pictures] == by_reward.values.tolist()
    assert again.pictures[0].file.parent != done.pictures[0].file.parent


def test_a_run_is_stopped_inside_the_model(model, tmp_path):
    asked = parse(model=model, steps="500")
    asked = dataclasses.replace(asked, call=asked.call | {"height": 16, "width": 16})
    desk = Desk(studio(tmp_path).draw)
    events = desk.run("a", asked)
    while not isinstance(told(events), Moment):
        pass
    desk.stop("a")
    assert re.fullmatch(r"Stopped at step \d+ of 500\.", rest(events)[-1].sentence)
    assert not [*tmp_path.iterdir()]


def test_old_runs_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(app_run, "KEPT", 2)
    own = studio(tmp_path)
    folders = [own._new_folder() for _ in range(3)]
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": "clip"}, "give a folder"),
        ({"reward": "ocr"}, "a cat"),
        ({"reward": "dino(tiny)"}, "reference"),
        ({"model": "nobody/has-this"}, "give a folder that holds it"),
        ({"lora": "nobody/has-this"}, "the LoRA nobody/has-this"),
        ({"lora": "/nowhere/lora"}, "there is no /nowhere/lora"),
    ],
)
def test_what_is_not_there_is_answered_by_a_sentence(changed, said, model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.towers.model_cache._MODELS", {})
    ended = rest(Desk(studio(tmp_path).draw).run("a", parse(**{"model": model} | changed)))[-1]
    assert isinstance(ended, Ended), ended
    assert said in ended.sentence
    assert "failed" not in ended.sentence


def scored(ancestors, previews=True):
    k = 3
    pictures = torch.zeros(1, k, 3, 8, 8, dtype=torch.uint8) if previews else None
    weights = torch.tensor([[0.7, 0.3, 0.0]]).log()
    rewards, yes = torch.tensor([[0.25, 0.5, 0.75]]), torch.tensor([True])
    return Score(4, rewards, weights, torch.tensor([1.7]), torch.tensor([ancestors]), yes, pictures)


def test_a_score_shows_weights_parents_and_the_dead():
    shown = app_view.score(scored([0, 1, 0]), 10, before=scored([2, 2, 0]))
    assert "Step 5 of 10 · ESS 1.7 of 3 · 1 of 3 replaced" in shown
    tiles = re.findall("<figure.*?</figure>", shown)
    assert len(tiles) == 3
    for tile, weight, parent, fate in zip(
        tiles, ("70 %", "30 %", "0 %"), (2, 2, 0), ("×2", "×1", "ends"), strict=True
    ):
        assert f"← {parent} · {fate}" in tile
        assert weight in tile
        assert ("dead" in tile) == (fate == "ends")
        assert "data:image/webp;base64," in tile
    kept = app_view.score(scored([0, 1, 2], previews=False), 10)
    assert "all kept" in kept
    assert "←" not in kept
    assert "<img" not in kept


def test_text_is_escaped(tmp_path):
    attack = "<img src=x onerror=alert(1)>"
    for shown in (app_view.message(attack, "refused"), app_view.progress(attack + '"')):
        assert "<img" not in shown
        assert '""' not in shown
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    done = Done((Picture(0, tmp_path / "0.png", 0.5, 1.0),), 1.5, tmp_path / 'a"b<.html')
    shown = app_view.pictures(done, app_view.file_link, 3.0)
    assert 'a"b' not in shown
    assert "b<" not in shown
    assert "Open the report" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "tiny-sd33"], "tiny-sd3"),
        (["--max-particles", "0"], "--max-particles"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_the_command_line_is_refused_in_one_sentence(arguments, said, capsys):
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tilt app: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_gradio_the_app_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tilt.app.page", raising=False)
    assert app.main([]) == 2
    assert "pip install 'tilt-diffusion[app]'" in capsys.readouterr().err
