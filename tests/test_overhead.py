"""What steering may not spend beyond its samples: encodings, waits for the device, casts, rows."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES, family
from torch.overrides import TorchFunctionMode

from steering import FeynmanKac, generators, steer
from steering.decoding import in_float32
from steering.schedulers import stochastic

SHARP = FeynmanKac(reward_scale=300.0, num_scores=3, score_from=0.2, score_to=0.7)
PROMPTS = ["a red cube", "two dots", "a red cube"]


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device: values that are read."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.READS or name in ("nonzero", "unique", "masked_select"):
            self.counts["reads"] += 1
        return func(*args, **(kwargs or {}))


def reads_by_step(call):
    """How many values each step of a pipeline's call reads, from the second step on."""
    marks, waits = [], Waits()

    def mark(_, step, t, kept):
        marks.append(waits.counts["reads"])
        return kept

    with waits:
        call(mark)
    return [after - before for before, after in itertools.pairwise(marks)]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_no_step_reads_more_than_the_pipelines_own_and_a_scored_one_reads_once(name):
    pipe, keywords = family(name)
    keywords = {**keywords, "num_inference_steps": 8}

    def plain(mark):
        view, draws = copy.copy(pipe), generators(0, PROMPTS[:1], 4)
        view.scheduler = stochastic(pipe.scheduler, None, draws)
        view(
            prompt=PROMPTS[0], num_images_per_prompt=4, generator=draws, output_type="latent",
            callback_on_step_end=mark, **keywords,
        )  # fmt: skip

    def steered(mark):
        steer(
            pipe, PROMPTS[0], brightness, 4, SHARP, progress=False, callback_on_step_end=mark,
            **keywords,
        )  # fmt: skip

    theirs, ours = reads_by_step(plain), reads_by_step(steered)
    assert len(theirs) == len(ours) == 7
    more = [own - stock for own, stock in zip(ours, theirs, strict=True)]
    scored = [step - 1 for step in (2, 4, 5)]  # a step's reads lie between its mark and the last
    assert [more[i] for i in range(7) if i not in scored] == [0] * 4
    # One copy to the host holds all about a score. Four numbers are read of that copy, which is
    # there already: whether the rewards and the weights are finite, and the bar's ess and best
    # reward.
    assert [more[i] for i in scored] == [5] * 3


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "sana", "wan"])
def test_equal_texts_of_one_call_are_encoded_once(name, monkeypatch):
    pipe, keywords = family(name)
    rows = []
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipe, part, None)
        if encoder is None:
            continue
        real = encoder.forward

        def counting(*args, real=real, **kw):
            rows.append(len(args[0] if args else kw["input_ids"]))
            return real(*args, **kw)

        monkeypatch.setattr(encoder, "forward", counting)
    apart = steer(pipe, PROMPTS, brightness, 4, SHARP, progress=False, **keywords)
    assert max(rows) <= 4  # where a pipeline has no num_images_per_prompt
    rows.clear()
    packed = steer(
        pipe, PROMPTS, brightness, 4, SHARP, progress=False, prompts_per_call=3, **keywords
    )
    assert max(rows) <= 2  # two texts, or the negative one alone
    torch.testing.assert_close(packed.latents, apart.latents, rtol=1e-3, atol=1e-3)


def test_a_decoder_that_overflows_in_float16_is_cast_once(monkeypatch):
    pipe, keywords = family("sdxl")
    pipe.vae.to(torch.float16)
    assert pipe.vae.config.force_upcast
    stock = copy.copy(pipe)
    draws = generators(0, PROMPTS[:1], 3)
    stock.scheduler = stochastic(pipe.scheduler, None, draws)
    vars(stock)["upcast_vae"] = lambda: stock.vae.to(torch.float32)  # its own warns
    theirs = stock(
        PROMPTS[0], num_images_per_prompt=3, generator=draws, return_dict=False, **keywords
    )[0]
    casts, real = [], type(pipe.vae).to

    def counting(self, *args, **kw):
        casts.append(args[0] if args else kw["dtype"])
        return real(self, *args, **kw)

    monkeypatch.setattr(type(pipe.vae), "to", counting)
    out = steer(
        pipe, PROMPTS[:2], brightness, 3, FeynmanKac(min_ess=0.0), progress=False, **keywords
    )
    assert casts == [torch.float32]  # of the copy
    assert pipe.vae.dtype == torch.float16
    for ours, other in zip(out.images[0], theirs, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(other))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_a_float16_decoder_that_overflows_has_a_copy(name):
    pipe, _ = family(name)
    assert in_float32(pipe) is None


# --- below the floor: rows that are not evaluated


def rows_of(pipe, network, monkeypatch):
    rows, real = [], getattr(pipe, network).forward

    def counting(*args, **kw):
        rows.append(len(args[0] if args else kw.get("hidden_states", kw.get("sample"))))
        return real(*args, **kw)

    monkeypatch.setattr(getattr(pipe, network), "forward", counting)
    return rows


