"""scripts/steer.py at work: what it draws and writes, what it says, how it carries on."""

import dataclasses
import errno
import json
import shutil

import pytest
import tiny_pipelines
import torch
from command_line import EMBEDDED, SMALL, refused
from PIL import Image
from tqdm import tqdm

import rewards
from rewards.images import to_images
from steering import FeynmanKac
from tilt.commands import steer as script
from tilt.prompts import read


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory):
    """The folder of a run of three prompts, two seeds, and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "../../etc/pass:wd λ 猫", "seed": 7},
        {"prompt": "a red circle"},
    ]
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    out = folder / "out"
    arguments = [
        "--prompt-file",
        str(file),
        "--model",
        model,
        *SMALL,
        "--compare",
        "--out",
        str(out),
    ]
    assert script.main(arguments) == 0
    return out, arguments


def folders(out):
    return sorted(path for path in out.iterdir() if path.is_dir())


def test_output_folder_is_complete_and_its_names_are_safe(finished):
    out, _ = finished
    names = [path.name for path in folders(out)]
    assert names == ["0000-a-red-circle", "0001-etc-pass-wd", "0002-a-red-circle"]
    assert {path.name for path in out.iterdir()} == {
        *names, "manifest.json", "grid.png", "history.png", "report.html"
    }  # fmt: skip
    for folder in folders(out):
        assert len(list((folder / "steered").glob("*.png"))) == 3
        assert len(list((folder / "plain").glob("*.png"))) == 3


def test_saved_pictures_score_what_is_reported_and_carry_their_parameters(finished):
    out, _ = finished
    reward = rewards.load("jpeg")
    for folder in out.glob("*/*/"):
        results = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["results"]
        for name, reported in zip(results["files"][0], results["rewards"][0], strict=True):
            with Image.open(folder / name) as picture:
                about = json.loads(picture.info["parameters"])
                score = reward(to_images(picture.convert("RGB")), [about["prompt"]]).item()
            assert score == pytest.approx(reported, abs=1e-6)
            said = [value for value in about.values() if isinstance(value, float)]
            assert pytest.approx(score, abs=1e-6) in said
            assert about["prompt"] == results["prompts"][0]
            assert about["run"]["seed"] == (7 if "etc" in str(folder) else 0)


def test_repeated_prompts_differ_and_the_first_plain_particle_is_the_plain_sample(finished, model):
    """Against the pipeline's own call with the generators and the scheduler that steer() names."""
    from steering import generators
    from steering.schedulers import stochastic
    from tilt.loading import load_pipeline

    out, _ = finished
    pipe = load_pipeline(model, torch.float32)
    prompts = ["a red circle", "a red circle"]
    gens = generators(0, prompts, 3)
    for i, folder in enumerate(["0000-a-red-circle", "0002-a-red-circle"]):
        mine = gens[3 * i : 3 * i + 3]
        pipe.scheduler = stochastic(pipe.scheduler, FeynmanKac().noise, mine)
        stock = pipe(prompts[i], num_inference_steps=5, num_images_per_prompt=3, generator=mine)
        for j, image in enumerate(stock.images):
            with Image.open(out / folder / "plain" / f"0000-{j:02d}.png") as saved:
                assert list(saved.tobytes()) == list(image.tobytes())


def test_manifest_repeats_the_run(finished):
    out, arguments = finished
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    for field in dataclasses.fields(FeynmanKac):
        assert field.name in manifest["settings"]
    assert [prompt["seed"] for prompt in manifest["prompts"]] == [0, 7, 0]
    assert manifest["prompts"][1]["text"].endswith("wd λ 猫")
    assert {"model", "reward", "particles", "steps", "dtype"} <= manifest["settings"].keys()
    known = {"device", "attention", "compile", "max_batch", "spread", "offload"}
    assert manifest["machine"].keys() == known
    assert manifest["machine"]["device"] != "auto"
    assert manifest["command"] == ["tilt", "steer", *arguments]
    assert {"python", "torch", "diffusers"} <= manifest["versions"].keys()


