"""What is seldom asked of a run: long prompts, calls that differ in a step, other threads."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from odd_pipelines import odd_pipeline
from tiny_pipelines import family, picture

import steering.probe
from steering import FeynmanKac, steer
from steering.call import PipelineCall
from steering.denoiser import Rows
from steering.following import Following
from steering.networks import undisturbed
from steering.schedulers import Chain
from steering.tape import SHARED

PLAIN = FeynmanKac(num_scores=2, score_from=0.2, reward_scale=0.0)
MOVING = FeynmanKac(num_scores=2, score_from=0.2, score_to=0.9, reward_scale=300.0)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def latents(pipe, prompt="a red cube", settings=PLAIN, k=3, **more):
    return steer(pipe, prompt, brightness, k, settings, progress=False, **more).latents


# --- guidance in a part of the run


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_prompt_longer_than_the_encoder_reads_tells_the_halves_apart(name):
    pipe, keywords = family(name)
    longer = " ".join(f"w{i % 7} dog" for i in range(200))
    assert latents(pipe, longer, guidance_interval=(0.0, 0.5), **keywords).isfinite().all()


def test_an_empty_prompt_tells_the_halves_apart():
    pipe, keywords = family("sd")
    assert latents(pipe, "", guidance_interval=(0.0, 0.5), **keywords).isfinite().all()


def test_embeddings_that_come_as_a_list_tell_the_halves_apart():
    call = PipelineCall({"prompt_embeds": [torch.ones(3, 2)]}, {"prompt": None}, ("",))
    ours, theirs = call.changed(0).keywords["prompt_embeds"]
    assert torch.equal(ours, torch.ones(3, 2))
    assert torch.equal(theirs, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.4, 1.0)])
def test_a_further_call_with_the_prompts_alone_is_evaluated_whole(interval):
    """As skip-layer guidance makes it, between two fractions of the steps."""
    pipe, keywords = family("sd3")
    skips = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0}
    more = {**keywords, **skips, "skip_layer_guidance_stop": 1.0}
    assert latents(pipe, guidance_interval=interval, **more).isfinite().all()


def test_indices_are_made_where_the_batch_is():
    """Else each would wait for the device, at every step."""
    rows = Rows(num=3, guidance=(0.0, 0.5), progress=0.9, device=torch.device("meta"))
    assert {part.device.type for part in rows.indices(6, 1)} == {"meta"}


# --- which keywords hold pictures


def call_of(**keywords):
    return PipelineCall(keywords, dict.fromkeys(keywords) | {"prompt": None}, ("a", "b"))


def test_pictures_are_neither_masks_of_a_prompt_nor_numbers():
    call = call_of(
        prompt_attention_mask=torch.ones(2, 3),
        negative_prompt_attention_mask=torch.ones(2, 3),
        controlnet_conditioning_scale=[0.5, 0.5],
        image_guidance_scale=1.5,
        control_guidance_start=[0.0],
        frames=1,
    )
    assert call.pictures() == []
    call.check_packing(2)
    call.check_spread()


@pytest.mark.parametrize("name", ["video", "image", "control", "mask"])
def test_whatever_is_encoded_with_a_rows_noise_is_neither_packed_nor_spread(name):
    call = call_of(**{name: [picture()]})
    with pytest.raises(ValueError, match=rf"prompts_per_call=2 with {name}="):
        call.check_packing(2)
    with pytest.raises(ValueError, match=rf"spread= with {name}="):
        call.check_spread()


def test_settings_of_as_many_parts_as_there_are_rows_are_not_listed_anew():
    one = picture()
    call = call_of(image=[one, one], scale=[1.0, 1.0], names=["a", "a"]).resized(2, 6)
    assert len(call.keywords["image"]) == 6
    assert len(call.keywords["scale"]) == len(call.keywords["names"]) == 2


# --- what stands beside the latents


def test_what_follows_does_not_wait_for_the_device(monkeypatch):
    chain = Chain(noise=1.0)
    axes = {("N", "x"): 0, ("N", "image"): 0}
    known: Any = SimpleNamespace(axes=axes, learn=lambda *given: None)
    following = Following(chain, known, 2)
    call = {"x": torch.ones(2, 1), "image": torch.tensor([[1.0], [2.0]])}
    following.followed("N", call, "x")
    following.settle(torch.ones(2, 1))
    chain.step, chain.lineage, chain.last = 1, torch.tensor([1, 1]), torch.ones(2, 1)
    for read in ("cpu", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, read, lambda *args: pytest.fail("read"))
    moved = following.followed("N", call, "x")["image"]
    monkeypatch.undo()
    assert moved.tolist() == [[2.0], [2.0]]


def test_a_number_of_rows_among_the_arguments_is_no_obstacle_to_following():
    pipe = odd_pipeline("total")
    assert latents(pipe, settings=MOVING, image=picture()).isfinite().all()


# --- memory


def test_memory_that_runs_out_beside_a_call_is_no_refusal(monkeypatch):
    """The batch is halved again, as wherever else it runs out."""
    pipe, first, runs = odd_pipeline("layers"), steering.probe.Again.first, []
    prepare = type(pipe).prepare_latents

    def prepared(self, rows, generator):
        if rows == 3 and len(runs) == 1:
            runs.append("out")
            raise torch.OutOfMemoryError("no more")
        return prepare(self, rows, generator)

    def counted(self, *args):
        runs.append("beside")
        return first(self, *args)

    monkeypatch.setattr(type(pipe), "prepare_latents", prepared)
    monkeypatch.setattr(steering.probe.Again, "first", counted)
    cut = latents(pipe, k=4, max_batch=4)
    assert runs == ["beside", "out", "beside"]
    torch.testing.assert_close(cut, latents(odd_pipeline("layers"), k=4))


# --- another number of prompts


def test_the_last_call_may_have_fewer_prompts_than_the_one_that_was_learned_from():
    """One prompt is asked for by a count, several are written out: rows may lie otherwise."""
    prompts = ["a red cube", "two dots", "x"]
    pipe = odd_pipeline("ignores count late")
    cut = latents(pipe, prompts, k=2, max_batch=2, prompts_per_call=2)
    whole = latents(odd_pipeline(), prompts, k=2)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_what_a_number_of_rows_is_rounded_to_is_not_taken_for_what_a_prompt_sees():
    """In half precision guidance enlarges it to some per cent."""
    pipe = odd_pipeline()
    asked = pipe._asked
    pipe._asked = lambda x, t, both: tuple(v * (1 + 0.05 * len(x)) for v in asked(x, t, both))
    assert latents(pipe, ["a red cube", "x"], k=2, prompts_per_call=2).isfinite().all()


def test_looking_for_what_prompts_see_evaluates_no_more_rows_than_fit():
    pipe = odd_pipeline()
    latents(pipe, ["a red cube", "two dots"], k=4, max_batch=2, prompts_per_call=2)
    assert max(pipe.unet.rows) == 2


# --- other threads


def test_the_precision_of_a_decoder_is_not_read_while_another_thread_has_raised_it():
    vae = torch.nn.Linear(1, 1).half()
    vae.dtype = torch.float32  # raised by another thread's head, which holds the lock
    pipe = SimpleNamespace(vae=vae, components={})
    SHARED.acquire()
    done = threading.Thread(target=lambda: undisturbed(pipe).__enter__())
    done.start()
    done.join(0.1)
    waited = done.is_alive()
    SHARED.release()
    done.join()
    assert waited


def passes_through(context):
    with context:
        pass


def test_calls_with_perturbed_attention_take_turns():
    """Each puts back the processors that it met, which may not be those of another's run."""
    pipe = SimpleNamespace(pag_attn_processors={}, components={})
    with undisturbed(pipe):
        other = threading.Thread(target=lambda: passes_through(undisturbed(pipe)))
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_noise_that_another_thread_draws_is_none_of_the_pipelines():
    pipe = odd_pipeline()
    prepare = pipe.prepare_latents

    def prepared(rows, generator):
        other = threading.Thread(target=lambda: torch.randn(1))
        other.start()
        other.join()
        return prepare(rows, generator)

    pipe.prepare_latents = prepared
    assert torch.equal(latents(pipe), latents(odd_pipeline()))


def test_noise_from_the_global_generator_is_told_in_a_sentence_of_its_own():
    pipe = odd_pipeline()
    pipe.prepare_scale = lambda rows: torch.rand(rows, 1, 1, 1)
    with pytest.raises(ValueError, match=r"^OddPipeline draws noise from PyTorch's global"):
        latents(pipe)
    assert len(pipe.unet.rows) <= 2
