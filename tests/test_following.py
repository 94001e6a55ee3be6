"""What belongs to a row beside its latents follows it, and what was passed in is not changed."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import pytest
import torch
from diffusers import DDPMScheduler
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


@pytest.mark.parametrize("name", ["FluxControlPipeline", "FluxControlNetPipeline"])
def test_a_control_image_encoded_with_each_rows_noise_follows_the_lineage(name):
    """`lineage` gives all rows the latents and the noise of the first, and finds them equal."""
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
    follow_momentum(guider, torch.tensor([2, 2, 0]), lambda x: x)
    assert guider.momentum_buffer.running_average[:, 0].tolist() == [4.0, 4.0, 0.0]


def test_what_is_kept_from_the_head_moves_and_what_is_computed_on_the_way_does_not():
    """The latents stand beside a row's picture; a ControlNet's output is already of these rows."""
    latents, beside = (torch.tensor([[1.0], [2.0], [3.0]])[:, :, None] * scale for scale in (1, 10))
    chain = Chain(noise=1.0)
    following = Following(chain)
    axes = {("N", name): 0 for name in ("hidden_states", "image", "residual")}
    axes[("N", "shift")] = None

    def called(latents, residual):
        call = {
            "hidden_states": torch.cat([latents, beside], 1).repeat(2, 1, 1),
            "image": beside.repeat(2, 1, 1),
            "residual": residual.repeat(2, 1, 1),
            "shift": torch.ones(5),
        }
        moved = following.followed("N", call, axes, "hidden_states")
        return {
            key: value[..., 0].tolist() if value.ndim > 1 else [] for key, value in moved.items()
        }

    assert called(latents, latents)["image"] == [[10.0], [20.0], [30.0]] * 2
    following.settle(latents)
    chain.step, chain.lineage, chain.last = 1, torch.tensor([2, 0, 0]), latents + 5
    moved = called(latents + 5, latents + 7)
    assert moved["hidden_states"] == [[6.0, 30.0], [7.0, 10.0], [8.0, 10.0]] * 2
    assert moved["image"] == [[30.0], [10.0], [10.0]] * 2
    assert moved["residual"] == [[8.0], [9.0], [10.0]] * 2


def test_what_stands_beside_the_latents_is_refused_where_it_cannot_be_told_apart():
    latents, chain = torch.ones(2, 1, 1), Chain(noise=1.0)
    following, axes = Following(chain), {("N", "x"): 0}
    call = {"x": torch.rand(2, 3, 1)}
    following.followed("N", call, axes, "x")
    with pytest.raises(ValueError, match="what stands beside the latents"):
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


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("KandinskyV22PriorPipeline", "draws no pictures .* steer the pipeline that takes what"),
        ("AceStepPipeline", "draws sound, alone or beside a picture"),
        ("LTX2Pipeline", "draws sound, alone or beside a picture"),
        ("LatentConsistencyModelPipeline", "chooses its timesteps by original_inference_steps="),
        ("KandinskyV22CombinedPipeline", r"runs pipelines of its own \(prior_pipe, decoder_pipe\)"),
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
