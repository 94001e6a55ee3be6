"""scripts/steer.py from its command line: what it refuses, what it writes, how it carries on."""

import dataclasses
import json
import re
import shlex

import pytest
import torch
from PIL import Image

import rewards
from rewards.images import to_images
from scripts import steer as script
from steering import FeynmanKac, tiny
from tests import tiny_pipelines

SMALL = ["--steps", "5", "--particles", "3", "--num-scores", "2", "--reward", "jpeg"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A random-weight Stable Diffusion in a folder, as pipe.save_pretrained() leaves it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipelines.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model would be loaded: what is refused here is refused before that."""

    def load(*args, **kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(script.loading, "load_pipeline", load)


def refused(capsys, *argv: str) -> str:
    """The one sentence that these arguments are refused with."""
    assert script.main([*argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("steer.py: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reward", "jpg"], "'jpeg'"),
        (["--reward", "jpeg +"], "jpeg"),
        (["--potential", "diference"], "'difference'"),
        (["--resampler", "systemic"], "'systematic'"),
        (["--tempering", "liner"], "'linear'"),
        (["--partcles", "4"], "--particles"),
        (["--reward-scal=4"], "--reward-scale"),
        (["--particles", "0"], "1 or more"),
        (["--particles", "-3"], "1 or more"),
        (["--particles", "2.5"], "1 or more"),
        (["--reward-scale", "nan"], "finite"),
        (["--reward-scale", "inf"], "finite"),
        (["--score-from", "0.9", "--score-to", "0.1"], "score_from"),
        (["--score-from", "0.9", "--score-to", "1.0", "--steps", "4"], "no step to score"),
        (["--funnel", "2,4", "--num-scores", "2"], "grows"),
        (["--funnel", "9,9,9,9", "--steps", "20"], "grows"),
        (["--funnel", "a"], "--funnel.*'a'.*1 or more"),
        (["--funnel", "8,4.5"], "--funnel.*'4.5'.*1 or more"),
        (["--noise", "2"], "noise"),
        (["--reward", "clip(/nowhere)"], "no CLIP folder '/nowhere'"),
        (["--reward", "clip(random:0, batch_size=two)"], "batch_size is 'two'"),
        (["--reward", "ocr(upscale=x)"], "upscale is 'x'"),
        (["--reward", "math:pi"], "callable"),
        (["--reward", "os:system"], "the reward system is called as f"),
        (["--device", "cuda:99"], "--device|device cuda:99"),
        (["--dtype", "float8"], "float16"),
        (["--model", "tiny-sd33"], "tiny-sd3"),
        (["--model", "./nowhere"], "nowhere"),
        (["--resume"], "--out"),
        (["--steps", "0"], "1 or more"),
        (["--height", "64"], "--width"),
    ],
)
def test_refused_before_a_model_is_loaded(capsys, arguments, said):
    message = refused(capsys, "a cat", "--reward", "jpeg", *arguments)
    assert re.search(said, message), message


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "cannot read"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n  \n", "is empty"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "not UTF-8 .byte 3"),
        ("bad.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        ("list.jsonl", b'["a"]\n', "line 1 has no prompt"),
        ("none.jsonl", b'{"seed": 1}\n', "line 1 has no prompt"),
        ("key.jsonl", b'{"prompt": "a", "sede": 1}\n', "line 1 has the key 'sede'"),
        ("seed.jsonl", b'{"prompt": "a", "seed": "1"}\n', "line 1 has the seed '1'"),
        ("bool.jsonl", b'{"prompt": "a", "seed": true}\n', "line 1 has the seed True"),
        ("ref.jsonl", b'{"prompt": "a", "references": ["no.png"]}\n', "line 1 names the picture"),
        ("text.jsonl", b'{"prompt": "a", "references": ["text.png"]}\n', "is no picture"),
        ("cut.jsonl", b'{"prompt": "a", "references": ["cut.png"]}\n', "is no picture"),
        ("refs.jsonl", b'{"prompt": "a", "references": "no.png"}\n', "line 1 has references"),
        ("half.jsonl", b'{"prompt": "\\ud83d"}\n', "not UTF-8"),
    ],
)
def test_bad_prompt_files_are_refused(capsys, tmp_path, name, content, said):
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(capsys, "--prompt-file", str(tmp_path / name), "--reward", "jpeg")
    assert re.search(said, message), message


@pytest.mark.usefixtures("no_model")
def test_no_prompt_is_refused(capsys):
    assert "no prompt" in refused(capsys, "--reward", "jpeg")


@pytest.mark.usefixtures("no_model")
def test_ocr_without_quoted_text_is_refused(capsys):
    assert "a cat" in refused(capsys, 'the word "CAT"', "a cat", "--reward", "ocr")


@pytest.mark.usefixtures("no_model")
def test_folder_that_is_no_pipeline_is_refused(capsys, tmp_path):
    assert "model_index.json" in refused(capsys, "a cat", *SMALL, "--model", str(tmp_path))


@pytest.mark.usefixtures("no_model")
def test_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    arguments = ["a cat", *SMALL, "--out", str(tmp_path / "file" / "out")]
    assert "cannot write" in refused(capsys, *arguments)


def test_broken_model_folder_is_refused(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    out = str(tmp_path / "out")
    message = refused(capsys, "a cat", *SMALL, "--model", str(folder), "--out", out)
    assert "cannot load the model" in message


@pytest.mark.parametrize("flag", ["--model", "--lora", "--preview"])
def test_hub_id_without_network_names_the_folder_option(capsys, tmp_path, model, monkeypatch, flag):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False
    )
    arguments = ["a cat", *SMALL, "--model", model, "--out", str(tmp_path / "out")]
    message = refused(capsys, *arguments, flag, "nobody/has-this")
    assert message.endswith("nobody/has-this; with no network, give a folder that holds it\n")


@pytest.mark.usefixtures("no_model")
def test_default_reward_without_network_names_the_folder_option(capsys, model, monkeypatch):
    def no_session():
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", no_session)
    monkeypatch.setattr("rewards.towers._TOWERS", {})
    assert "give a folder" in refused(capsys, "a cat", "--model", model)


def test_keyword_that_the_pipeline_lacks_is_refused(capsys, tmp_path, model, monkeypatch):
    """The model has to be there to know; still no step is run, and a new try needs no new --out."""
    monkeypatch.setattr(script, "call_keywords", lambda args: {"guidance_scal": 3.0})
    arguments = ["a cat", *SMALL, "--model", model, "--out", str(tmp_path)]
    assert "guidance_scale=" in refused(capsys, *arguments)
    monkeypatch.undo()
    assert script.main([*arguments, "--guidance-scale", "2"]) == 0


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory):
    """The folder of a run of three prompts, two seeds, and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "../../etc/pass\u0000wd λ 猫", "seed": 7},
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
        *names, "manifest.json", "grid.png", "history.png"
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
    from steering.loading import load_pipeline
    from steering.schedulers import stochastic

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
    out, _ = finished
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    for field in dataclasses.fields(FeynmanKac):
        assert field.name in manifest["settings"]
    assert [prompt["seed"] for prompt in manifest["prompts"]] == [0, 7, 0]
    assert manifest["prompts"][1]["text"].endswith("wd λ 猫")
    assert {"model", "reward", "particles", "steps", "dtype"} <= manifest["settings"].keys()


