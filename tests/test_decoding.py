"""Latents through the pipeline's own tail, against the pipeline's own images."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from middle import Settings
from odd_pipelines import odd_pipeline
from pictures import assert_same_pictures
from tiny_pipelines import FAMILIES, family, sd

from steering import FeynmanKac, steer
from steering.decoding import Decoder
from steering.outputs import to_pil, to_tensor
from steering.schedulers import stochastic
from steering.tape import Tape, view_of

PROMPT = "a red cube"


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reward_sees_images_of_one_size_in_range(name):
    pipe, keywords = family(name)
    seen = []

    def reward(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    settings = Settings(num_scores=2, score_from=0.3)
    out = steer(pipe, PROMPT, reward, 3, settings, progress=False, **keywords)
    final = to_tensor(out.images[0], "cpu")
    assert len(seen) >= 2
    assert seen[-1].equal(final)
    for images in seen:
        assert images.shape == final.shape
        assert images.min() >= 0
        assert images.max() <= 1


@pytest.mark.parametrize("name", ["sd", "sd3", "img2img"])
def test_images_along_the_way_are_the_stock_decode_of_the_predicted_latents(monkeypatch, name):
    pipe, keywords = family(name)
    seen = []
    real = Decoder.images
    monkeypatch.setattr(
        Decoder,
        "images",
        lambda self, x0, rows=None: (seen.append((x0, real(self, x0, rows))), seen[-1][1])[1],
    )
    settings = Settings(num_scores=2, score_from=0.3)
    steer(pipe, PROMPT, brightness, 3, settings, progress=False, **keywords)
    assert seen
    for x0, images in seen:
        config = pipe.vae.config
        with torch.no_grad():
            decoded = pipe.vae.decode(x0 / config.scaling_factor + (config.shift_factor or 0))
        assert torch.equal(images, (decoded.sample * 0.5 + 0.5).clamp(0, 1))


def test_the_head_is_encoded_once_and_nothing_is_decoded_twice(monkeypatch):
    pipe, keywords = family("inpaint9")
    calls = {"encode_prompt": 0, "encode": 0, "decode": 0}

    def counted(owner, name):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(type(pipe), "encode_prompt")
    counted(pipe.vae, "encode")
    counted(pipe.vae, "decode")
    settings = Settings(num_scores=2, score_from=0.3)
    steer(pipe, PROMPT, brightness, 3, settings, progress=False, **keywords)
    # one row is decoded twice before the first move, as at the end and as on the way
    # what stands beside the latents is found among them: no second head has to tell where rows are
    assert calls == {"encode_prompt": 1, "encode": 1, "decode": 3 + 2}


def test_a_preview_decodes_along_the_way_and_the_pipeline_at_the_end():
    pipe, keywords = family("sd")
    preview = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    seen = []

    def reward(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    settings = Settings(num_scores=1, score_from=0.5, reward_scale=0.001)
    out = steer(pipe, PROMPT, reward, 2, settings, preview=preview, progress=False, **keywords)
    whole = steer(pipe, PROMPT, brightness, 2, settings, progress=False, **keywords)
    assert torch.equal(out.latents, whole.latents)
    assert np.array_equal(np.asarray(out.images[0][0]), np.asarray(whole.images[0][0]))
    assert len(seen) == 2
    assert not torch.allclose(seen[0], seen[1], atol=0.05)


def test_decode_lets_a_pipeline_in_whose_tail_cannot_be_reached():
    pipe, keywords = family("sd")
    shapes = []

    def decode(latents):
        shapes.append(tuple(latents.shape))
        return latents[:, :3].sigmoid()

    settings = Settings(num_scores=1, score_from=0.5)
    out = steer(pipe, PROMPT, brightness, 2, settings, decode=decode, progress=False, **keywords)
    expected = to_pil(out.latents[0][:, :3].sigmoid())
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(out.images[0], expected, strict=True)
    )
    assert shapes == [(2, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8)]  # the first is a trial


def test_without_progress_nothing_is_printed(capfd):
    pipe, keywords = family("sd")
    pipe.set_progress_bar_config()
    steer(pipe, PROMPT, brightness, 2, progress=False, **keywords)
    printed = capfd.readouterr()
    assert "it/s" not in printed.err + printed.out
    assert "%|" not in printed.err + printed.out


def test_decoding_in_chunks_changes_nothing_but_memory(monkeypatch):
    pipe, keywords = family("sd")
    whole = steer(pipe, PROMPT, brightness, 5, progress=False, **keywords)
    monkeypatch.setattr("steering.run.DECODE_CHUNK", 2)
    parts = steer(pipe, PROMPT, brightness, 5, progress=False, **keywords)
    torch.testing.assert_close(parts.rewards, whole.rewards, rtol=1e-4, atol=1e-3)
    assert_same_pictures(parts.images[0], whole.images[0])


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4, 8, 8), 8),
        ((4, 64, 64), 8),
        ((16, 128, 128), 2),
        ((16, 256, 256), 1),
        ((1024, 64), 8),  # packed, as Flux's: 512 x 512
        ((4096, 64), 2),
        ((16, 1, 64, 64), 8),  # one frame
    ],
)
def test_fewer_large_pictures_are_decoded_at_once(shape, rows):
    pipe, _ = family("sd")
    decoder = Decoder(pipe, stochastic(pipe.scheduler), Tape(), {}, 9)
    assert decoder._at_once(torch.zeros(9, *shape, device="meta")) == rows


class Censor(torch.nn.Module):
    """A safety checker that blackens every second image."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        flags = [i % 2 == 1 for i in range(len(images))]
        shown = 1 - torch.tensor(flags).float()
        return images * shown[:, None, None, None], flags


