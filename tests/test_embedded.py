"""The embedded models: real pipelines, guidance obeyed, parity with their own call."""

import threading
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

import rewards
from rewards.images import to_images
from scripts.tiny.export import LIMIT, embedded_bytes
from scripts.tiny.train_vae import pictures
from steering import FeynmanKac, generators, steer, tiny
from steering.schedulers import stochastic

STEPS = 6
CLASSES = {"tiny-sd3": StableDiffusion3Pipeline, "tiny-sd": StableDiffusionPipeline}


def keywords(name) -> Any:
    return tiny.call_defaults(name) | {"num_inference_steps": STEPS}


def redness(images, prompts):
    """A plain function as a reward: how much red there is beyond green and blue."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module", params=tiny.NAMES)
def model(request):
    pipe = tiny.load(request.param)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def test_weights_stay_under_the_limit():
    assert 0 < embedded_bytes() <= LIMIT


def test_loads_as_the_real_class_in_float32(model):
    name, pipe = model
    again = DiffusionPipeline.from_pretrained(tiny.FOLDER / name, local_files_only=True)
    assert type(again) is type(pipe) is CLASSES[name]
    for component in (pipe.vae, pipe.text_encoder, getattr(pipe, "unet", pipe.text_encoder)):
        assert component.dtype == torch.float32


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tiny-sd3'"):
        tiny.load("tinysd3")


def test_guidance_brings_the_colour_that_was_asked_for(model):
    name, pipe = model
    prompts = ["a red circle", "a blue circle"] * 4
    draws = [torch.Generator().manual_seed(i // 2) for i in range(8)]
    out = pipe(prompts, generator=draws, **tiny.call_defaults(name), output_type="pt").images
    red = redness(out, prompts)
    assert (red[0::2] > red[1::2]).float().mean() >= 0.75


def test_the_preview_decoder_agrees_with_the_full_one(model):
    _, pipe = model
    images, _ = pictures(16, seed=77)
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
        full = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        rough = tiny.preview().decode(latents).sample
    # Mean errors in units of [-1, 1]; a picture of the mean colour would be off by 0.16.
    assert (full - x).abs().mean() < 0.03
    assert (rough - x).abs().mean() < 0.05


@pytest.mark.parametrize(("scale", "k"), [(0.0, 3), (10.0, 1)])
def test_unsteered_latents_are_the_pipelines_own_bit_for_bit(model, scale, k):
    name, pipe = model
    prompts = ['the word "CRAB"', "two stars"]
    settings = FeynmanKac(reward_scale=scale)
    out = steer(
        pipe, prompts, redness, particles=k, settings=settings, progress=False, **keywords(name)
    )
    stock = pipe.scheduler
    try:
        for i, prompt in enumerate(prompts):
            draws = generators(0, prompts, k)[i * k : (i + 1) * k]
            pipe.scheduler = stochastic(stock, settings.noise, draws)
            latents = pipe(
                prompt,
                num_images_per_prompt=k,
                generator=draws,
                output_type="latent",
                **keywords(name),
            ).images
            assert torch.equal(out.latents[i], latents)
    finally:
        pipe.scheduler = stock


def test_saved_pngs_score_as_reported(model, tmp_path):
    name, pipe = model
    reward = rewards.load("clip(tiny) + 0.1*jpeg")
    out = steer(
        pipe,
        ["a green star"],
        reward,
        particles=3,
        preview=tiny.preview(),
        progress=False,
        **keywords(name),
    )
    out.save(tmp_path)
    files = sorted(tmp_path.glob("0000-*.png"))
    again = reward(to_images([Image.open(file) for file in files]), ["a green star"] * 3)
    torch.testing.assert_close(again, out.rewards[0])


def test_two_threads_on_one_pipeline_give_what_each_gives_alone(model):
    name, pipe = model
    prompts = ["a red circle", "four blue crosses"]
    few = keywords(name) | {"num_inference_steps": 6}

    def run(prompt):
        settings = FeynmanKac(min_ess=1.0, num_scores=2)
        return steer(
            pipe, prompt, redness, particles=3, settings=settings, progress=False, **few
        ).latents

    alone = [run(prompt) for prompt in prompts]
    together = {}
    threads = [
        threading.Thread(target=lambda p=prompt: together.__setitem__(p, run(p)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, latents in zip(prompts, alone, strict=True):
        torch.testing.assert_close(together[prompt], latents)