def test_a_folder_with_a_run_is_not_overwritten(finished, capsys):
    _, arguments = finished
    assert "--resume" in refused(capsys, *arguments)


@pytest.mark.usefixtures("no_model")
def test_resume_of_a_finished_run_loads_nothing(finished, capsys):
    out, arguments = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    assert script.main([*arguments, "--resume"]) == 0
    assert str(out / "grid.png") in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")} == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--particles", "4"], "particles=3, not 4"),
        (["--reward-scale", "3"], "reward_scale=10.0, not 3.0"),
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


def test_resume_compares_the_dtype_that_auto_stands_for(finished, capsys, monkeypatch):
    """As on a machine with an accelerator, where auto is a half type."""
    out, arguments = finished
    settings = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert settings["dtype"] == "float32"
    monkeypatch.setattr(script.loading, "pick_dtype", lambda name, device: torch.bfloat16)
    assert "dtype='float32', not 'bfloat16'" in refused(capsys, *arguments, "--resume")


@pytest.mark.parametrize("settings", [["--particles", "1"], ["--reward-scale", "0"]])
def test_a_run_without_scores_on_the_way_needs_no_step_for_them(model, tmp_path, settings):
    arguments = ["one", "--model", model, "--reward", "jpeg", "--particles", "2", "--steps", "1"]
    assert script.main([*arguments, *settings, "--out", str(tmp_path)]) == 0


