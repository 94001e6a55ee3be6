"""With reward_scale 0, and with one particle, a steered run is the pipeline's own, bit for bit."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pictures import assert_same_picture
from tiny_pipelines import FAMILIES, family, sd3, steps_where_stock_ddim_is_nan

from steering import FeynmanKac, generators, steer
from steering.schedulers import stochastic

PROMPT = "a red cube"
OTHERS = ["two dots", "a cat's hat"]
SHARP = FeynmanKac(reward_scale=300.0, min_ess=0.9)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def counted(pipe):
    return "num_videos_per_prompt" if "Wan" in type(pipe).__name__ else "num_images_per_prompt"


def own_call(pipe, keywords, k, noise, output_type, prompt=PROMPT, scheduler=None):
    """What the pipeline itself returns on our scheduler with our generators."""
    pipe = copy.copy(pipe)
    noises = generators(0, [prompt], k)
    pipe.scheduler = scheduler or stochastic(pipe.scheduler, noise, noises)
    return pipe(
        prompt=prompt,
        generator=noises,
        output_type=output_type,
        return_dict=False,
        **{counted(pipe): k},
        **keywords,
    )[0]


def same_images(first, second):
    return all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)
    )


def pixels(out):
    return np.stack([np.asarray(image) for row in out.images for image in row])


@pytest.mark.parametrize("name", FAMILIES)
def test_reward_scale_zero_is_the_pipelines_own_call(name):
    pipe, keywords = family(name)
    settings = FeynmanKac(reward_scale=0.0, min_ess=1.0)
    out = steer(pipe, PROMPT, brightness, 3, settings, progress=False, **keywords)
    assert torch.equal(out.latents[0], own_call(pipe, keywords, 3, settings.noise, "latent"))
    images = own_call(pipe, keywords, 3, settings.noise, "pil")
    assert same_images(out.images[0], [i[0] if isinstance(i, list) else i for i in images])
    assert torch.equal(out.log_z, torch.zeros(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_particle_is_the_pipelines_own_call(name):
    pipe, keywords = family(name)
    out = steer(pipe, PROMPT, brightness, 1, SHARP, progress=False, **keywords)
    assert torch.equal(out.latents[0], own_call(pipe, keywords, 1, SHARP.noise, "latent"))


@pytest.mark.parametrize("name", ["sd", "sdxl", "controlnet", "inpaint9", "img2img"])
def test_eta_one_is_the_stock_ddim(name):
    pipe, keywords = family(name)
    settings = FeynmanKac(noise=1.0, reward_scale=0.0)
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **keywords)
    stock = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = own_call(pipe, {**keywords, "eta": 1.0}, 2, 1.0, "latent", scheduler=stock)
    assert torch.equal(out.latents[0], theirs)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-true-cfg"])
def test_a_flow_without_noise_is_the_stock_euler(name):
    pipe, keywords = family(name)
    settings = FeynmanKac(noise=0.0, reward_scale=0.0)
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **keywords)
    theirs = own_call(pipe, keywords, 2, 0.0, "latent", scheduler=pipe.scheduler)
    assert torch.equal(out.latents[0], theirs)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_a_replaced_flow_solver_keeps_its_own_sigmas(name):
    pipe, _ = family(name)
    ours, theirs = stochastic(pipe.scheduler, 0.5), copy.deepcopy(pipe.scheduler)
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert isinstance(ours, FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("name", FAMILIES)
def test_steering_raises_the_reward_of_the_chain_it_steers(name):
    """Not a statistical claim: with these seeds the population's mean reward goes up."""
    pipe, keywords = family(name)
    prompts = [PROMPT, *OTHERS]
    plain = dataclasses.replace(SHARP, min_ess=0.0)
    chain = steer(pipe, prompts, brightness, 6, plain, progress=False, **keywords)
    scale = 3.0 / chain.rewards.std().item()
    settings = dataclasses.replace(SHARP, reward_scale=scale)
    out = steer(pipe, prompts, brightness, 6, settings, progress=False, **keywords)
    assert any(score.replaced.any() for score in out.lineage.scores)
    assert out.rewards.mean() > chain.rewards.mean()
    assert out.latents.isfinite().all()


