"""Pipelines that steer() has never seen: it finds out how they are made, or refuses them."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import pytest
import torch
from odd_pipelines import LENGTH, odd_pipeline
from odd_runs import FUNNEL, PLAIN, PROMPT, brightness, latents
from tiny_pipelines import picture

from steering import FeynmanKac, generators, steer
from steering.axes import rows_of
from steering.copies import as_many_as_copies, of_copies
from steering.schedulers import stochastic

ARGUMENTS = ["layers", "positions", "table", "lengths", "nested", "lists"]


def own(pipe, k=3, **keywords):
    """What the pipeline's own call returns."""
    noise = generators(0, [PROMPT], k)
    pipe.scheduler = stochastic(pipe.scheduler, 0.5, noise)
    return pipe([PROMPT] * k, generator=noise, output_type="latent", **keywords)[0]


def unguided_from(pipe, step, half=1):
    """At scale 1 the guided velocity is the conditional one: from `step` on, its other half."""
    asked, calls = pipe._asked, []

    def halves(x, t, both):
        calls.append(t)
        found = asked(x, t, both)
        return found if len(calls) <= step else (found[half],) * 2

    pipe._asked = halves


# --- where the rows of a batch are


@pytest.mark.parametrize("odd", [*ARGUMENTS, "interleaved", "prompt first"])
@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_a_batch_that_is_cut_gives_what_it_gives_whole(odd, max_batch):
    """Also where the rows are on another axis, and where another length equals their number."""
    pipe = odd_pipeline(odd)
    whole = latents(pipe)
    pipe.unet.rows.clear()
    cut = latents(pipe, max_batch=max_batch)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    assert max(pipe.unet.rows) == max_batch
    torch.testing.assert_close(whole, own(odd_pipeline(odd)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", ["layers", "positions", "lengths", "nested"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"max_batch": 2}, [2, 2, 2] * 6),
        ({"settings": FUNNEL}, [6, 6, 6, 4, 4, 4]),
        ({"guidance_interval": (0.0, 0.6)}, [6, 6, 6, 6, 3, 3]),
    ],
)
def test_an_argument_that_a_later_step_brings_is_cut_as_well(odd, change, rows):
    """What the network was asked before is not asked again to find where its rows are."""
    pipe, whole = odd_pipeline("late", odd), odd_pipeline("late", odd)
    cut = latents(pipe, **change)
    assert pipe.unet.rows == rows
    if "guidance_interval" in change:
        unguided_from(whole, 4)
    torch.testing.assert_close(cut, latents(whole)[: len(cut)], rtol=1e-5, atol=1e-5)


def test_what_a_later_step_brings_and_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"cannot be cut: its argument \['total'\] is a int"):
        latents(odd_pipeline("late", "total"), max_batch=2)


def test_a_callback_is_told_of_the_run_alone():
    told, pipe = [], odd_pipeline("late", "layers")
    latents(pipe, max_batch=2, callback_on_step_end=lambda pipe, t: told.append(float(t)))
    assert told == sorted(told, reverse=True)
    assert len(told) == 6


def test_a_cut_costs_no_evaluation_of_the_network():
    pipe = odd_pipeline("layers")
    latents(pipe, max_batch=2)
    assert pipe.unet.rows == [2, 2, 2] * 6


def test_nothing_is_looked_for_where_nothing_is_cut(monkeypatch):
    pipe = odd_pipeline("layers")
    heads = []
    encode = type(pipe).encode_prompt
    monkeypatch.setattr(
        type(pipe), "encode_prompt", lambda *args: (heads.append(1), encode(*args))[1]
    )
    latents(pipe)
    assert len(heads) == 1
    latents(pipe, max_batch=2)
    assert len(heads) == 3  # once more, with other rows


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_any_number_of_particles_is_cut(k):
    pipe = odd_pipeline("positions")
    cut = latents(pipe, k=k, max_batch=1)
    torch.testing.assert_close(cut, latents(pipe, k=k), rtol=1e-5, atol=1e-5)


