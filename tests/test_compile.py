"""Compiled networks: the filter lets them keep their graph, and tune() compiles in place.

Graphs are counted by a backend that captures them and runs them as they are, so no compiler is
needed. A graph is captured again whenever a guard of dynamo fails: on a shape, a number, a type.
"""

import logging
from functools import partial

import pytest
import tiny_pipelines
import torch

from steering import FeynmanKac, steer
from steering.manifest import fingerprint
from steering.networks import networks
from tilt import loading

PROMPTS = ("a cat", "two dogs", "x")


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def graphs(monkeypatch):
    """The batch of each graph that is captured, whoever calls torch.compile."""
    captured = []

    def capture(graph, inputs):
        shapes = [x.shape for x in inputs if isinstance(x, torch.Tensor)]
        captured.append(next((shape[0] for shape in shapes if shape[1:] == (4, 8, 8)), None))
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiler, backend=capture))
    # dynamo's trace, which pytest would keep line by line, takes most of the time
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    torch._dynamo.reset()
    yield captured
    torch._dynamo.reset()


def by_user(pipe):
    for name, network in networks(pipe).items():
        setattr(pipe, name, torch.compile(network, dynamic=False))


def by_tune(pipe):
    loading.tune(pipe, compile=True)


# the batches of the graphs of one network: twice the rows with guidance
CALLS = {
    "funnel": ({"settings": FeynmanKac(num_scores=2, funnel=(4, 2))}, [8, 4]),
    "max_batch": ({"max_batch": 3}, [3, 2]),
}


@pytest.mark.parametrize(
    ("family", "compiled", "call"),
    [
        ("sd3", by_user, "funnel"),
        ("sd3", by_tune, "max_batch"),
        pytest.param("sd", by_tune, "funnel", marks=pytest.mark.slow),
        pytest.param("sd", by_user, "max_batch", marks=pytest.mark.slow),
    ],
)
def test_the_filter_captures_each_shape_once(family, compiled, call, graphs):
    pipe, keywords = tiny_pipelines.family(family)
    plain = steer(pipe, PROMPTS[0], brightness, 4, progress=False, **CALLS[call][0], **keywords)
    assert graphs == []
    compiled(pipe)
    outs = []
    for prompt in PROMPTS:
        outs.append(
            steer(pipe, prompt, brightness, 4, progress=False, **CALLS[call][0], **keywords)
        )
        assert graphs == CALLS[call][1], prompt  # all at the first prompt, none later
    # the same arithmetic, in another order where dynamo takes it apart
    torch.testing.assert_close(outs[0].rewards, plain.rewards, rtol=0, atol=1e-3)
    assert outs[0].lineage.scores[0].ancestors.tolist() == (
        plain.lineage.scores[0].ancestors.tolist()
    )


@pytest.mark.parametrize("family", ["flux", pytest.param("controlnet", marks=pytest.mark.slow)])
def test_of_every_network_once(family, graphs):
    pipe, keywords = tiny_pipelines.family(family)
    by_tune(pipe)
    for prompt in PROMPTS:
        steer(pipe, prompt, brightness, 4, progress=False, **keywords)
        assert len(graphs) == len(networks(pipe))


def test_tune_leaves_the_weights_and_the_class_as_they_are(graphs):
    """So that a compiled run can carry on one that was not."""
    pipe, _ = tiny_pipelines.family("sd")
    before = type(pipe.unet), fingerprint(pipe.unet)
    by_tune(pipe)
    assert (type(pipe.unet), fingerprint(pipe.unet)) == before


class OnCuda:
    """A pipeline that says that it is on CUDA; its weights are on the CPU."""

    def __init__(self, pipe):
        self.__dict__.update(pipe.components)
        self.device = self._execution_device = torch.device("cuda")


def is_channels_last(network):
    weights = [weight for weight in network.parameters() if weight.ndim == 4]
    weights = [weight for weight in weights if weight.shape[1] > 1 and weight.shape[-1] > 1]
    return bool(weights) and all(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in weights
    )


def test_on_cuda_convolutions_are_laid_out_channels_last():
    pipe, _ = tiny_pipelines.family("controlnet")
    preview = tiny_pipelines.vae()
    loading.tune(pipe)
    parts = (pipe.unet, pipe.controlnet, pipe.vae, preview)
    assert not any(is_channels_last(part) for part in parts)
    before = [fingerprint(part) for part in parts]
    loading.tune(OnCuda(pipe), preview=preview)
    assert all(is_channels_last(part) for part in parts)
    assert [fingerprint(part) for part in parts] == before


def test_transformers_and_videos_keep_their_layout():
    pipe, _ = tiny_pipelines.family("wan")  # its VAE's convolutions have five axes
    loading.tune(OnCuda(pipe))
    assert all(weight.is_contiguous() for weight in pipe.transformer.parameters())
    assert all(weight.is_contiguous() for weight in pipe.vae.parameters())
