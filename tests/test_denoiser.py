"""The stand-in for a network: cut as the batch is cut, otherwise the network itself."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.utils import BaseOutput
from tiny_pipelines import family

from steering.denoiser import Denoiser, Rows, denoisers, networks, refuse_step_caches


class Recorder(torch.nn.Module):
    """Returns what it was given and counts the rows of every call."""

    def __init__(self):
        super().__init__()
        self.rows, self.seen = [], []

    def forward(self, x, t=None, **keywords):
        self.rows.append(len(x))
        self.seen.append((t, keywords))
        return x * 2, [x + 1, x + 2]


def call(denoiser, n=6):
    x = torch.arange(n * 3.0).reshape(n, 3)
    return x, denoiser(
        x,
        torch.tensor(5),
        txt_ids=torch.zeros(n, 3),
        added={"embeds": x, "scale": 2.0},
        residuals=[x, x],
        images=["a", "b", "c"],
        skip_layers=list(range(n)),
    )


def test_a_tuple_of_two_is_not_taken_for_two_rows():
    """Cosines and sines of rotary positions, at a batch of 2: parts, not an entry a row."""
    network, x = Recorder(), torch.zeros(2, 3)
    cos, sin = torch.zeros(7, 4), torch.ones(7, 4)
    Denoiser(network, Rows(1))(x, image_rotary_emb=(cos, sin), texts=["a", x[0]])
    assert [keywords["image_rotary_emb"] for _, keywords in network.seen] == [(cos, sin)] * 2
    assert network.seen[0][1]["texts"] == ["a"]


@pytest.mark.parametrize("max_batch", [1, 2, 4, 6, 100])
def test_the_parts_make_the_whole(max_batch):
    network = Recorder()
    x, (doubled, others) = call(Denoiser(network, Rows(max_batch)))
    assert max(network.rows) <= max_batch
    assert sum(network.rows) == 6
    assert torch.equal(doubled, x * 2)
    assert torch.equal(others[0], x + 1)
    assert torch.equal(others[1], x + 2)


def test_only_what_has_the_batchs_rows_is_cut():
    network = Recorder()
    call(Denoiser(network, Rows(4)))
    t, keywords = network.seen[1]
    assert t.ndim == 0
    assert keywords["txt_ids"].shape == (6, 3)  # positions of tokens, whatever their number
    assert keywords["added"]["embeds"].shape == (2, 3)
    assert keywords["added"]["scale"] == 2.0
    assert [len(part) for part in keywords["residuals"]] == [2, 2]
    assert keywords["images"] == ["a", "b", "c"]
    assert keywords["skip_layers"] == [0, 1, 2, 3, 4, 5]


def test_outputs_of_a_model_class_are_joined():
    class Output(BaseOutput):
        sample: torch.Tensor

    denoiser = Denoiser(torch.nn.Identity(), Rows(2))
    denoiser._module = lambda x: Output(sample=x)
    x = torch.randn(5, 2)
    assert torch.equal(denoiser(x).sample, x)


def test_a_network_on_lists_of_rows_gives_a_list_back():
    """As Z-Image's: every row a tensor of its own, of any length."""
    rows = [torch.full((i + 1, 2), float(i)) for i in range(5)]
    seen = []

    def network(x, t, texts):
        seen.append((len(x), len(t), len(texts)))
        return ([row + 1 for row in x],)

    denoiser = Denoiser(torch.nn.Identity(), Rows(2))
    denoiser._module = network
    (ours,) = denoiser(rows, torch.arange(5), rows)
    assert all(torch.equal(a, b + 1) for a, b in zip(ours, rows, strict=True))
    assert seen == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_only_living_rows_are_evaluated(copies):
    """Guidance repeats the particles; a dead row shows a living one's output, never nothing."""
    network, rows = Recorder(), Rows()
    rows.keep(torch.tensor([0, 1, 3, 4]), 6)
    x, (doubled, _) = call(Denoiser(network, rows), 6 * copies)
    assert network.rows == [4 * copies]
    living = torch.tensor([0, 1, 3, 4])
    for block, ours in zip((x * 2).split(6), doubled.split(6), strict=True):
        assert torch.equal(ours[living], block[living])
        assert torch.equal(ours[2], block[0])


def test_halving_splits_every_batch_in_two():
    network = Recorder()
    call(Denoiser(network, Rows(halvings=1)), 7)
    assert network.rows == [4, 3]


def test_it_passes_for_the_network():
    pipe, _ = family("controlnet")
    found = denoisers(pipe, Rows(1))
    assert found.keys() == networks(pipe).keys() == {"unet", "controlnet"}
    assert isinstance(found["controlnet"], ControlNetModel)
    assert found["unet"].config is pipe.unet.config
    assert found["unet"].dtype == torch.float32
    with denoisers(family("flux")[0], Rows(1))["transformer"].cache_context("cond"):
        pass


def test_step_caches_are_refused():
    pipe, _ = family("flux")
    refuse_step_caches(pipe)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"pipe.transformer has a step cache .*disable_cache"):
        refuse_step_caches(pipe)
    pipe, _ = family("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="step cache"):
        refuse_step_caches(pipe)