def test_one_grid_of_pictures_is_in_memory_at_a_time(finished, tmp_path, monkeypatch):
    """Read by read: a grid is drawn before the next one's pictures are opened."""
    out, _ = finished
    events = []
    rows, comparison = script.runs.report.rows, script.runs.report.comparison
    monkeypatch.setattr(
        script.runs.report, "rows", lambda *args: [events.append("read"), rows(*args)][1]
    )
    monkeypatch.setattr(
        script.runs.report, "comparison", lambda page: [events.append("draw"), comparison(page)][1]
    )
    monkeypatch.setattr(script.runs, "_ROWS_PER_GRID", 2)
    paths = script.runs.draw(tmp_path, folders(out))
    assert [path.name for path in paths] == ["grid-2.png", "grid.png", "history.png"]
    assert events == ["read", "read", "draw", "read", "draw"]


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
    monkeypatch.setattr(rewards, "load", lambda spec, device=None: reward)
    arguments = ["--prompt-file", str(file), "--model", model, *SMALL, "--out", str(tmp_path / "o")]
    assert script.main(arguments) == 0
    assert all(pictures == [] for prompt, pictures in seen if prompt == "a")
    assert all(pictures[0].getpixel((0, 0)) == (255, 0, 0) for p, pictures in seen if p == "b")


def test_every_field_of_the_filter_is_an_option_with_its_default():
    parsed = script.parse(["a cat"])
    for field in dataclasses.fields(FeynmanKac):
        assert getattr(parsed, field.name) == (field.default or type(field.default)())
    script.FeynmanKac(
        **{field.name: getattr(parsed, field.name) for field in dataclasses.fields(FeynmanKac)}
    )


def test_options_may_stand_before_between_and_after_prompts():
    parsed = script.parse(["--steps", "4", "one", "--particles", "2", "two", "--compare"])
    assert parsed.prompts == ["one", "two"]
    assert (parsed.steps, parsed.particles, parsed.compare) == (4, 2, True)


def test_xformers_that_cannot_be_loaded_is_no_obstacle(model, tmp_path, caplog):
    pytest.importorskip("diffusers")
    arguments = ["one", "--model", model, *SMALL, "--attention", "xformers"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    if not torch.cuda.is_available():
        assert caplog.text.count("xformers cannot be used here") == 1


def test_unknown_attention_is_refused_with_the_nearest_name(model, tmp_path, capsys):
    arguments = ["one", "--model", model, *SMALL, "--out", str(tmp_path)]
    assert "did you mean sdpa" in refused(capsys, *arguments, "--attention", "spda")


def examples() -> list[list[str]]:
    """The commands of --help, with lines that end in a backslash joined."""
    text = script.parser().format_help().replace("\\\n", " ")
    found = re.findall(r"^ +python scripts/steer.py (.*)$", text, flags=re.M)
    return [shlex.split(command) for command in found]


@pytest.mark.skipif(
    not (tiny.FOLDER / "tiny-sd3" / "model_index.json").exists(), reason="no embedded weights"
)
@pytest.mark.parametrize("command", examples(), ids=lambda command: " ".join(command)[:40])
def test_examples_of_the_help_run(command, tmp_path, monkeypatch):
    """Each as it stands, but few steps, and for hub ids the embedded model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text('the word "CAT"\na red star\n', encoding="utf-8")
    command = [re.sub(r"^stabilityai/.*", "tiny-sd3", word) for word in command]
    assert script.main([*command, "--steps", "6"]) == 0
    (grid,) = (tmp_path / "out").glob("*/grid.png")
    with Image.open(grid) as picture:
        assert picture.width > 300
