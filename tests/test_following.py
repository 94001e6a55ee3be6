"""What belongs to a row beside its latents follows it, and what was passed in is not changed."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import weakref

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.hooks import LayerSkipConfig
from tiny_pipelines import family, sd
from zoo.accounts import ANIMALS, bare
from zoo.building import Animal, call_of, pipeline_of
from zoo.checks import Subject, fingerprint, lineage, run

from steering import steer
from steering.following import Following, follow_momentum
from steering.schedulers import Chain

# of diffusers itself, about its own modules
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

APG = Animal(
    {"guider": ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_momentum": -0.5})}
)


def tiny(name, animal=None):
    animal = animal or ANIMALS.get(name, Animal())
    return Subject(pipeline_of(name, animal), call_of(name, animal))


@pytest.mark.parametrize(
    "name", ["FluxControlPipeline", "FluxControlNetPipeline", "StableUnCLIPPipeline"]
)
def test_what_the_head_made_of_each_rows_noise_follows_the_lineage(name):
    """A control image that was encoded, a prior's steps.

    `lineage` gives all rows the latents and the noise of the first, and finds them equal."""
    lineage(tiny(name))


def test_the_momentum_of_guidance_follows_the_lineage():
    lineage(tiny("MotifVideoPipeline", APG))


def test_momentum_is_taken_from_the_rows_that_survive():
    class Buffer:
        running_average = torch.arange(6.0).reshape(3, 2)

    class Guider:
        def __init__(self):
            self.momentum_buffer, self.other = Buffer(), 3

    guider = Guider()
    follow_momentum([guider], torch.tensor([2, 2, 0]), lambda x: x)
    assert guider.momentum_buffer.running_average[:, 0].tolist() == [4.0, 4.0, 0.0]


class Learned:
    """A batch whose rows are all on the first axis; `asked` counts how often it was asked."""

    def __init__(self, *names):
        self.axes = {("N", name): 0 for name in names} | {("N", "shift"): None}
        self.asked = 0

    def learn(self, name, call, n):
        self.asked += 1


def call_of_rows(latents, beside, residual):
    return {
        "hidden_states": torch.cat([latents, beside], 1).repeat(2, 1, 1),
        "image": beside.repeat(2, 1, 1),
        "residual": residual.repeat(2, 1, 1),
        "text": torch.arange(4.0).expand(6, 4),
        "shift": torch.ones(5),
    }


def plain(call):
    return {key: value.reshape(len(value), -1)[:, -1].tolist() for key, value in call.items()}


LATENTS = torch.tensor([[1.0], [2.0], [3.0]])[:, :, None]


def test_what_is_kept_from_the_head_moves_and_what_is_computed_on_the_way_does_not():
    """The latents stand beside a row's picture; a ControlNet's output is already of these rows."""
    beside, chain = LATENTS * 10, Chain(noise=1.0)
    batch = Learned("hidden_states", "image", "residual", "text")
    following = Following(chain, batch, 3)

    def called(latents, residual):
        call = call_of_rows(latents, beside, residual)
        return following.followed("N", call, "hidden_states")

    assert plain(called(LATENTS, LATENTS))["image"] == [10.0, 20.0, 30.0] * 2
    following.settle(LATENTS)
    assert batch.asked == 0
    chain.step, chain.lineage, chain.last = 1, torch.tensor([2, 0, 0]), LATENTS + 5
    moved = called(LATENTS + 5, LATENTS + 7)
    assert moved["hidden_states"][..., 0].tolist() == [[6.0, 30.0], [7.0, 10.0], [8.0, 10.0]] * 2
    assert plain(moved)["image"] == [30.0, 10.0, 10.0] * 2
    assert plain(moved)["residual"] == [8.0, 9.0, 10.0] * 2


def test_rows_are_looked_for_only_where_what_stays_may_differ_between_them():
    chain, batch = Chain(noise=1.0), Learned()
    following = Following(chain, batch, 3)
    for step in range(4):
        chain.step = step
        chain.lineage = torch.tensor([2, 0, 0]) if step > 1 else None
        chain.last = LATENTS + step
        beside = LATENTS * 10 + step
        call = call_of_rows(LATENTS + step, beside, LATENTS) | {"hidden_states": LATENTS + step}
        del call["residual"]
        assert plain(following.followed("N", call, "hidden_states")) == plain(call)
        following.settle(LATENTS)
    assert batch.asked == 0


@pytest.mark.parametrize("other", ["N", "M"])
def test_all_pictures_of_a_step_follow_whichever_call_they_are_handed_to(other):
    """A network may be asked twice a step with other pictures of the same rows."""
    pictures, chain = [LATENTS * 10, LATENTS * 100], Chain(noise=1.0)
    batch = Learned("x", "image")
    batch.axes |= {("M", name): 0 for name in ("x", "image")}
    following = Following(chain, batch, 3)

    def called(step):
        chain.step, chain.last, x = step, LATENTS + step, LATENTS + step
        calls = zip(("N", other), pictures, strict=True)
        return [
            following.followed(name, {"x": x, "image": picture.clone()}, "x")
            for name, picture in calls
        ]

    called(0)
    following.settle(LATENTS)
    called(1)
    chain.lineage = torch.tensor([2, 0, 0])
    for step in (2, 3):
        for scale, moved in zip((10.0, 100.0), called(step), strict=True):
            assert plain(moved)["image"] == [3 * scale, scale, scale]


def test_a_buffer_that_is_written_to_is_not_taken_for_what_stays():
    chain, buffer = Chain(noise=1.0), LATENTS.clone()
    following = Following(chain, Learned("x", "buffer"), 3)
    following.followed("N", {"x": LATENTS, "buffer": buffer}, "x")
    chain.step, chain.lineage, chain.last = 1, torch.tensor([2, 0, 0]), LATENTS
    buffer += 1
    moved = following.followed("N", {"x": LATENTS, "buffer": buffer}, "x")
    assert plain(moved)["buffer"] == [2.0, 3.0, 4.0]


def test_a_picture_that_comes_after_rows_were_resampled_is_refused():
    chain = Chain(noise=1.0)
    following = Following(chain, Learned("x", "image"), 3)
    chain.lineage, chain.last = torch.tensor([2, 0, 0]), LATENTS
    for step in (1, 2, 3):  # what is computed anew may come at any time
        chain.step = step
        following.followed("N", {"x": LATENTS, "late": LATENTS * step}, "x")
    chain.step = 4
    following.followed("N", {"x": LATENTS, "image": LATENTS * 7}, "x")
    chain.step = 5
    with pytest.raises(ValueError, match=r"\['image'\] appeared after the first resampling"):
        following.followed("N", {"x": LATENTS, "image": LATENTS * 7}, "x")


def test_what_is_let_go_after_the_second_step_is_what_changes_or_is_one_for_all_rows():
    chain, residual = Chain(noise=1.0), LATENTS * 7
    following = Following(chain, Learned("hidden_states", "image", "residual", "text"), 3)
    kept = weakref.ref(residual)
    for step in range(3):
        chain.step, chain.last = step, LATENTS + step
        call = call_of_rows(LATENTS + step, LATENTS * 10, residual)
        following.followed("N", call, "hidden_states")
        following.settle(LATENTS)
        residual = residual + 1
    assert kept() is None
    assert len(following._kept) == 1


@pytest.mark.parametrize("tokens", [False, True])
def test_what_stands_beside_the_latents_moves_in_what_is_returned_too(tokens):
    """A video's first frame may be a picture encoded with the row's own noise."""
    chain = Chain(noise=1.0)
    following = Following(chain, Learned(), 3)
    beside = torch.arange(1.0, 4).reshape(3, 1, 1, 1, 1).expand(3, 2, 1, 2, 2)
    made = torch.randn(3, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def whole(latents):
        x = torch.cat([beside, latents], 2)
        return x.flatten(2).transpose(1, 2) if tokens else x

    following.followed("N", {"x": whole(made)}, "x")
    following.settle(made)
    assert torch.equal(following.returned(whole(made)), whole(made))
    chain.step, chain.lineage, chain.last = 1, torch.tensor([2, 0, 0]), made + 1
    expected = beside[[2, 0, 0]]
    for moved in (
        following.followed("N", {"x": whole(made + 1)}, "x")["x"],
        following.returned(whole(made + 1)),
    ):
        parts = moved.transpose(1, 2).unflatten(2, (4, 2, 2)) if tokens else moved
        assert torch.equal(parts[:, :, :1], expected)
        assert torch.equal(parts[:, :, 1:], made + 1)


def test_a_network_of_the_head_is_not_asked_where_its_latents_are():
    """A prior is asked before the loop alone, with samples of its own."""
    chain = Chain(noise=1.0)
    following = Following(chain, Learned(), 3)
    following.followed("Prior", {"x": torch.rand(3, 8)}, "x")
    following.followed("N", {"x": LATENTS}, "x")
    following.settle(LATENTS)


def test_what_stands_beside_the_latents_is_refused_where_it_cannot_be_told_apart():
    latents, chain = torch.ones(2, 1, 1), Chain(noise=1.0)
    following = Following(chain, Learned(), 2)
    following.followed("N", {"x": torch.rand(2, 3, 1)}, "x")
    with pytest.raises(ValueError, match="the latents were not found among the contents"):
        following.settle(latents)


@pytest.mark.parametrize(
    ("name", "animal"),
    [
        ("StableDiffusionXLPAGInpaintPipeline", None),  # its own call leaves its processors
        ("MotifVideoPipeline", APG),  # its guidance counts steps
    ],
)
def test_a_run_that_ends_well_leaves_the_pipeline_as_it_was(name, animal):
    it = tiny(name, animal)
    pipe = it.pipe
    before = fingerprint(pipe)
    guider = repr(vars(pipe.guider)) if hasattr(pipe, "guider") else None
    run(it)
    assert fingerprint(pipe) == before
    if guider is not None:
        assert repr(vars(pipe.guider)) == guider


SKIPS = Animal(
    {
        "guider": (
            "SkipLayerGuidance",
            {
                "skip_layer_config": LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
                "skip_layer_guidance_stop": 1.0,
            },
        )
    }
)


@pytest.mark.parametrize("fails", [False, True])
def test_a_guidance_that_hooks_layers_leaves_none_behind(monkeypatch, fails):
    """Also where the network fails while they are hooked, and the call has no chance to."""
    it = tiny("MotifVideoPipeline", SKIPS)
    before, hooked = fingerprint(it.pipe), []
    block = it.pipe.transformer.transformer_blocks[0]
    real = type(it.pipe.transformer).forward

    def forward(self, *args, **kwargs):
        hooked.append("forward" in vars(block))
        if fails and hooked[-1]:
            raise RuntimeError("broken")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(it.pipe.transformer), "forward", forward)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            run(it)
    else:
        run(it)
    assert any(hooked)
    assert fingerprint(it.pipe) == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("KandinskyV22PriorPipeline", "generates no images .* steer the pipeline that uses its"),
        ("LatentConsistencyModelPipeline", "sets its timesteps by original_inference_steps="),
        ("KandinskyV22CombinedPipeline", r"runs other pipelines \(prior_pipe, decoder_pipe\)"),
        ("IFPipeline", "variance_type='learned_range'.* set pipe.scheduler to one with a fixed"),
    ],
)
def test_what_cannot_be_steered_is_refused_in_a_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        steer(bare(name), "a red cube", lambda images, prompts: images, progress=False)


def test_a_learned_variance_is_refused_on_any_pipeline():
    pipe = sd(scheduler=DDPMScheduler(variance_type="learned"))
    with pytest.raises(ValueError, match="DDPMScheduler takes its variance from the network"):
        run(Subject(pipe, {}))


def test_noise_from_the_global_generator_is_refused_before_the_first_move(monkeypatch):
    pipe, keywords = family("sd")
    real = pipe.unet.forward

    def noisy(x, *args, **more):
        return real(x + torch.randn(()), *args, **more)

    monkeypatch.setattr(pipe.unet, "forward", noisy)
    with pytest.raises(ValueError, match="draws noise from PyTorch's global generator"):
        run(Subject(pipe, keywords))
