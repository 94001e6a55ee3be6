"""What is passed to a pipeline's call: mistakes are refused, texts and schedulers kept."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import copy

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from middle import Settings
from tiny_pipelines import family, picture, sd, sd3
from trapped import PROMPT, SHARP, Full, brightness, snapshot

from steering import steer
from steering.call import PipelineCall
from steering.pipeline import steer_each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_step": 5}, r"no keyword num_inference_step=; did you mean num_inference_"),
        ({"callback": print}, "takes no keyword callback="),
        ({"particle": 2}, r"no keyword particle=; did you mean particles="),
        ({"potential": "max"}, r"potential is a field .* settings=FeynmanKac\(potential="),
        ({"num_inference_steps": "6"}, "num_inference_steps='6': pass a whole number"),
        ({"settings": {"noise": 1.0}}, r"settings is a dict; pass FeynmanKac\("),
        ({"prompts": None}, "prompts=None: pass one text or more"),
        ({"decode": 3}, "decode=3: pass a function from latents"),
        ({"preview": "taesd"}, "preview= is a str; pass a decoder"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt= clashes .* pass particles="),
        ({"generator": None}, "generator= clashes .* seed="),
        ({"latents": torch.zeros(1)}, "latents= clashes"),
        ({"output_type": "np"}, "output_type= clashes"),
        ({"return_dict": False}, "return_dict= clashes"),
        ({"eta": 1.0}, r"eta= clashes .* FeynmanKac\(noise="),
        ({"prompt": "x"}, "prompt= clashes"),
        ({"denoising_end": 0.8}, "denoising_end= clashes"),
        ({"particles": 0}, "particles=0: pass a whole number of 1 or more"),
        ({"max_batch": 0}, "max_batch=0: pass"),
        ({"prompts_per_call": 0}, "prompts_per_call=0: pass"),
        ({"prompts": []}, r"prompts=\[\]: pass one text or more"),
        ({"prompts": ["a", 3]}, "pass one text or more"),
        ({"negative_prompt": ["x"] * 3}, "negative_prompt= has 3 entries for 2 prompts"),
        ({"references": ["x"], "reward": Full()}, "references= has 1 entries for 2 prompts"),
        ({"reward": "clip"}, "reward is a str; pass a function"),
        ({"settings": Settings(noise=0.0)}, r"noise=0 .* min_ess=0 for best-of-k"),
        ({"settings": Settings(score_from=0.9, score_to=0.95)}, "no step to score between"),
        ({"settings": Settings(num_scores=2, funnel=(8, 2))}, "start with 8 particles or lower"),
        ({"settings": Settings(num_scores=5, funnel=(2,) * 5)}, "only 3 steps are scored"),
    ],
)
def test_bad_input_is_refused_before_any_step(monkeypatch, change, message):
    pipe, keywords = family("sd")
    before = snapshot(pipe)

    def asked(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(pipe.unet, "forward", asked)
    call = {"prompts": ["a", "b"], "reward": brightness, "particles": 4, "progress": False}
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        steer_each(pipe, **{**call, **keywords, **change})
    assert snapshot(pipe) == before


def test_pipelines_that_cannot_work_are_refused():
    pipe, keywords = family("sd")
    with pytest.raises(ValueError, match="got a str; pass a diffusers pipeline"):
        steer("sd", PROMPT, brightness)
    with pytest.raises(ValueError, match="latents of 16 channels but this pipeline's have 4"):
        steer(pipe, PROMPT, brightness, preview=AutoencoderTiny(latent_channels=16), **keywords)
    with pytest.raises(ValueError, match="of 8 pixels per side but this pipeline's have 2"):
        steer(pipe, PROMPT, brightness, preview=AutoencoderTiny(), **keywords)
    half = family("sd")[0].vae.half()
    with pytest.raises(ValueError, match=r"preview= is torch.float16 .* preview.to\(torch.float32"):
        steer(pipe, PROMPT, brightness, preview=half, **keywords)
    with pytest.raises(ValueError, match=r"decode= returned \(2, 4, 8, 8\) for 2 latents"):
        steer(pipe, PROMPT, brightness, 2, decode=lambda x: x, progress=False, **keywords)
    with pytest.raises(ValueError, match=r"only= is an argument of steer_each"):
        steer(pipe, PROMPT, brightness, only=[0], **keywords)
    pipe, keywords = family("sd3")
    pipe.text_encoder_3.train()
    match = r"pipe.text_encoder_3 is in training mode.*pipe.text_encoder_3.eval\(\)"
    with pytest.raises(ValueError, match=match):
        steer(pipe, PROMPT, brightness, progress=False, **keywords)
    pipe = sd()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler is no flow"):
        steer(pipe, PROMPT, brightness, progress=False, **keywords)
    pipe, keywords = family("img2img")
    with pytest.raises(ValueError, match=r"prompts_per_call=2 with image=.*leave prompts_per_call"):
        steer(pipe, ["a", "b"], brightness, prompts_per_call=2, progress=False, **keywords)
    with pytest.raises(ValueError, match="no step to score"):
        steer(pipe, PROMPT, brightness, progress=False, **{**keywords, "strength": 0.2})
    pipe, keywords = family("wan")
    with pytest.raises(ValueError, match=r"num_frames=0: pass a whole number of 1 or more"):
        steer(pipe, PROMPT, brightness, progress=False, **keywords | {"num_frames": 0})


def test_a_fraction_of_the_steps_is_rounded_as_the_pipeline_rounds_it():
    """Of 10 * 0.25 steps SD takes the floor, SD3 the ceiling; only the latter has a step 1 of 3."""
    settings = Settings(num_scores=1, score_from=0.3, score_to=0.4, min_ess=1.0)
    # SD3 with a generator a row wants an image a row
    call = {"image": [picture()] * 2, "num_inference_steps": 10, "strength": 0.25}
    pipe = StableDiffusion3Img2ImgPipeline(**sd3().components)
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **call)
    assert out.lineage.num_steps == 3
    pipe, _ = family("img2img")
    with pytest.raises(ValueError, match=r"no step to score .* of 2 steps"):
        steer(pipe, PROMPT, brightness, 2, settings, progress=False, **call)


def test_a_text_that_is_no_prompt_goes_to_the_pipeline_as_it_is():
    keywords = {"system_prompt": "be brief", "negative_prompt_2": "x"}
    defaults = dict.fromkeys(["prompt", *keywords])
    dealt = PipelineCall(keywords, defaults, ("a", "b")).for_prompts([0, 1], 1, [])
    assert dealt["system_prompt"] == "be brief"
    assert dealt["negative_prompt_2"] == ["x", "x"]


def test_prompt_embeds_stand_in_for_the_text_that_the_network_sees():
    pipe, keywords = family("sd")
    prompts = [PROMPT, "two"]
    embeds, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    text = steer(pipe, prompts, brightness, 2, SHARP, progress=False, **keywords)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    ours = steer(pipe, prompts, brightness, 2, SHARP, progress=False, **given, **keywords)
    torch.testing.assert_close(ours.latents, text.latents, rtol=1e-4, atol=1e-4)


def test_negative_prompts_go_to_all_or_one_to_each():
    pipe, keywords = family("sd")
    both = steer(
        pipe,
        ["a", "b"],
        brightness,
        2,
        SHARP,
        progress=False,
        negative_prompt=["x", "y"],
        **keywords,
    )
    one = steer(pipe, "b", brightness, 2, SHARP, progress=False, negative_prompt="y", **keywords)
    assert torch.equal(both.latents[1], one.latents[0])
    packed = steer(
        pipe,
        ["a", "b"],
        brightness,
        2,
        SHARP,
        progress=False,
        prompts_per_call=2,
        negative_prompt="y",
        **keywords,
    )
    torch.testing.assert_close(packed.latents[1], one.latents[0], rtol=1e-3, atol=1e-3)


def test_an_image_may_be_packed_when_it_is_the_only_prompt():
    pipe, keywords = family("img2img")
    out = steer(pipe, PROMPT, brightness, 2, progress=False, **{**keywords, "image": picture(3)})
    assert out.images[0][0].size == (16, 16)


def test_euler_of_sdxl_is_replaced_and_its_state_kept():
    pipe = sd(scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"))
    pipe.scheduler.set_timesteps(9)
    before = copy.deepcopy(pipe.scheduler.timesteps)
    steer(pipe, PROMPT, brightness, 2, progress=False, num_inference_steps=6)
    assert torch.equal(pipe.scheduler.timesteps, before)
