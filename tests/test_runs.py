"""tilt.runs: the folder of a run, whose results are whole or not there, and never mixed."""

import contextlib
import json
import resource
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines
import torch
from PIL import Image
from saved_runs import save, save_run

from steering import FeynmanKac
from steering.manifest import fingerprint
from tilt import runs
from tilt.prompts import Prompt
from tilt.report import steered as page

ASKED = {"settings": {"particles": 3}, "prompts": [{"text": "a"}]}
ASKED |= {"command": ["tilt", "steer"], "machine": {}, "versions": {}}


class Result:
    """A Steered as `keep` sees it."""

    def save(self, folder, report=True):
        folder.mkdir(parents=True)
        (folder / "picture.png").write_bytes(b"picture")


RESULTS: Any = {"steered": Result()}


@contextlib.contextmanager
def full_disk():
    """No file can grow: what is written is refused by the system, for root as well."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(runs, "datetime", Stopped)
    names = [runs.new_folder(tmp_path / "out").name for _ in range(3)]
    assert names == ["2026-01-02-030405", "2026-01-02-030405-2", "2026-01-02-030405-3"]


def test_default_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot read or write .*another out="):
        runs.new_folder(tmp_path / "out")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ASKED | {"results": {}}),  # as Steered.save() leaves it
        '{"name": "an app of the web"}',
        "[]",
        "no JSON",
    ],
)
def test_manifest_of_something_else_is_refused_and_stays(tmp_path, content, resume):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"not the manifest of a run.*another out="):
        runs.open_run(tmp_path, ASKED, resume=resume)
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize("name", ["report.html", "settings.yaml", "notes.txt", "lora"])
def test_a_folder_that_holds_something_else_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("of a training run")
    (tmp_path / ".hidden").touch()
    with pytest.raises(
        ValueError, match=rf"other files, such as {name}, and no run; .*another out="
    ):
        runs.open_run(tmp_path, ASKED, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", name]
    (tmp_path / name).unlink()
    runs.open_run(tmp_path, ASKED, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_results_without_the_manifest_of_their_run_are_not_taken_for_ours(tmp_path, resume):
    (tmp_path / "0000-holidays").mkdir()
    with pytest.raises(ValueError, match="and no run"):
        runs.open_run(tmp_path, ASKED, resume=resume)


def test_a_run_that_finished_nothing_is_begun_anew(tmp_path):
    runs.open_run(tmp_path, ASKED, resume=False)
    other = ASKED | {"settings": {"particles": 4}}
    runs.open_run(tmp_path, other, resume=False)
    assert json.loads((tmp_path / "manifest.json").read_text()) == other


@pytest.mark.parametrize("resume", [False, True])
def test_folder_that_takes_no_files_is_refused(tmp_path, resume):
    if resume:
        runs.open_run(tmp_path, ASKED, resume=False)
        runs.keep(tmp_path / "0000-a", RESULTS)
    with full_disk(), pytest.raises(ValueError, match=r"cannot read or write .*another out="):
        runs.open_run(tmp_path, ASKED, resume=resume)


def test_carrying_on_leaves_the_manifest_as_it_was(tmp_path):
    runs.open_run(tmp_path, ASKED | {"command": ["first"]}, resume=False)
    runs.keep(tmp_path / "0000-a", RESULTS)
    runs.open_run(tmp_path, ASKED | {"command": ["second"]}, resume=True)
    assert json.loads((tmp_path / "manifest.json").read_text())["command"] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000-a", "manifest.json"]


def test_disk_that_is_full_says_how_to_carry_on(tmp_path):
    runs.keep(tmp_path / "0000-a", RESULTS)
    sentence = rf"too large.*are kept: fix the cause.*--out {tmp_path} --resume"
    with full_disk(), pytest.raises(ValueError, match=sentence):
        runs.keep(tmp_path / "0001-b", RESULTS)
    assert [path.name for path in tmp_path.iterdir()] == ["0000-a"]


def test_pictures_that_are_gone_say_how_to_carry_on(tmp_path):
    with pytest.raises(ValueError, match=rf"No such file.*0000-a.*--out {tmp_path} --resume"):
        runs.draw(tmp_path, [tmp_path / "0000-a"])


def test_results_of_other_weights_are_refused(tmp_path):
    unet, vae, preview = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    parts = {"unet": unet, "vae": vae, "preview": preview}
    weights = {name: fingerprint(part) for name, part in parts.items()}
    pipe = SimpleNamespace(components={"unet": unet, "vae": vae, "tokenizer": object()})
    folder = tmp_path / "0000-a"
    (folder / "steered").mkdir(parents=True)
    (folder / "steered" / "manifest.json").write_text(json.dumps({"weights": weights}))
    runs.check_weights([folder], pipe, preview)
    with torch.no_grad():
        unet.weight += 1
    sentence = rf"0000-a was generated with other weights .*\(unet\).*{tmp_path}.* another --out"
    with pytest.raises(ValueError, match=sentence):
        runs.check_weights([folder], pipe, preview)
    with pytest.raises(ValueError, match=r"\(preview, unet\)"):
        runs.check_weights([folder], pipe)


def shares_of_two_seeds(out, picture):
    prompts = [Prompt("a", 1), Prompt("b", 2, (str(picture),))]
    return runs.divide(out, prompts, 1)


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def compared(images, prompts, *, references=None):
    return brightness(images, prompts)


@pytest.fixture
def kinds():
    call = {"particles": 2, "num_inference_steps": 2, "settings": FeynmanKac(min_ess=0)}
    return {"steered": call, "plain": call | {"progress": False}}


def test_every_seed_is_checked_before_any_step(tmp_path, kinds):
    """What is wrong with the second seed alone, with no look at its picture."""
    shares = shares_of_two_seeds(tmp_path, tmp_path / "red.png")
    pipe = tiny_pipelines.sd()
    runs.check_calls(pipe, compared, shares, kinds)
    with pytest.raises(ValueError, match="this reward takes no references"):
        runs.check_calls(pipe, brightness, shares, kinds)


def test_pictures_are_opened_when_their_seed_begins_and_once(tmp_path, kinds, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    opened, picture = [], runs._picture
    monkeypatch.setattr(runs, "_picture", lambda n: opened.append(Path(n).name) or picture(n))
    shares = shares_of_two_seeds(tmp_path, tmp_path / "red.png")
    seen = []
    for folder, results in runs.steer_pending(tiny_pipelines.sd(), compared, shares, kinds):
        assert list(results) == ["steered", "plain"]
        seen.append((folder.name, list(opened)))
    assert seen == [("0000-a", []), ("0001-b", ["red.png"])]


@pytest.mark.parametrize("content", ["[]", "3", "{}", "null", '"x"', "{", "", "\x00", "[" * 5000])
@pytest.mark.parametrize("name", ["manifest.json", "0000-a/steered/manifest.json", "lineage.json"])
def test_damaged_files_of_a_run_are_named(name, content, tmp_path):
    """Whatever reads them: carrying the run on, its pictures, its report."""
    save_run(tmp_path, ["a"], [4, 2], compare=False)
    (folder,) = tmp_path.glob("0000-*")
    file = folder / "steered" / Path(name).name if "/" in name or "lin" in name else tmp_path / name
    file.write_text(content, encoding="utf-8")
    calls: list[Any] = [lambda: runs.draw(tmp_path, [folder])]
    if name == "manifest.json":
        calls.append(lambda: runs.open_run(tmp_path, ASKED, resume=True))
    if "/" in name and content != "{}":  # as of a pipeline without networks
        calls.append(lambda: runs.check_weights([folder], SimpleNamespace(components={})))
    for call in calls:
        with pytest.raises(ValueError, match=rf"{file}|{folder}") as refused:
            call()
        assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "lineage.json"])
def test_every_entry_that_a_report_reads_may_be_damaged(file, tmp_path):
    """Each value of the two files in turn becomes one of another kind."""
    folder = save(tmp_path / "a", ["a"], [4, 2])
    whole = json.loads((folder / file).read_text())
    refused = 0
    for place in places(whole):
        for wrong in (None, "x", 3, [], {}):
            damaged = json.loads(json.dumps(whole))
            inner = damaged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = wrong
            (folder / file).write_text(json.dumps(damaged))
            with contextlib.suppress(ValueError, OSError):
                page.write(folder)
                refused -= 1
            refused += 1
    assert refused > 30


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything lies in some JSON: of a list the first entry."""
    if isinstance(value, dict):
        inner = [place for key in value for place in places(value[key], (*at, key))]
    else:
        inner = places(value[0], (*at, 0)) if isinstance(value, list) and value else []
    return [at, *inner] if at else inner