def test_a_folder_with_a_run_is_not_overwritten(finished, capsys):
    _, arguments = finished
    assert "--resume" in refused(capsys, *arguments)


@pytest.mark.usefixtures("no_model")
def test_resume_of_a_finished_run_loads_and_draws_nothing(finished, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a reward was loaded")

    out, arguments = finished
    monkeypatch.setattr(rewards, "load", never)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert script.main([*arguments, "--resume"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [str(out / name) for name in ("grid.png", "history.png", "report.html")]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "report.html").unlink()  # as where the run was cut off before it
    assert script.main([*arguments, "--resume"]) == 0
    assert (out / "report.html").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--particles", "4"], "--particles 3, not 4"),
        (["--reward-scale", "3"], "--reward-scale 100.0, not 3.0"),
        (["another prompt"], "other prompts"),
    ],
)
def test_resume_with_other_settings_is_refused(finished, capsys, more, said):
    _, arguments = finished
    assert said in refused(capsys, *arguments, *more, "--resume")


def test_interrupted_run_keeps_what_is_finished_and_resumes_to_the_same(
    finished, tmp_path, capsys, monkeypatch
):
    out, arguments = finished
    again = [*arguments, "--out", str(tmp_path)]
    keep = script.runs.keep

    def interrupt(folder, results):
        if folders(tmp_path):
            (tmp_path / f".{folder.name}.part").mkdir()  # cut off in the middle of writing
            raise KeyboardInterrupt
        keep(folder, results)

    monkeypatch.setattr(script.runs, "keep", interrupt)
    assert script.main(again) == 130
    err = capsys.readouterr().err
    assert "1 of 3" in err
    assert f"--out {tmp_path} --resume" in err
    assert len(folders(tmp_path)) == 2  # one finished, one part
    monkeypatch.undo()
    assert script.main([*again, "--resume"]) == 0
    for path in out.glob("*/*/*.png"):
        twin = tmp_path / path.relative_to(out)
        with Image.open(path) as one, Image.open(twin) as other:
            assert one.tobytes() == other.tobytes()


def test_interrupt_while_drawing_says_that_all_is_kept(finished, tmp_path, capsys, monkeypatch):
    before, arguments = finished
    out = tmp_path / "out"
    shutil.copytree(before, out)
    shutil.rmtree(next(out.glob("0001-*")))  # else there is nothing to do
    arguments = [str(out) if word == str(before) else word for word in arguments]

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.runs, "draw", interrupt)
    assert script.main([*arguments, "--resume"]) == 130
    assert f"3 of 3 are finished and kept: repeat the command with --out {out}" in (
        capsys.readouterr().err
    )


def test_resume_with_other_weights_under_the_same_name_is_refused(tmp_path, model, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, folder)
    arguments = ["one", "two", "--model", str(folder), *SMALL, "--out", str(out)]
    assert script.main(arguments) == 0
    shutil.rmtree(out / "0001-two")
    pipe = tiny_pipelines.sd()
    with torch.no_grad():
        pipe.unet.conv_in.weight *= 1.1
    pipe.save_pretrained(folder)
    capsys.readouterr()
    message = refused(capsys, *arguments, "--resume")
    assert "0000-one was generated with other weights" in message
    assert "(unet)" in message
    assert not (out / "0001-two").exists()


@pytest.mark.skipif(not EMBEDDED, reason="no embedded weights")
def test_finished_run_of_an_embedded_model_that_was_trained_anew_is_not_shown(tmp_path, capsys):
    arguments = ["a red star", "--model", "tiny-sd", "--reward", "jpeg", "--particles", "1"]
    arguments += ["--steps", "1", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--resume"]) == 0
    path = tmp_path / "0000-a-red-star" / "steered" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(manifest | {"weights": manifest["weights"] | {"unet": "0" * 16}}))
    capsys.readouterr()
    assert "was generated with other weights" in refused(capsys, *arguments, "--resume")


