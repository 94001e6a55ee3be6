"""scripts/steer.py from its command line: its options, its help and what it refuses."""

import dataclasses
import re
import shlex

import pytest
import torch
from command_line import EMBEDDED, SMALL, refused
from PIL import Image

from steering import FeynmanKac
from tilt.commands import steer as script
from tilt.commands import steer_options


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
        (["--particles", "0"], "must be a whole number, 1 to 10000"),
        (["--particles", "-3"], "must be a whole number, 1 to 10000"),
        (["--particles", "2.5"], "must be a whole number, 1 to 10000"),
        (["--reward-scale", "nan"], "--reward-scale is nan: pass a number"),
        (["--reward-scale", "inf"], "--reward-scale is inf: pass a number"),
        (["--score-from", "0.9", "--score-to", "0.1"], "--score-from 0.9 is greater"),
        (["--score-from", "0.9", "--score-to", "1.0", "--steps", "4"], "no step to score"),
        (["--funnel", "2,4", "--num-scores", "2"], "grows"),
        (["--funnel", "9,9", "--num-scores", "2", "--steps", "20"], "grows"),
        (["--funnel", "a"], "--funnel is 'a' but must be whole numbers"),
        (["--funnel", "8,4.5"], "--funnel is '8,4.5' but must be whole numbers"),
        (["--noise", "2"], "noise"),
        (["--reward", "clip(/nowhere)"], "no CLIP folder '/nowhere'"),
        (["--reward", "clip(random:0, batch_size=two)"], "batch_size is 'two'"),
        (["--reward", "ocr(upscale=x)"], "upscale is 'x'"),
        (["--reward", "math:pi"], "callable"),
        (["--reward", "os:system"], "the reward system must accept f"),
        (["--device", "cuda:99"], "--device|device cuda:99"),
        (["--dtype", "float8"], "float16"),
        (["--model", "tiny-sd33"], "tiny-sd3"),
        (["--model", "./nowhere"], "nowhere"),
        (["--resume"], "--out"),
        (["--steps", "0"], "must be a whole number, 1 to 10000"),
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
        ("ref.jsonl", b'{"prompt": "a", "references": ["no.png"]}\n', "line 1 names the image"),
        ("text.jsonl", b'{"prompt": "a", "references": ["text.png"]}\n', "is not a readable image"),
        ("cut.jsonl", b'{"prompt": "a", "references": ["cut.png"]}\n', "is not a readable image"),
        ("refs.jsonl", b'{"prompt": "a", "references": "no.png"}\n', "line 1 has references"),
        ("image.jsonl", b'{"prompt": "a", "image": "no.png"}\n', "line 1 names the image"),
        ("images.jsonl", b'{"prompt": "a", "image": ["a.png"]}\n', "line 1 has the image"),
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
def test_a_reward_without_its_references_is_refused(capsys, tmp_path):
    file = tmp_path / "some.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = ['{"prompt": "a", "references": ["a.png"]}', '{"prompt": "b", "image": "a.png"}']
    file.write_text("\n".join([*lines, '{"prompt": "c"}']))
    message = refused(capsys, "--prompt-file", str(file), "--reward", "dino(random:0)")
    assert re.search(r"compares with reference images but the prompt 'c' has none", message)


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
    assert "cannot read or write" in refused(capsys, *arguments)


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
    assert message.endswith(
        "nobody/has-this; the hub cannot be reached; give a folder that holds it\n"
    )


@pytest.mark.usefixtures("no_model")
def test_default_reward_without_network_names_the_folder_option(capsys, model, monkeypatch):
    def no_session():
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", no_session)
    monkeypatch.setattr("rewards.towers.model_cache._MODELS", {})
    assert "give a folder" in refused(capsys, "a cat", "--model", model)


def test_keyword_that_the_pipeline_lacks_is_refused(capsys, tmp_path, model, monkeypatch):
    """The model has to be there to know; still no step is run, and a new try needs no new --out."""
    monkeypatch.setattr(script, "call_keywords", lambda args: {"guidance_scal": 3.0})
    arguments = ["a cat", *SMALL, "--model", model, "--out", str(tmp_path)]
    assert "--guidance-scale" in refused(capsys, *arguments)
    monkeypatch.undo()
    assert script.main([*arguments, "--guidance-scale", "2"]) == 0


def test_every_field_of_the_filter_is_an_option_with_its_default():
    parsed = steer_options.OPTIONS.read(["a cat"])
    assert FeynmanKac(**vars(parsed.filter)) == FeynmanKac()
    text = steer_options.OPTIONS.parser().format_help()
    for field in dataclasses.fields(FeynmanKac):
        assert f"  --{field.name.replace('_', '-')} VALUE" in text
        assert " ".join(field.metadata["help"].split()[:3]) in " ".join(text.split())


FUNNEL = FeynmanKac.__dataclass_fields__["funnel"]


def test_the_funnel_of_the_help_suits_the_default_number_of_scores():
    (example,) = re.findall(r"such as ([\d,]+)", FUNNEL.metadata["help"])
    parsed = steer_options.OPTIONS.read(["a cat", "--funnel", example])
    FeynmanKac(**vars(parsed.filter))


def test_options_may_stand_before_between_and_after_prompts():
    parsed = steer_options.OPTIONS.read(
        ["--steps", "4", "one", "--particles", "2", "two", "--compare"]
    )
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
    text = steer_options.OPTIONS.parser().format_help().replace("\\\n", " ")
    found = re.findall(r"^ +tilt steer (.*)$", text, flags=re.M)
    return [shlex.split(command) for command in found]


@pytest.mark.skipif(not EMBEDDED, reason="no embedded weights")
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