def test_guidance_that_ends_early_is_what_a_callback_makes_of_the_stock_pipeline(monkeypatch):
    pipe, keywords = family("sd")
    keywords = {**keywords, "num_inference_steps": 8, "guidance_scale": 5.0}

    def switch_off(view, step, t, kept):
        if step == 3:
            view._guidance_scale = 1.0
            kept["prompt_embeds"] = kept["prompt_embeds"].chunk(2)[1]
        return kept

    view, draws = copy.copy(pipe), generators(0, PROMPTS[:1], 3)
    view.scheduler = stochastic(pipe.scheduler, None, draws)
    theirs = view(
        PROMPTS[0], num_images_per_prompt=3, generator=draws, output_type="latent",
        callback_on_step_end=switch_off, callback_on_step_end_tensor_inputs=["prompt_embeds"],
        return_dict=False, **keywords,
    )[0]  # fmt: skip
    rows = rows_of(pipe, "unet", monkeypatch)
    still = FeynmanKac(reward_scale=0.0)
    out = steer(
        pipe, PROMPTS[0], brightness, 3, still, progress=False, guidance_interval=(0.0, 0.5),
        **keywords,
    )  # fmt: skip
    assert rows == [6] * 4 + [3] * 4
    torch.testing.assert_close(out.latents[0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "network"), [("sd", "unet"), ("sdxl", "unet"), ("sd3", "transformer")]
)
def test_without_a_guided_step_it_is_the_pipeline_without_guidance(name, network, monkeypatch):
    pipe, keywords = family(name)
    keywords = {**keywords, "num_inference_steps": 6}
    still = FeynmanKac(reward_scale=0.0)
    call = {"progress": False, **keywords}
    off = steer(pipe, PROMPTS[0], brightness, 3, still, **call | {"guidance_scale": 1.0})
    rows = rows_of(pipe, network, monkeypatch)
    guided = {"guidance_scale": 5.0, "guidance_interval": (0.99, 1.0)}
    out = steer(pipe, PROMPTS[0], brightness, 3, still, **call | guided)
    assert rows == [3] * 6
    torch.testing.assert_close(out.latents, off.latents, rtol=1e-4, atol=1e-4)


def test_guidance_and_a_funnel_together_evaluate_what_is_alive(monkeypatch):
    pipe, keywords = family("sd")
    keywords = {**keywords, "num_inference_steps": 8, "guidance_scale": 5.0}
    rows = rows_of(pipe, "unet", monkeypatch)
    settings = FeynmanKac(
        reward_scale=300.0, num_scores=2, score_from=0.25, score_to=0.625, funnel=(4, 2)
    )
    out = steer(
        pipe, PROMPTS[:2], brightness, 4, settings, progress=False, prompts_per_call=2,
        guidance_interval=(0.25, 0.75), **keywords,
    )  # fmt: skip
    # once a prompt beside itself and beside the other, to see that they may share a call
    assert rows == [8, 2, 2, 8, 16, 16, 16, 16, 4, 4]
    assert out.rewards.shape == (2, 2)
    assert out.manifest["guidance_interval"] == [0.25, 0.75]


@pytest.mark.parametrize("name", ["flux", "flux-true-cfg"])
def test_a_pipeline_that_guides_in_two_calls_or_none_is_told_so(name):
    pipe, keywords = family(name)
    with pytest.raises(ValueError, match="leave guidance_interval= out"):
        steer(
            pipe, PROMPTS[0], brightness, 2, progress=False, guidance_interval=(0.2, 0.7),
            **keywords,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_scores_on_the_way_look_at_fewer_pixels(name):
    pipe, keywords = family(name)
    sizes = []

    def seen(images, prompts):
        sizes.append(images.shape[-1])
        return brightness(images, prompts)

    steer(pipe, PROMPTS[0], seen, 3, SHARP, progress=False, **keywords)
    full = sizes[-1]
    assert set(sizes) == {full}
    sizes.clear()
    steer(pipe, PROMPTS[0], seen, 3, SHARP, progress=False, preview_size=0.5, **keywords)
    assert sizes[-1] == full
    assert set(sizes[:-1]) == {full // 2}
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preview_size": 0}, "preview_size=0: pass a fraction"),
        ({"preview_size": 2}, "preview_size=2: pass a fraction"),
        ({"guidance_interval": (0.5, 0.5)}, r"guidance_interval=\(0.5, 0.5\): pass two"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5: pass two"),
        ({"max_batch": "all"}, "max_batch='all': pass a whole number of 1 or more, or \"auto\""),
    ],
)
def test_bad_input_is_refused(change, message):
    pipe, keywords = family("sd")
    with pytest.raises(ValueError, match=message):
        steer(pipe, PROMPTS[0], brightness, 2, **change, **keywords)
