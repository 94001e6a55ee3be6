"""Predictions through a pipeline's own call: guidance, rows, and what is refused in a sentence."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Generator
from zoo.accounts import ANIMALS
from zoo.building import Animal, call_of, pipeline_of
from zoo.training import Trained, first_step, rows, same

from finetune import network, recording
from finetune.conditioning import Conditioning, Form, form_of, tensors_of
from finetune.network import Model, check_kind, predict
from finetune.recording import Recorder, _is_empty, record
from steering.schedulers import stochastic

PROMPTS = ["a red cube", "two dots and a star"]


def made(name: str) -> tuple[Any, dict[str, Any]]:
    animal = ANIMALS.get(name, Animal())
    call = call_of(name, animal)
    if "Qwen" in name:  # whose first tokens are a template's
        call["max_sequence_length"] = 256
    return pipeline_of(name, animal), call


@pytest.mark.parametrize("kind", ["StableDiffusion", "QwenImage", "ZImage", "Wan", "Flux"])
def test_with_guidance_it_is_the_pipelines_guided_prediction(kind):
    """Of both halves of a batch (SD, Z-Image), and of two calls of the network (Qwen, Wan)."""
    pipe, call = made(f"{kind}Pipeline")
    model, given = Model(pipe), Recorder(pipe, call, guided=True).record(PROMPTS)
    it = Trained(f"{kind}Pipeline", pipe, model, given)
    for i, prompt in enumerate(PROMPTS):
        output, x, t = first_step(it, prompt)
        with torch.no_grad():
            found = model.predict(it.network, given[[i]], x, torch.tensor(t))
            plain = predict(pipe, record(pipe, [prompt], **call), x, torch.tensor(t))
        assert torch.equal(found, output)
        assert (plain - output).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["StableDiffusion", "ZImage", "Wan"])
def test_guided_rows_take_a_time_each(kind):
    pipe, call = made(f"{kind}Pipeline")
    given = Recorder(pipe, call, guided=True).record(PROMPTS)
    x = torch.randn(2, *given.form.shape, generator=Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        found = predict(pipe, given, x, t)
        alone = [predict(pipe, given[[i]], x[[i]], t[i]) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_an_embedded_scale_is_kept_and_classifier_free_guidance_is_off():
    pipe, call = made("FluxPipeline")
    pipe.transformer = type(pipe.transformer).from_config(
        pipe.transformer.config, guidance_embeds=True
    )
    recorder = Recorder(pipe, call | {"guidance_scale": 2.5})
    assert recorder.embedded
    assert recorder.call["guidance_scale"] == 2.5
    assert recorder.call["true_cfg_scale"] == 1.0
    pipe, call = made("ZImagePipeline")
    assert Recorder(pipe, call).call["guidance_scale"] == 0.0  # at 1 it still computes both


def test_a_network_that_keeps_the_keys_of_the_text_is_asked_anew():
    """Qwen-Image 2.1 computes them in its first step; they do not depend on the time."""
    name, steps = "QwenImage21Pipeline", []
    pipe, call = pipeline_of(name, ANIMALS[name]), call_of(name, ANIMALS[name])
    given = record(pipe, PROMPTS[:1], **call)
    view, scheduler = copy.copy(pipe), stochastic(pipe.scheduler, 0.0)
    real = scheduler.step

    def step(output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append((output, timestep / 1000, sample))
        return real(output, timestep, sample, *args, **kwargs)

    vars(scheduler)["step"] = step
    view.scheduler = scheduler
    view(PROMPTS[0], output_type="latent", generator=Generator().manual_seed(0), **given.form.call)
    assert len(steps) == call["num_inference_steps"]
    for output, t, x in steps:
        with torch.no_grad():
            torch.testing.assert_close(predict(pipe, given, x, t), output, atol=1e-5, rtol=1e-4)


def test_objects_are_compared_unless_they_hold_no_tensors():
    circle = SimpleNamespace(layers=[SimpleNamespace(key=None)])
    circle.layers[0].owner = circle
    assert _is_empty(circle)
    circle.layers[0].key = {"of": (torch.zeros(1),)}
    plain = ({}, [], 1, None, "a", torch.zeros(1), torch.nn.Identity(), SimpleNamespace())
    for compared in (circle, *plain):
        assert not _is_empty(compared)


def test_rows_of_different_lengths_are_evaluated_apart():
    pipe, call = made("QwenImagePipeline")
    given = record(pipe, PROMPTS, **call)
    assert [*given.repeated(2).parts()] == [slice(0, 2), slice(2, 4)]
    assert [*given[[1, 1]].parts()] == [slice(0, 2)]


def test_two_prompts_that_happen_to_have_one_time_are_evaluated_apart(monkeypatch):
    """If a call takes one time alone: else a process could make fewer calls than another."""
    pipe, call = made("StableDiffusionPipeline")
    model, given = Model(pipe), record(pipe, PROMPTS, **call)
    given = replace(given, form=replace(given.form, times="each")).repeated(2)
    calls: list[Any] = []

    def predict(network: Any, given: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((len(x), round(t.item(), 3)))
        return x

    monkeypatch.setattr(model, "_predict", predict)
    x = torch.zeros(4, *given.form.shape)
    for times in ([0.999] * 4, [0.5, 0.5, 0.2, 0.3]):
        model.predict(pipe.unet, given, x, torch.tensor(times))
    assert calls == [(2, 0.999), (2, 0.999), (2, 0.5), (1, 0.2), (1, 0.3)]


def test_a_call_that_gives_all_rows_the_first_time_takes_a_single_one(monkeypatch):
    pipe, call = made("StableDiffusionPipeline")
    assert record(pipe, PROMPTS[:1], **call).form.times == "rows"
    real = recording.reached

    def reached(*given: Any) -> Any:
        found = real(*given)
        t = found[1]  # the U-Net's timestep
        return found | {1: t[:1].expand_as(t) if t.ndim else t}

    monkeypatch.setattr(recording, "reached", reached)
    assert record(pipe, PROMPTS[:1], **call).form.times == "each"


def test_what_rows_share_must_be_equal_in_all_of_them():
    form = Form({}, {"encode_prompt": [{"tensor": "ids"}]}, {"ids": None}, (4,))
    rows = [{"ids": torch.tensor([0.0, 1.0])}, {"ids": torch.tensor([0.0, 1.0])}]
    given = Conditioning(form, rows)
    assert torch.equal(given.results(torch.float32)["encode_prompt"][0], rows[0]["ids"])
    other = Conditioning(form, [*rows, {"ids": torch.tensor([0.0, 2.0])}])
    with pytest.raises(ValueError, match=r"ids is the same for all rows .* train on one prompt"):
        other.results(torch.float32)


def test_wan_takes_a_time_for_each_of_its_tokens():
    """As the published Wan 2.2 TI2V-5B does, with its scheduler, whose steps are made Euler's."""
    parts = {"scheduler": ("UniPCMultistepScheduler", {"flow_shift": 5.0})}
    pipe = pipeline_of("WanPipeline", Animal(parts, {"expand_timesteps": True}))
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0}
    call |= {"num_inference_steps": 6, "max_sequence_length": 16}
    for guided in (False, True):
        given = Recorder(pipe, call, guided).record(PROMPTS)
        assert given.form.times == "each"  # where two tokens in a row make it fit two rows, too
        it = Trained("WanPipeline", pipe, Model(pipe), given)
        same(it)
        rows(it)