class Features:
    """Stands in for the safety checker's CLIP inputs."""

    def __init__(self, images, return_tensors):
        self.pixel_values = torch.zeros(len(images), 1)

    def to(self, device):
        return self


def test_the_safety_checker_sees_the_final_images_alone_and_the_reward_what_it_returns():
    pipe, keywords = family("sd")
    pipe.safety_checker = Censor().eval()
    pipe.feature_extractor = Features
    seen = []

    def reward(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    settings = Settings(num_scores=1, score_from=0.5, reward_scale=0.001)
    out = steer(pipe, PROMPT, reward, 2, settings, progress=False, **keywords)
    assert np.asarray(out.images[0][1]).max() == 0
    assert out.rewards[0, 1] == 0
    assert seen[0][1].max() > 0


def test_a_view_never_writes_to_the_pipeline():
    pipe = sd()
    before = dict(vars(pipe))
    view = view_of(pipe, scheduler="other", vae=None)
    tape = Tape()
    tape.record(view)
    assert view.scheduler == "other"
    assert vars(pipe) == before
    assert "encode_prompt" not in vars(pipe)
    assert not tape.prepared


def test_eight_bit_images_survive_the_round_trip():
    levels = torch.arange(256).float().div(255).expand(3, 256).reshape(1, 3, 16, 16)
    assert torch.equal(to_tensor(to_pil(levels), "cpu"), levels)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    for ours, their in zip(to_pil(images), theirs, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(their))
    assert copy.copy(images).equal(images)


@pytest.mark.parametrize("funnel", [(), (2,)])
def test_a_tail_that_lets_rows_see_one_another_is_refused_at_the_first_step(funnel):
    """Kandinsky 5's averages over all of a call, which decode= does not see but a funnel does."""
    pipe = odd_pipeline("averages")
    settings = FeynmanKac(num_scores=1, reward_scale=0.0, funnel=funnel)
    run = {"particles": 3, "settings": settings, "progress": False}
    with pytest.raises(ValueError, match="it mixes the rows of a call after its last step"):
        steer(pipe, "a red cube", brightness, **run)
    assert len(pipe.unet.rows) == 1
    run |= {"decode": lambda x: x[:, :3].sigmoid()}
    if funnel:
        with pytest.raises(ValueError, match="those that a funnel drops would still affect"):
            steer(pipe, "a red cube", brightness, **run)
    else:
        assert steer(pipe, "a red cube", brightness, **run).latents.isfinite().all()


@pytest.mark.parametrize("kind", ["by model", "by layer"])
def test_networks_that_come_to_the_device_on_demand_are_steered_alike(kind):
    """The tail is tried, and pictures are decoded, between the steps of the network."""
    pipe, keywords = family("img2img")
    settings = FeynmanKac(num_scores=2, reward_scale=300.0, min_ess=1.0)
    run = {"settings": settings, "progress": False, **keywords}
    plain = steer(pipe, PROMPT, brightness, 3, **run)
    pipe, _ = family("img2img")
    if kind == "by model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)
        assert pipe.unet.device.type == "meta"
    out = steer(pipe, PROMPT, brightness, 3, **run)
    assert torch.equal(out.latents, plain.latents)
    assert torch.equal(out.rewards, plain.rewards)
    assert all(hasattr(part, "_hf_hook") for part in (pipe.unet, pipe.vae, pipe.text_encoder))