def test_zero_terminal_snr_is_finite_where_stock_ddim_is_not():
    pipe, keywords = family("sdxl-zero-snr")
    keywords = {**keywords, "num_inference_steps": steps_where_stock_ddim_is_nan()}
    stock = own_call(pipe, {**keywords, "eta": 1.0}, 2, 1.0, "latent", scheduler=pipe.scheduler)
    assert stock.isnan().any()
    settings = FeynmanKac(noise=1.0, reward_scale=300.0, min_ess=1.0)
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **keywords)
    assert out.latents.isfinite().all()
    out = steer(pipe, PROMPT, brightness, 2, settings, progress=False, num_inference_steps=20)
    assert out.latents.isfinite().all()


@pytest.mark.parametrize("name", ["sd", "sd3", "inpaint"])
def test_min_ess_zero_ranks_as_best_of_k_of_the_same_chain(name):
    pipe, keywords = family(name)
    settings = dataclasses.replace(SHARP, min_ess=0.0)
    out = steer(pipe, PROMPT, brightness, 5, settings, progress=False, **keywords)
    images = own_call(pipe, keywords, 5, settings.noise, "pil")
    assert same_images(out.images[0], images)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    theirs = brightness(pixels.permute(0, 3, 1, 2).float() / 255, [PROMPT] * 5)
    assert torch.equal(out.rewards[0], theirs)
    assert torch.equal(out.log_weights[0].argsort(), theirs.argsort())
    assert torch.equal(out.log_weights[0], 300.0 * theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_alone_is_the_prompt_among_others(name):
    pipe, keywords = family(name)
    alone = steer(pipe, PROMPT, brightness, 3, SHARP, progress=False, **keywords)
    among = steer(pipe, [OTHERS[0], PROMPT], brightness, 3, SHARP, progress=False, **keywords)
    assert torch.equal(alone.latents[0], among.latents[1])
    assert torch.equal(alone.log_weights[0], among.log_weights[1])
    for one, both in zip(alone.lineage.scores, among.lineage.scores, strict=True):
        assert torch.equal(one.ancestors[0], both.ancestors[1])


@pytest.mark.parametrize(
    "name", ["sd", "sd2", "sdxl", "sd3", "flux-true-cfg", "pixart", "sana", "wan"]
)
def test_packed_prompts_agree_to_float_tolerance(name):
    pipe, keywords = family(name)
    prompts = [PROMPT, *OTHERS, PROMPT]
    alone = steer(pipe, prompts, brightness, 3, SHARP, progress=False, **keywords)
    packed = steer(
        pipe, prompts, brightness, 3, SHARP, progress=False, prompts_per_call=3, **keywords
    )
    for one, many in zip(alone.lineage.scores, packed.lineage.scores, strict=True):
        assert torch.equal(one.ancestors, many.ancestors)
    torch.testing.assert_close(packed.latents, alone.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(packed.rewards, alone.rewards, rtol=1e-3, atol=1e-2)
    assert_same_picture(pixels(packed), pixels(alone))
    assert not torch.equal(alone.latents[0], alone.latents[3])  # the same text, drawn again


@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_of_the_networks_batch_does_not_matter(name):
    pipe, keywords = family(name)
    whole = steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)
    for max_batch in (1, 3):
        split = steer(
            pipe, PROMPT, brightness, 4, SHARP, progress=False, max_batch=max_batch, **keywords
        )
        for one, other in zip(whole.lineage.scores, split.lineage.scores, strict=True):
            assert torch.equal(one.ancestors, other.ancestors)
        torch.testing.assert_close(split.latents, whole.latents, rtol=1e-3, atol=1e-3)
        assert_same_picture(pixels(split), pixels(whole))


def test_generators_depend_on_the_seed_the_text_and_its_occurrence_alone():
    def first(*args):
        return [torch.randn(2, generator=g) for g in generators(*args)]

    many = first(5, ["x", "y", "x"], 3)
    assert torch.equal(torch.stack(many[3:6]), torch.stack(first(5, ["y"], 3)))
    assert torch.equal(many[1], first(5, ["x"], 8)[1])
    distinct = {tuple(value.tolist()) for value in (*many, *first(6, ["x"], 3))}
    assert len(distinct) == 12


def test_an_sd3_on_a_multistep_solver_is_refused_nothing():
    pipe = sd3(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    out = steer(pipe, PROMPT, brightness, 2, SHARP, progress=False, num_inference_steps=6)
    assert out.latents.isfinite().all()
