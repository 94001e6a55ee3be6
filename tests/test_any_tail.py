"""The tail of a pipeline's call, which steer() has never seen: it is used as it is, or refused."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import numpy as np
import pytest
import torch
from odd_pipelines import odd_pipeline
from odd_runs import FUNNEL, PLAIN, PROMPT, brightness, latents

from steering import FeynmanKac, steer
from steering.outputs import to_tensor

# --- the tail


@pytest.mark.parametrize("settings", [PLAIN, FeynmanKac(min_ess=0.0)])
def test_a_tail_that_fails_is_refused_at_the_first_step(settings):
    pipe = odd_pipeline("no tail")
    with pytest.raises(ValueError, match=r"cannot decode .*no picture can be made .* Pass decode="):
        latents(pipe, settings)
    assert len(pipe.unet.rows) == 1
    assert latents(pipe, settings, decode=lambda x: x[:, :3].sigmoid()).isfinite().all()


def test_a_decode_that_fails_is_refused_at_the_first_step():
    pipe = odd_pipeline()
    with pytest.raises(ValueError, match=r"decode= returned \(2, 4, 8, 8\) for 2 latents"):
        latents(pipe, FeynmanKac(min_ess=0.0), decode=lambda x: x)
    assert len(pipe.unet.rows) == 1


def test_latents_that_are_returned_in_another_form_are_decoded_as_the_loop_left_them():
    pipe = odd_pipeline("unpacks")
    out = steer(pipe, PROMPT, brightness, 3, PLAIN, progress=False)
    plain = steer(odd_pipeline(), PROMPT, brightness, 3, PLAIN, progress=False)
    assert out.latents.shape == (1, 3, 4, 64)  # as the pipeline returns them
    assert torch.equal(out.rewards, plain.rewards)
    seen = []
    decode = lambda x: (seen.append(tuple(x.shape)), x[:, :3].sigmoid())[1]  # noqa: E731
    latents(pipe, decode=decode)
    assert {shape[1:] for shape in seen} == {(4, 8, 8)}


@pytest.mark.parametrize("settings", [PLAIN, FUNNEL])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_tail_that_needs_all_rows_gets_them_and_decodes_those_that_count(
    monkeypatch, settings, chunk
):
    monkeypatch.setattr("steering.run.DECODE_CHUNK", chunk)
    pipe = odd_pipeline("mixes")
    out = steer(pipe, PROMPT, brightness, 3, settings, progress=False)
    assert max(pipe.vae.rows) == min(chunk, 3)
    assert sum(pipe.vae.rows[-3:]) <= 6
    alive = len(out.images[0])
    pixels = out.latents[0] * torch.linspace(1, 2, 3)[:alive, None, None, None] * 0.5
    expected = (pixels[:, :3] / 2 + 0.5).clamp(0, 1)
    shown = to_tensor(out.images[0], "cpu")
    torch.testing.assert_close(shown, expected, rtol=0, atol=0.6 / 255)


@pytest.mark.parametrize("settings", [PLAIN, FUNNEL])
def test_a_decoder_of_one_row_a_call_is_given_one(settings):
    whole = steer(odd_pipeline(), PROMPT, brightness, 3, settings, progress=False)
    pipe = odd_pipeline()
    pipe.vae.one_a_call = True
    out = steer(pipe, PROMPT, brightness, 3, settings, progress=False)
    torch.testing.assert_close(out.rewards, whole.rewards, rtol=1e-5, atol=1e-5)
    assert set(pipe.vae.rows) == {1}


def test_arrays_for_tensors_are_scored_alike():
    whole = steer(odd_pipeline(), PROMPT, brightness, 3, PLAIN, progress=False)
    out = steer(odd_pipeline("arrays"), PROMPT, brightness, 3, PLAIN, progress=False)
    assert torch.equal(out.rewards, whole.rewards)


# --- what is kept


def test_what_fails_after_the_steps_keeps_their_latents():
    pipe = odd_pipeline()
    whole = steer(pipe, ["a", "b"], brightness, 2, PLAIN, progress=False)

    def breaks(images, prompts):
        if prompts[0] == "b":
            raise RuntimeError("broken")
        return images.mean((1, 2, 3)) * 10

    with pytest.raises(RuntimeError, match="broken") as caught:
        steer(pipe, ["a", "b"], breaks, 2, PLAIN, progress=False)
    kept = caught.value.finished
    assert kept.prompts == ("a", "b")
    assert torch.equal(kept.latents, whole.latents)
    assert [len(row) for row in kept.images] == [2, 0]
    assert torch.equal(kept.rewards[0], whole.rewards[0])
    assert kept.rewards[1].isnan().all()
    assert np.isnan(kept.log_z[1].item())


# --- one chain a call


def test_a_call_without_a_step_is_no_steered_run():
    pipe = odd_pipeline("no steps")
    with pytest.raises(ValueError, match="made no step of its scheduler, so nothing was steered"):
        latents(pipe)


def test_a_call_that_denoises_twice_is_refused():
    with pytest.raises(ValueError, match="denoises more than once per call"):
        latents(odd_pipeline("twice"))


def test_rows_asked_for_in_another_way_are_found_anew():
    """What a count left to all rows has a row each where the prompts are written out (Wan I2V)."""
    pipe = odd_pipeline("ignores count late")
    torch.testing.assert_close(latents(pipe, max_batch=2), latents(odd_pipeline()))