def test_prompts_of_many_seeds_have_one_bar_at_a_time_and_say_a_thing_once(
    model, tmp_path, monkeypatch, caplog
):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "one", "seed": {i}}}\n' for i in range(3)))
    open_bars, most = set(), []

    class Bar(tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            if not self.disable:
                open_bars.add(self)
                most.append(len(open_bars))

        def close(self):
            open_bars.discard(self)
            super().close()

    monkeypatch.setattr("steering.pipeline.tqdm", Bar)
    arguments = ["--prompt-file", str(file), "--model", model, *SMALL, "--compare"]
    assert script.main([*arguments, "--reward-scale", "1e-6", "--out", str(tmp_path / "o")]) == 0
    assert most == [1, 1, 1]
    assert open_bars == set()
    assert caplog.text.count("no particle was replaced") == 1


def test_full_disk_keeps_what_is_finished(finished, tmp_path, capsys, monkeypatch):
    from steering import Steered

    _, arguments = finished
    save, out = Steered.save, tmp_path / "out"
    first = out / "0000-a-red-circle"

    def full(self, folder, **more):
        if first.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder, **more)

    monkeypatch.setattr(Steered, "save", full)
    assert script.main([*arguments, "--out", str(out)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("tilt steer: ")
    assert "No space left on device); finished results are kept" in err
    assert f"--out {out} --resume" in err
    assert folders(out) == [first]


def test_resume_compares_the_dtype_that_auto_stands_for(finished, capsys, monkeypatch):
    """As on a machine with an accelerator, where auto is a half type."""
    out, arguments = finished
    settings = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert settings["dtype"] == "float32"
    monkeypatch.setattr(script.loading, "pick_dtype", lambda name, device: torch.bfloat16)
    assert "--dtype 'float32', not 'bfloat16'" in refused(capsys, *arguments, "--resume")


@pytest.mark.parametrize("settings", [["--particles", "1"], ["--reward-scale", "0"]])
def test_a_run_without_scores_on_the_way_needs_no_step_for_them(model, tmp_path, settings):
    arguments = ["one", "--model", model, "--reward", "jpeg", "--particles", "2", "--steps", "1"]
    assert script.main([*arguments, *settings, "--out", str(tmp_path)]) == 0


def test_one_grid_of_pictures_is_in_memory_at_a_time(finished, tmp_path, monkeypatch):
    """Read by read: a grid is drawn before the next one's pictures are opened."""
    out, _ = finished
    events = []
    pictures = script.runs.pictures
    rows, comparison = pictures.rows, pictures.comparison
    monkeypatch.setattr(pictures, "rows", lambda *args: [events.append("read"), rows(*args)][1])
    drawn = lambda page: [events.append("draw"), comparison(page)][1]  # noqa: E731
    monkeypatch.setattr(pictures, "comparison", drawn)
    monkeypatch.setattr(script.runs, "_ROWS_PER_GRID", 2)
    shutil.copytree(out, tmp_path / "run")
    paths = script.runs.draw(tmp_path / "run", folders(out))
    names = [path.name for path in paths]
    assert names == ["grid-2.png", "grid.png", "history.png", "report.html"]
    assert events == ["read", "read", "draw", "read", "draw"]


def test_another_reward_scores_on_the_way(model, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["a", "--model", model, "--reward", "jpeg", "--on-the-way", "0.5*jpeg", "--compare"]
    words += ["--steps", "4", "--particles", "2", "--height", "32", "--width", "32"]
    assert script.main([*words, "--out", str(out)]) == 0
    read = lambda path: json.loads((path / "manifest.json").read_text(encoding="utf-8"))  # noqa: E731
    assert read(out)["settings"]["on_the_way"] == "0.5*jpeg"
    assert read(next(out.glob("*/steered")))["on_the_way"] == "0.5*jpeg"
    assert read(next(out.glob("*/plain")))["on_the_way"] is None
    capsys.readouterr()
    assert script.main([*words[:5], "--on-the-way", "ocr", "--out", str(tmp_path / "other")]) == 2
    assert "quot" in capsys.readouterr().err  # ocr needs a text in quotes, said before the model


def test_prompts_per_call_share_a_folder(model, tmp_path):
    arguments = ["one", "two", "three", "--model", model, *SMALL, "--prompts-per-call", "2"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    assert [path.name for path in folders(tmp_path)] == ["0000-one", "0002-three"]
    saved = json.loads((tmp_path / "0000-one/steered/manifest.json").read_text())["results"]
    assert saved["prompts"] == ["one", "two"]


def test_references_reach_the_reward(model, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "references": ["red.png"]}\n')
    seen = []

    class Compare:
        name, differentiable, range = "compare", False, (0.0, 1.0)

        def __call__(self, images, prompts, *, references=None):
            seen.extend(zip(prompts, references or [], strict=True))
            return images.mean(dim=(1, 2, 3))

    reward = rewards.load(Compare())
    monkeypatch.setattr(rewards, "load", lambda spec, device=None, imports=False: reward)
    arguments = ["--prompt-file", str(file), "--model", model, *SMALL, "--out", str(tmp_path / "o")]
    assert script.main(arguments) == 0
    assert all(pictures == [] for prompt, pictures in seen if prompt == "a")
    assert all(pictures[0].getpixel((0, 0)) == (255, 0, 0) for p, pictures in seen if p == "b")


def test_prompts_that_edit_images_pass_each_its_own(tmp_path, monkeypatch):
    import tiny_pipelines

    tiny_pipelines.img2img().save_pretrained(tmp_path / "model")
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a", "image": "red.png"},
        {"prompt": "b", "image": "blue.png"},
        {"prompt": "c", "image": "red.png", "references": ["blue.png"]},
        {"prompt": "a", "image": "red.png", "seed": 3},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    out, seen = tmp_path / "out", []

    class Compare:
        name, differentiable, range = "compare", False, (0.0, 1.0)

        def __call__(self, images, prompts, *, references=None):
            assert references
            seen.extend(
                (p, *r[0].getpixel((0, 0))) for p, r in zip(prompts, references, strict=True)
            )
            return images.mean(dim=(1, 2, 3))

    reward = rewards.load(Compare())
    monkeypatch.setattr(rewards, "load", lambda spec, device=None, imports=False: reward)
    arguments = ["--prompt-file", str(file), "--model", str(tmp_path / "model"), "--reward", "x"]
    arguments += ["--particles", "2", "--steps", "4", "--out", str(out)]
    assert script.main(arguments) == 0
    assert set(seen) == {("a", 255, 0, 0), ("b", 0, 0, 255), ("c", 0, 0, 255)}
    assert [path.name for path in folders(out)] == ["0000-a", "0001-b", "0002-c", "0003-a"]
    wanted = json.loads((out / "manifest.json").read_text())["prompts"]
    assert [prompt.get("image", "")[-8:] for prompt in wanted[:2]] == ["/red.png", "blue.png"]
    assert script.main([*arguments, "--resume"]) == 0
    shutil.rmtree(out / "0001-b")
    seen.clear()
    assert script.main([*arguments, "--resume"]) == 0
    assert {prompt for prompt, *_ in seen} == {"b"}


def test_an_image_to_edit_is_refused_where_it_would_have_no_effect(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "image": "a.png"}\n')
    assert [prompt.image for prompt in read(file, images=True)] == [None, str(tmp_path / "a.png")]
    with pytest.raises(ValueError, match="line 2 has an image to edit, which only tilt steer"):
        read(file)