def test_the_form_survives_its_file():
    pipe, call = made("Flux2Pipeline")
    form = record(pipe, PROMPTS, **call).form
    assert Form.loads(form.dumps()).dumps() == form.dumps()
    for damaged in ("", "{}", '{"shape": 3}', form.dumps()[:-5]):
        with pytest.raises(ValueError, match="is damaged"):
            Form.loads(damaged)


@pytest.mark.parametrize(
    ("name", "parts", "why"),
    [
        ("StableDiffusionControlNetPipeline", ["unet", "controlnet"], "networks unet, controlnet"),
        ("CogVideoXImageToVideoPipeline", ["transformer"], "needs image=, and only texts"),
        ("StableDiffusionPipeline", ["vae"], "no network that is known"),
        ("WanPipeline", ["transformer", "transformer_2"], "networks transformer, transformer_2"),
        ("DDPMPipeline", ["unet"], "takes no prompt"),
    ],
)
def test_a_class_is_refused_without_its_weights(name, parts, why):
    with pytest.raises(ValueError, match=f"{name} cannot be trained: .*{why}"):
        check_kind(getattr(diffusers, name), parts)


def altered(**methods: Any) -> Any:
    """A small Stable Diffusion whose class has other methods."""
    pipe, _ = made("StableDiffusionPipeline")
    made_class = type("AlteredPipeline", (type(pipe),), methods)
    pipe = copy.copy(pipe)
    pipe.__class__ = made_class
    return pipe


