"""What a run leaves behind when it is cut off, what it refuses, and that its weights add up."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import importlib
import itertools
import json
import logging

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from odd_pipelines import odd_pipeline
from safetensors.torch import load_file
from tiny_pipelines import family, picture, sd

import rewards
import steering
from steering import FeynmanKac, steer
from steering.denoiser import Rows
from steering.filter import close, final_log_z, resample, start, weigh
from steering.networks import undisturbed
from steering.potentials import POTENTIALS

PROMPT = "a red cube"
SHARP = FeynmanKac(reward_scale=300.0, min_ess=1.0)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


@pytest.mark.parametrize(
    ("max_batch", "chunks"), [(None, (8, 4)), (4, (4, 2)), (16, (8, 4)), (1, (1, 1))]
)
def test_halving_counts_from_what_was_tried(max_batch, chunks):
    assert tuple(Rows(max_batch, halvings=h).chunk(8) for h in (0, 1)) == chunks


def test_out_of_memory_while_decoding_few_particles_halves_the_decoder_too(monkeypatch):
    pipe, keywords = family("sd")
    real, sizes = pipe.vae.decode, []

    def small(z, *args, **kw):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(z, *args, **kw)

    monkeypatch.setattr(pipe.vae, "decode", small)
    out = steer(pipe, PROMPT, brightness, 4, SHARP, progress=False, **keywords)
    assert len(out.images[0]) == 4
    assert set(sizes) == {1, 4, 2}  # one row is tried first
    assert out.manifest["halvings"] == 1


def test_a_halving_after_the_first_prompt_is_on_record(monkeypatch):
    pipe, keywords = family("sd")
    real, calls = pipe.unet.forward, itertools.count()

    def tight(x, *args, **kw):
        if next(calls) > 10 and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, *args, **kw)

    monkeypatch.setattr(pipe.unet, "forward", tight)
    keywords["num_inference_steps"] = 8
    out = steer(pipe, ["a", "b"], brightness, 2, SHARP, progress=False, **keywords)
    assert out.manifest["halvings"] == 1


def test_what_cuts_a_run_off_leaves_no_processors_of_perturbed_attention():
    pipe = sd(StableDiffusionPAGPipeline, pag_applied_layers="mid")
    before = {name: type(p) for name, p in pipe.unet.attn_processors.items()}

    def broken(images, prompts):
        return torch.full((len(images),), torch.nan)

    with pytest.raises(ValueError, match="NaN"):
        steer(pipe, PROMPT, broken, 2, SHARP, progress=False, num_inference_steps=6)
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_what_cuts_a_run_off_leaves_the_decoder_in_its_precision():
    """SDXL raises a float16 decoder to float32 while it decodes."""
    pipe, _ = family("sdxl")
    pipe.vae.to(torch.float16)

    def fails_in_mid_decode():
        with undisturbed(pipe):
            pipe.vae.to(torch.float32)
            raise MemoryError

    with pytest.raises(MemoryError):
        fails_in_mid_decode()
    assert pipe.vae.dtype == torch.float16


def test_whatever_cuts_a_run_off_hands_over_the_finished_prompts():
    pipe, keywords = family("sd")

    def broken(images, prompts):
        return brightness(images, prompts) + (torch.nan if prompts[0] == "b" else 0.0)

    with pytest.raises(ValueError, match=r"prompt 1, 'b'") as error:
        steer(pipe, ["a", "b"], broken, 2, SHARP, progress=False, **keywords)
    assert error.value.finished.prompts == ("a",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps=0: pass a whole number of 1 or more"),
        (
            {"settings": FeynmanKac(noise=0.0, min_ess=0.0, num_scores=1, funnel=(1,))},
            r"noise=0 .* min_ess=0 and no funnel",
        ),
        ({"reward": rewards.load("jpeg"), "references": [["x"]]}, "reward takes no references"),
    ],
)
def test_it_is_refused(change, message):
    pipe, keywords = family("sd")
    given = {"reward": brightness, "particles": 2, "progress": False} | keywords | change
    with pytest.raises(ValueError, match=message):
        steer(pipe, [PROMPT], **given)


def test_a_picture_for_each_prompt_is_refused():
    pipe, keywords = family("img2img")
    given = keywords | {"image": [picture(), picture()]}
    with pytest.raises(ValueError, match=r"holds different images, .* in a separate call"):
        steer(pipe, ["a", "b"], brightness, 2, SHARP, progress=False, **given)


def test_where_nothing_can_resample_the_warning_names_min_ess(caplog):
    """An effective sample size is never below 1, which is half of two particles."""
    pipe, keywords = family("sd")
    settings = FeynmanKac(reward_scale=1e6, min_ess=0.5)
    with caplog.at_level(logging.WARNING):
        steer(pipe, PROMPT, brightness, 2, settings, progress=False, **keywords)
    assert "raise min_ess." in caplog.text


def test_a_funnel_must_not_shrink_where_copies_would_stay_copies():
    from steering.particles import Particles
    from steering.schedulers import Look

    settings = FeynmanKac(num_scores=2, score_from=0.2, score_to=0.5, funnel=(4, 2))
    filter_ = Particles(1, 4, settings, None, [], Rows(), lambda i, j: "", lambda *a: None)
    look = Look(0, (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0), lambda: torch.zeros(1))
    with pytest.raises(ValueError, match=r"shrinks at step 5, which draws no noise"):
        filter_(look)


def test_submodules_that_the_design_names_are_there():
    assert steering.schedulers is importlib.import_module("steering.schedulers")
    assert steering.tiny is importlib.import_module("steering.tiny")


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("tempering", ["none", "linear", "adaptive"])
@pytest.mark.parametrize("funnel", [(), (4, 3, 2)])
def test_weights_and_log_z_follow_from_the_scores_on_record(potential, tempering, funnel):
    """The lineage, replayed through the filter's own functions, ends in the reported weights.

    The filter itself is tested against closed forms; this ties a pipeline's run to it.
    """
    pipe, keywords = family("sd")
    settings = FeynmanKac(
        reward_scale=100.0,
        potential=potential,
        tempering=tempering,
        num_scores=3,
        min_ess=0.9,
        funnel=funnel,
        noise=1.0,
    )
    keywords["num_inference_steps"] = 8
    out = steer(pipe, PROMPT, brightness, 4, settings, progress=False, **keywords)
    state = start(1, 4)
    resampled = 0
    for i, score in enumerate(out.lineage.scores):
        state = weigh(state, score.rewards, settings, (i + 1) / (len(out.lineage.scores) + 1))
        torch.testing.assert_close(state.log_weights, score.log_weights)
        num = score.ancestors.shape[1]

        def recorded(weights, num, generators, ancestors=score.ancestors):
            return ancestors

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(steering.filter.RESAMPLERS, settings.resampler, recorded)
            state, _, _, _ = resample(state, settings, [], num)
        resampled += int(score.resampled.any())
    state = close(state, out.rewards, settings)
    torch.testing.assert_close(out.log_weights, state.log_weights)
    torch.testing.assert_close(out.log_z, final_log_z(state))
    assert resampled


@pytest.mark.parametrize("prompts", [["a", "b", "a b"], ["b"]])
def test_what_was_not_decoded_is_saved_by_its_latents(tmp_path, prompts):
    """The rest is saved as if it were all, so that a report and every reader take it."""
    settings, broken = FeynmanKac(num_scores=1), []

    def breaks(images, prompts):
        broken.append(prompts[0])
        if broken.count("b") > 1:
            raise RuntimeError("broken")
        return images.mean((1, 2, 3)) * 10

    with pytest.raises(RuntimeError, match="broken") as caught:
        steer(odd_pipeline(), prompts, breaks, 2, settings, progress=False)
    kept = caught.value.finished
    assert kept.prompts == tuple(prompts[: prompts.index("b") + 1])
    with pytest.raises(ValueError, match="'b' has no images"):
        kept.sample(torch.Generator())
    with pytest.raises(ValueError, match="'b' has no images"):
        _ = kept.best
    kept.save(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "NaN" not in text
    manifest = json.loads(text)
    late = manifest["undecoded"]
    assert late["prompts"] == ["b"]
    saved = load_file(tmp_path / late["files"][0])["latents"]
    assert torch.equal(saved, kept.latents[-1])
    if prompts == ["b"]:
        assert "results" not in manifest
        return
    broken.clear()
    whole = steer(odd_pipeline(), "a", breaks, 2, settings, progress=False).save(tmp_path / "whole")
    expected = json.loads((whole / "manifest.json").read_text())
    assert {name: manifest[name] for name in expected} == expected
    for name in ("lineage.json", "0000-00.png", "0000-01.png", "previews-0000.webp"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
