"""Pipelines whose parts or layers come to the device on demand: their hooks run on a CPU as well.

That no tensor is left on the wrong device shows only where there are two devices.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from command_line import refused
from tiny_pipelines import family

import rewards
from finetune import lora
from finetune.checks import Check, Watch
from finetune.decoding import decoder_of
from finetune.network import Model
from finetune.recording import record
from finetune.rollouts import PLAIN
from steering import FeynmanKac, steer, tiny
from steering.decoding import in_float32
from tilt import idle_settings, loading, offloading
from tilt.commands.rollout import renew
from tilt.commands.train_gdro import TrainGdro
from tilt.offloading import place
from tilt.training import TrainingRun
from tilt.variants import EvaluationPlan, is_finished

CPU = torch.device("cpu")
CALL = tiny.call_defaults("tiny-sd3") | {"num_inference_steps": 2}


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def hooks(pipe: Any) -> int:
    """The number of the pipeline's modules that come to the device on demand."""
    modules = [m for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in
               c.modules()]  # fmt: skip
    return sum(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in modules)


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_pictures_and_recordings_are_the_same_bit_for_bit(name, offload):
    pipe, keywords = family(name)
    settings = FeynmanKac(num_scores=2, reward_scale=300.0)
    run = {"settings": settings, "progress": False, "max_batch": 2, **keywords}
    plain, given = steer(pipe, "a", brightness, 3, **run), record(pipe, ["a", "b"], **keywords)
    pipe = place(family(name)[0], CPU, offload)
    assert hooks(pipe) > 2
    for _ in range(2):  # the hooks work again after a recording
        out = steer(pipe, "a", brightness, 3, **run)
        assert torch.equal(out.latents, plain.latents)
        assert out.images == plain.images
        again = record(pipe, ["a", "b"], **keywords)
        assert again.form == given.form
        for row, other in zip(again.rows, given.rows, strict=True):
            assert all(torch.equal(row[key], other[key]) for key in {*row, *other})
    assert hooks(pipe) > 2


def test_a_check_leaves_the_trained_network_as_it_is():
    pipe = tiny.load("tiny-sd3")
    reward, loaded = {"reward": rewards.load("jpeg")}, []

    def placed(*arguments: Any, **given: Any) -> Any:
        loaded.append(place(*arguments, offload="group", **given))
        return loaded[-1]

    common = Check(images=2), ["a"], ["b"], reward, CALL, partial(tiny.load, "tiny-sd3")
    plain = Watch(*common).look("transformer", pipe.transformer, Accelerator(cpu=True))
    found = Watch(*common, placed).look("transformer", pipe.transformer, Accelerator(cpu=True))
    assert found == plain
    assert hooks(loaded[0]) > 100
    assert not hooks(SimpleNamespace(components={"transformer": pipe.transformer}))


def test_a_decoder_that_is_offloaded_decodes_the_same():
    pipe = tiny.load("tiny-sd3")
    model, given = Model(pipe), record(pipe, ["a"], **CALL)
    latents = torch.randn(3, *given.form.shape, generator=torch.Generator().manual_seed(0))
    plain = decoder_of(model, pipe, given)(latents)
    offloading.place_part(pipe.vae, CPU, "group")
    assert torch.equal(decoder_of(model, pipe, given)(latents), plain)
    offloading.place_part(pipe.text_encoder, CPU, "none")


@pytest.mark.parametrize("offload", ["model", "group"])
def test_a_decoder_that_is_offloaded_is_not_copied_in_float32(offload):
    pipe, _ = family("sdxl")
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    assert in_float32(pipe) is not None
    assert in_float32(place(pipe, CPU, offload)) is None


def test_layers_in_4_bits_are_not_moved_one_by_one(capsys, no_model, monkeypatch):
    monkeypatch.setattr("tilt.quantization.check", lambda quantize: None)
    with pytest.raises(ValueError, match="set offload=model, or quantize=8bit"):
        loading.resolved(SimpleNamespace(dtype="float32", quantize="4bit", offload="group"))
    said = refused(capsys, "a", "--quantize", "4bit", "--offload", "group")
    assert "set --offload model, or --quantize 8bit" in said
    with pytest.raises(ValueError, match="offload is 'model' but must be 'none' or 'group'"):
        TrainingRun(offload="model")


@pytest.mark.parametrize("offload", ["model", "group"])
def test_a_network_in_8_bits_is_offloaded(offload):
    pytest.importorskip("torchao", reason="8 bits need torchao")
    run: dict[str, Any] = {"progress": False, **CALL}
    plain, other = (
        steer(
            place(loading.load_pipeline("tiny-sd3", torch.float32, quantize="8bit"), CPU, kind),
            "a",
            brightness,
            2,
            FeynmanKac(num_scores=1, score_from=0.0),
            **run,
        )
        for kind in ("none", offload)
    )
    assert torch.equal(plain.latents, other.latents)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_loras_that_are_loaded_later_are_offloaded_too(offload, tmp_path):
    """As `tilt rollout --follow` loads one after another."""
    pipe, plain = place(tiny.load("tiny-sd3"), CPU, offload), tiny.load("tiny-sd3")
    run: dict[str, Any] = {"settings": PLAIN, "progress": False, **CALL}
    found = [steer(pipe, "a", brightness, 2, **run).latents]
    for step in (1, 2):
        made = tiny.load("tiny-sd3")
        weights = lora.attach(made.transformer, ["to_q"], 2, 2, torch.Generator())
        for weight in weights.values():
            weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(step))
        folder = tmp_path / f"lora-{step:06d}"
        folder.mkdir()
        lora.save(type(made), "transformer", made.transformer, folder)
        assert renew(pipe, tmp_path, offload)["step"] == renew(plain, tmp_path)["step"] == step
        found.append(steer(pipe, "a", brightness, 2, **run).latents)
        assert torch.equal(found[-1], steer(plain, "a", brightness, 2, **run).latents)
        assert not torch.equal(found[-1], found[-2])
    parts = [m for n, m in pipe.transformer.named_modules() if ".lora_A." in n]
    assert len(parts) > 3
    if offload == "group":
        assert all(hasattr(part, "_diffusers_hook") for part in parts)
    else:
        assert hasattr(pipe.transformer, "_hf_hook")


def test_offloading_may_differ_when_an_evaluation_is_resumed(tmp_path):
    plan = EvaluationPlan(("a",), ((),), 1, 0)
    frames = {"score_frames": "all", "video_score": "mean"}
    asked = {"offload": "none", "resume": False, "dtype": "float32"} | frames
    drawn = asdict(plan) | {"variants": [{"name": "base"}]}
    manifest, found = {"pictures": drawn}, {"settings": asked, "lora": None}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    (tmp_path / "base").mkdir()
    for name in ("evaluation.md", "grid.png", "base/0000-00.png"):
        (tmp_path / name).touch()
    again = asked | {"resume": True, "offload": "group"}
    assert is_finished(tmp_path, plan, again, None)
    assert not is_finished(tmp_path, plan, again | {"dtype": "bfloat16"}, None)


def test_offloading_without_checks_has_no_effect_on_gdro(tmp_path):
    settings = TrainGdro(rollouts=["r"], out=str(tmp_path), offload="group")
    with pytest.raises(ValueError, match=r"offload is 'group' but .* because check\.every is 0"):
        idle_settings.check_gdro(settings)