@pytest.mark.parametrize(
    ("one", "two", "why"),
    [
        (object(), object(), "object"),
        (torch.zeros(1, 1), torch.zeros(2, 2), "with 2 rows"),
        ([3], [3, 3], "no list with a tensor per row"),
        (torch.float16, torch.float16, "dtype"),
    ],
)
def test_what_the_head_returns_has_to_be_stored_by_rows(one, two, why):
    with pytest.raises(ValueError, match=rf"^X cannot be trained: .*{why}"):
        form_of("X", {"encode_prompt": [one]}, {"encode_prompt": [two]}, {}, (4,))


def test_sums_of_the_lengths_of_rows_are_made_anew_for_any_rows():
    """As Kandinsky 5 passes them: 0, and where each row ends."""
    ends = lambda *sums: {"encode_prompt": [({"ends": torch.tensor(sums, dtype=torch.int32)},)]}  # noqa: E731
    form = form_of("X", ends(0, 7), ends(0, 7, 14), {}, (4,))
    form = Form.loads(form.dumps())
    rows = [tensors_of(form, ends(0, length)) for length in (7, 2, 9)]
    ((found,),) = Conditioning(form, rows).results(torch.float32)["encode_prompt"]
    assert found["ends"].tolist() == [0, 7, 9, 18]
    assert found["ends"].dtype == torch.int32
    # a pair of numbers that all rows share, and one that is of the rows, but no sum
    form = form_of("X", ends(0, 7), ends(0, 7), {}, (4,))
    assert form.axes == {"encode_prompt.0.0.ends": None}
    for one, two in (((0, 7), (0, 7, 7)), ((3, 7), (0, 7, 14))):
        with pytest.raises(ValueError, match="X cannot be trained: its argument"):
            form_of("X", ends(*one), ends(*two), {}, (4,))


def test_a_call_that_changes_its_latents_is_refused(monkeypatch):
    pipe, call = made("StableDiffusionPipeline")
    given, model = record(pipe, PROMPTS[:1], **call), Model(pipe)
    real = network.run
    monkeypatch.setattr(
        network, "run", lambda view, given, x, dtype: real(view, given, 2 * x, dtype)
    )
    with pytest.raises(ValueError, match="changes its latents before its first step"):
        model.predict(pipe.unet, given, torch.ones(1, *given.form.shape), torch.tensor(0.5))


def test_a_call_without_gradients_is_refused():
    pipe, call = made("StableDiffusionPipeline")
    given, model = record(pipe, PROMPTS[:1], **call), Model(pipe)

    model._view.__class__ = altered(__call__=no_gradients).__class__
    with pytest.raises(ValueError, match="computes without gradients"):
        model.predict(pipe.unet, given, torch.ones(1, *given.form.shape), torch.tensor(0.5))


def no_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():  # unlike a decorator, it cannot be left out
        return diffusers.StableDiffusionPipeline.__call__(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"gudance_scale": 4.0}, "StableDiffusionPipeline takes no keyword gudance_scale="),
        ({"prompt": "a cat"}, "prompt= has no meaning in training; leave it out"),
        ({"eta": 1.0}, "eta= has no meaning"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt= has no meaning"),
        ({"height": "64"}, "height='64': StableDiffusionPipeline takes a whole number"),
        (
            {"prompt_embeds": torch.ones(1, 77, 8)},
            "with prompt_embeds=: keywords are",
        ),
    ],
)
def test_a_keyword_without_an_effect_is_refused(given, why):
    """Also by a call that takes any name, as that of Stable Diffusion does."""
    pipe, call = made("StableDiffusionPipeline")
    with pytest.raises(ValueError, match=re.escape(why)):
        Recorder(pipe, call | given)


def test_a_second_text_is_that_of_every_prompt():
    pipe, call = made("StableDiffusionXLPipeline")
    given = record(pipe, PROMPTS, **call, prompt_2="as a drawing")
    x = torch.randn(2, *given.form.shape, generator=Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        found, plain = (predict(pipe, one, x, t) for one in (given, record(pipe, PROMPTS, **call)))
        alone = [predict(pipe, given[[i]], x[[i]], t[i]) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().amax((1, 2, 3)).min() > 1e-4


class Copied(torch.Tensor):
    """A tensor that notes how it was copied."""

    def to(self, device, non_blocking=False):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor(float(non_blocking))


@pytest.mark.parametrize(("device", "later"), [("cpu", 0), (torch.device("cpu"), 0), ("cuda", 1)])
def test_a_copy_to_the_cpu_is_complete_when_it_returns(device, later):
    """PyTorch copies from a GPU into pinned memory, and does not wait for the last byte."""
    form = form_of("Any", {}, {}, {}, (1,))
    given = Conditioning(form, [{"a": torch.zeros(2).as_subclass(Copied)}])
    assert given.to(device).rows[0]["a"] == later