def test_several_prompts_a_call_are_cut_alike():
    pipe, prompts = odd_pipeline("layers"), ["a red cube", "two dots", "x"]
    call = {"progress": False, "prompts_per_call": 2}
    whole = steer(pipe, prompts, brightness, 2, PLAIN, **call)
    cut = steer(pipe, prompts, brightness, 2, PLAIN, max_batch=3, **call)
    torch.testing.assert_close(cut.latents, whole.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ("total", r"its argument \['total'\] is a int"),
        ("packed", r"its arguments have \[6, 36\] rows"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_evaluation(odd, why):
    pipe = odd_pipeline(odd)
    assert 6 * LENGTH == 36
    with pytest.raises(ValueError, match=rf"batch of Mixer cannot be cut: {why}. Leave max_batch="):
        latents(pipe, max_batch=2)
    assert pipe.unet.rows == []
    assert latents(pipe).isfinite().all()


@pytest.mark.parametrize("odd", [*ARGUMENTS[:2], *ARGUMENTS[3:], "prompt first"])
def test_a_funnel_leaves_out_the_rows_of_the_dead(odd):
    pipe = odd_pipeline(odd)
    few = latents(pipe, FUNNEL)
    assert pipe.unet.rows == [6, 6, 6, 4, 4, 4]
    plain = FeynmanKac(num_scores=1, score_from=0.2, score_to=0.4, reward_scale=0.0)
    torch.testing.assert_close(few, latents(pipe, plain)[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"settings": FUNNEL}, {"guidance_interval": (0.0, 0.5)}])
def test_an_order_of_rows_that_cannot_be_told_is_refused(change):
    pipe = odd_pipeline("interleaved")
    with pytest.raises(ValueError, match="the order of the particles in its 6 rows is unknown"):
        latents(pipe, **change)
    assert pipe.unet.rows == []


@pytest.mark.parametrize(
    "change", [{"settings": FUNNEL}, {"guidance_interval": (0.0, 0.5)}, {"max_batch": 2}]
)
def test_what_else_a_network_may_keep_of_its_rows_is_refused_at_the_first_step(change):
    pipe = odd_pipeline("cache")
    with pytest.raises(ValueError, match="it returns a Cache, which may hold rows as well"):
        latents(pipe, **change)
    assert sum(pipe.unet.rows) <= 6
    assert latents(pipe).isfinite().all()


@pytest.mark.parametrize(
    "change", [{"settings": FUNNEL}, {"guidance_interval": (0.0, 0.5)}, {"max_batch": 2}]
)
def test_a_network_that_is_not_known_is_not_passed_over(monkeypatch, change):
    monkeypatch.setattr("steering.networks.NETWORKS", ("transformer",))
    pipe = odd_pipeline()
    with pytest.raises(ValueError, match="batch of OddPipeline cannot be cut: none of its network"):
        latents(pipe, **change)
    assert len(pipe.unet.rows) == 1


def test_an_interval_of_guidance_that_nothing_shows_is_refused_at_the_first_step():
    pipe = odd_pipeline("unguided")
    with pytest.raises(ValueError, match=r"network gets each particle 1 times per step"):
        latents(pipe, guidance_interval=(0.0, 0.9))
    assert pipe.unet.rows == []


# --- what has a row for each guidance copy


def one_by_one(*odd, unguided=None):
    """What the pipeline's own calls of one particle each return."""
    rows = []
    for noise in generators(0, [PROMPT], 3):
        pipe = odd_pipeline(*odd)
        pipe.scheduler = stochastic(pipe.scheduler, 0.5, [noise])
        if unguided is not None:
            unguided_from(pipe, unguided)
        rows.append(pipe([PROMPT], generator=[noise], output_type="latent")[0][0])
    return torch.stack(rows)


@pytest.mark.parametrize("odd", [("shifts",), ("sizes",), ("shifts", "sizes", "pair")])
@pytest.mark.parametrize(
    ("change", "unguided"),
    [
        ({}, None),
        ({"max_batch": 1}, None),
        ({"max_batch": 2}, None),  # as many as there are copies
        ({"max_batch": 4}, None),
        ({"settings": FUNNEL}, None),
        ({"guidance_interval": (0.0, 0.6)}, 4),
    ],
)
def test_what_has_a_row_for_each_copy_is_dealt_to_its_rows(odd, change, unguided):
    """Its own call takes one particle alone (PRX's two timesteps)."""
    with pytest.raises(RuntimeError, match="must match the size"):
        own(odd_pipeline(*odd))
    dealt = latents(odd_pipeline(*odd), **change)
    alone = one_by_one(*odd, unguided=unguided)[: len(dealt)]
    torch.testing.assert_close(dealt, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_batch", [1, 2])
def test_one_particle_that_is_cut_has_what_belongs_to_each_copy(max_batch):
    dealt = latents(odd_pipeline("shifts"), k=1, max_batch=max_batch)
    torch.testing.assert_close(dealt, one_by_one("shifts")[:1], rtol=1e-5, atol=1e-5)


def test_several_prompts_a_call_have_what_belongs_to_each_copy():
    prompts = ["a red cube", "dots", "two small dots here"]
    apart = packed(odd_pipeline("shifts"), prompts, prompts_per_call=1)
    torch.testing.assert_close(packed(odd_pipeline("shifts"), prompts), apart)


def test_what_all_rows_share_is_not_dealt_though_it_has_as_many_entries():
    """It takes one evaluation of one row to know."""
    pipe = odd_pipeline("pair")
    torch.testing.assert_close(latents(pipe, max_batch=2), own(odd_pipeline("pair")))
    assert pipe.unet.rows == [1] + [2, 2, 2] * 6
    assert {len(odd["pair"]) for odd in pipe.unet.seen} == {2}


def test_copies_whose_rows_are_not_known_are_refused():
    """Their rows alternate, so nothing shows which of them are of a copy."""
    with pytest.raises(ValueError, match="which of its 6 rows form a copy is unknown"):
        latents(odd_pipeline("shifts", "interleaved"), max_batch=2)
    with pytest.raises(ValueError, match=r"cannot make 3 rows in one call.*must match the size"):
        latents(odd_pipeline("shifts", "interleaved"))


def test_a_network_that_never_gives_one_row_is_refused():
    call, axes = {"x": torch.ones(6, 1), "t": torch.ones(2)}, {("N", "x"): 0, ("N", "t"): None}
    paths = as_many_as_copies("N", call, axes, 2)
    assert paths == [("N", "t")]
    with pytest.raises(ValueError, match=r"whether \['t'\] has one row per guidance copy"):
        of_copies("N", call, axes, paths, lambda call: 6)

    def full(call):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        of_copies("N", call, axes, paths, full)


def test_rows_of_an_output_that_is_a_list_are_its_entries():
    row = torch.ones(4, 8, 8)
    assert rows_of(([row, row],), as_list=True) == 2
    assert rows_of({"state": None, "sample": torch.ones(6, 4)}) == 6
    assert rows_of((torch.ones(()),)) is None


# --- which half carries the prompt


@pytest.mark.parametrize("odd", [(), ("prompt first",), ("prompt first", "lists")])
def test_the_rows_without_guidance_are_those_with_the_prompt(odd):
    pipe = odd_pipeline(*odd)
    interval = latents(pipe, guidance_interval=(0.0, 0.01))
    one = odd_pipeline(*odd)
    unguided_from(one, 1, half=0 if "prompt first" in odd else 1)
    torch.testing.assert_close(interval, latents(one), rtol=1e-5, atol=1e-5)


def test_a_prompt_that_changes_nothing_is_refused():
    pipe = odd_pipeline()
    pipe.encode_prompt = lambda texts, negative, count: (torch.ones(len(texts) * count, 6, 4),) * 2
    with pytest.raises(ValueError, match="which half of it carries the prompt is unknown"):
        latents(pipe, guidance_interval=(0.0, 0.5))


# --- how to ask for rows


def test_prompts_are_written_out_where_the_count_is_ignored():
    ignoring = odd_pipeline("ignores count")
    assert torch.equal(latents(ignoring), latents(odd_pipeline()))
    torch.testing.assert_close(latents(ignoring, max_batch=2), latents(ignoring))


def test_pictures_too():
    pipe = odd_pipeline("wants pictures")
    assert torch.equal(latents(pipe, image=picture()), latents(odd_pipeline()))


def test_where_no_way_works_the_first_error_is_raised():
    pipe = odd_pipeline("wants pictures")
    with pytest.raises(IndexError, match="a picture a row"):
        latents(pipe, image=[picture()] * 4)


def test_a_pipeline_that_fails_on_more_rows_than_one_is_refused():
    why = r"cannot make 3 rows in one call.* one row works, but several fail.*\(rows of several"
    with pytest.raises(ValueError, match=why) as caught:
        latents(odd_pipeline("one row"))
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- several prompts a call


def packed(pipe, prompts, **change):
    call = {"progress": False, "prompts_per_call": 2} | change
    return steer(pipe, prompts, brightness, 2, PLAIN, **call).latents


def test_prompts_that_see_how_long_the_others_of_their_call_are_are_refused():
    pipe, prompts = odd_pipeline("sees the longest"), ["a red cube", "dots", "two small dots here"]
    with pytest.raises(ValueError, match=r"first step of 'dots' is different beside 'two small"):
        packed(pipe, prompts)
    assert pipe.unet.rows == [8, 4, 4]  # the call's first step, and that of the two pairs
    assert packed(pipe, prompts, prompts_per_call=1).isfinite().all()


def test_half_precision_hides_no_sight_of_the_others_lengths():
    """There a few words change less than rounding may, so many more are tried."""
    pipe, prompts = odd_pipeline("sees it a little"), ["dots", "two dots"]
    pipe.unet.dtype = torch.bfloat16  # by which the threshold goes; computed in float32
    with pytest.raises(ValueError, match=r"first step of 'dots' is different beside 'two dots two"):
        packed(pipe, prompts)
    pipe = odd_pipeline()
    pipe.unet.dtype = torch.bfloat16
    assert packed(pipe, prompts).isfinite().all()


@pytest.mark.parametrize("odd", [(), ("ignores count late",)])
def test_prompts_that_do_not_see_one_another_are_packed_and_tried_once(odd):
    pipe, prompts = odd_pipeline(*odd), ["a red cube", "dots", "two small dots here", "x"]
    alone = packed(pipe, prompts, prompts_per_call=1)
    pipe.unet.rows.clear()
    torch.testing.assert_close(packed(pipe, prompts), alone, rtol=1e-5, atol=1e-5)
    assert pipe.unet.rows == [8, 4, 4] + [8] * 11


def test_a_pipeline_that_fails_on_several_prompts_is_refused():
    with pytest.raises(
        ValueError, match=r"cannot make 4 rows of 2 prompts in one call: .*\(texts of"
    ):
        packed(odd_pipeline("one text"), ["a red cube", "dots"])
    assert packed(odd_pipeline("one text"), ["a", "b"], prompts_per_call=1).isfinite().all()
