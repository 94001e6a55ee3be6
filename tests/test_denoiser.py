"""The stand-in for a network: cut as the batch is cut, otherwise the network itself."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.utils import BaseOutput
from tiny_pipelines import family

from steering import FeynmanKac, steer
from steering.axes import Unclear
from steering.denoiser import Denoiser, Rows, denoisers, distinct
from steering.networks import kind_of, networks, refuse_step_caches
from steering.probe import Batch


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Recorder(torch.nn.Module):
    """Returns what it was given and counts the rows of every call."""

    def __init__(self):
        super().__init__()
        self.rows, self.seen = [], []

    def forward(self, x, t=None, **keywords):
        self.rows.append(len(x))
        self.seen.append((t, keywords))
        return x * 2, [x + 1, x + 2]


class Beside:
    """The same call with `num` rows."""

    def __init__(self, arguments, num):
        self.num, self.prompts, self.each, self._arguments = num, 1, num, arguments

    def first(self, name, before, answers):
        return self._arguments(self.num)


def stand_in(network, arguments, rows, thins=False):
    """One whose batch is found from `arguments(n)`, a call's by position or name."""
    batch = Batch()
    batch.start(Beside(arguments, 3 if rows.num != 3 else 4), None, thins)
    return Denoiser(network, rows, batch)


def arguments(n, copies=1):
    m = n * copies
    # the first row of a prompt differs, as in the call beside
    x = torch.ones(n, 3).index_fill(0, torch.tensor(0), 5.0).repeat(copies, 1)
    return {
        0: x,
        1: torch.tensor(5),
        "txt_ids": torch.zeros(6, 3),
        "layers": torch.arange(2.0 * m).reshape(2, m),
        "added": {"embeds": x, "scale": 2.0},
        "residuals": [x, x],
        "images": ["a", "b", "c"],
        "texts": [str(i) for i in range(m)],
        "skip_layers": list(range(6)),
    }


def call(denoiser, given):
    return denoiser(
        *(v for k, v in given.items() if isinstance(k, int)),
        **{k: v for k, v in given.items() if isinstance(k, str)},
    )


@pytest.mark.parametrize("max_batch", [1, 2, 4, 6, 100])
def test_the_parts_make_the_whole(max_batch):
    network, given = Recorder(), arguments(6)
    doubled, others = call(stand_in(network, arguments, Rows(max_batch, num=6)), given)
    assert max(network.rows) <= max_batch
    assert sum(network.rows) == 6
    assert torch.equal(doubled, given[0] * 2)
    assert torch.equal(others[0], given[0] + 1)
    assert torch.equal(others[1], given[0] + 2)


def test_only_what_grew_with_the_rows_is_cut():
    """Positions of six tokens, six layers and three pictures are no rows, at six rows and three."""
    for n in (6, 3):
        network = Recorder()
        call(stand_in(network, arguments, Rows(2, num=n)), arguments(n))
        t, keywords = network.seen[1]
        rows = network.rows[1]
        assert t.ndim == 0
        assert keywords["txt_ids"].shape == (6, 3)
        assert keywords["layers"].shape == (2, rows)
        assert keywords["layers"][1, 0] == n + 2
        assert keywords["added"]["embeds"].shape == (rows, 3)
        assert keywords["added"]["scale"] == 2.0
        assert [len(part) for part in keywords["residuals"]] == [rows] * 2
        assert keywords["images"] == ["a", "b", "c"]
        assert keywords["texts"] == ["2", "3"][:rows]
        assert keywords["skip_layers"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (lambda n: {0: torch.zeros(n, n)}, r"its argument \[0\] is \(6, 6\) with 6 rows, \(3, 3\)"),
        (lambda n: {0: torch.zeros(n + 1)}, r"its argument \[0\] is \(7,\) with 6 rows, \(4,\)"),
        (lambda n: {0: torch.zeros(n), "b": [0] * (n + 1)}, r"\['b'\] has 7 entries for 6 rows"),
        (lambda n: {0: torch.zeros(n), "b": n}, r"its argument \['b'\] is a int"),
        (lambda n: {0: torch.zeros(n), "b": object()}, r"its argument \['b'\] is a object"),
        (lambda n: {0: torch.zeros(n), "b": (1,) if n == 6 else 1}, "changes its form"),
        (
            lambda n: {0: torch.zeros(n), "b": torch.zeros(2 * n)},
            r"its arguments have \[6, 12\] rows",
        ),
        (lambda n: {0: torch.zeros(1, 5 * n, 2)}, "6 particles are 30 rows there"),
    ],
)
def test_arguments_in_which_no_rows_are_found_are_refused(odd, why):
    network = Recorder()
    with pytest.raises(Unclear, match=rf"batch of Recorder cannot be cut: .*{why}"):
        call(stand_in(network, odd, Rows(1, num=6)), odd(6))
    assert network.rows == []


def test_an_output_that_may_hold_rows_unseen_is_refused():
    network = Recorder()
    network.forward = lambda x: (x, object())
    with pytest.raises(Unclear, match="it returns a object, which may hold rows"):
        call(stand_in(network, lambda n: {0: torch.zeros(n)}, Rows(1, num=6)), {0: torch.zeros(6)})


def test_outputs_of_a_model_class_are_joined():
    class Output(BaseOutput):
        sample: torch.Tensor

    network = torch.nn.Identity()
    network.forward = lambda x: Output(sample=x)
    x = torch.randn(5, 2)
    given = stand_in(network, lambda n: {0: torch.zeros(n, 2)}, Rows(2, num=5))
    assert torch.equal(given(x).sample, x)


def test_a_network_on_lists_of_rows_gives_a_list_back():
    """As Z-Image's: every row a tensor of its own, of any length."""
    seen = []

    def rows(n):
        return [torch.full((i + 1, 2), float(i)) for i in range(n)]

    def forward(x, t, texts):
        seen.append((len(x), len(t), len(texts)))
        return ([row + 1 for row in x],)

    network = torch.nn.Identity()
    network.forward = forward
    denoiser = stand_in(
        network, lambda n: {0: rows(n), 1: torch.arange(n), 2: rows(n)}, Rows(2, num=5)
    )
    (ours,) = denoiser(rows(5), torch.arange(5), rows(5))
    assert all(torch.equal(a, b + 1) for a, b in zip(ours, rows(5), strict=True))
    assert seen == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_only_living_rows_are_evaluated(copies):
    """Guidance repeats the particles; a dead row shows a living one's output, never nothing."""
    network, rows = Recorder(), Rows()
    rows.keep(torch.tensor([0, 1, 3, 4]), 6)
    denoiser = stand_in(network, lambda n: arguments(n, copies), rows, thins=True)
    given = arguments(6, copies) | {0: torch.arange(18.0 * copies).reshape(-1, 3)}
    doubled, _ = call(denoiser, given)
    assert network.rows == [4 * copies]
    living = torch.tensor([0, 1, 3, 4])
    for block, ours in zip((given[0] * 2).split(6), doubled.split(6), strict=True):
        assert torch.equal(ours[living], block[living])
        assert torch.equal(ours[2], block[0])


def test_halving_splits_every_batch_in_two():
    network = Recorder()
    call(stand_in(network, arguments, Rows(halvings=1, num=7)), arguments(7))
    assert network.rows == [4, 3]


def test_it_passes_for_the_network():
    pipe, _ = family("controlnet")
    found = denoisers(pipe, Rows(1), Batch())
    assert found.keys() == networks(pipe).keys() == {"unet", "controlnet"}
    assert isinstance(found["controlnet"], ControlNetModel)
    assert found["unet"].config is pipe.unet.config
    assert found["unet"].dtype == torch.float32
    with denoisers(family("flux")[0], Rows(1), Batch())["transformer"].cache_context("cond"):
        pass


class Reader(torch.nn.Module):
    """A text encoder whose rows are on the axis `axis` of its outputs."""

    def __init__(self, axis):
        super().__init__()
        self.axis, self.rows = axis, []

    def forward(self, input_ids, attention_mask=None):
        self.rows.append(len(input_ids))
        states = (input_ids * attention_mask)[..., None] * torch.arange(1.0, 6.0)
        states = states.movedim(0, self.axis)
        return BaseOutput(states=states, each=(states + 1, None))


@pytest.mark.parametrize(
    ("axis", "length", "rows"), [(0, 3, 2), (1, 3, 2), (2, 3, 4), (0, 2, 4), (1, 2, 4)]
)
def test_equal_texts_are_encoded_once_wherever_the_encoder_has_its_rows(axis, length, rows):
    """Of ChatGLM, which Kolors reads with, it is the second axis, after the tokens."""
    reader = Reader(axis)
    tokens = torch.arange(2 * length).reshape(2, length)[torch.tensor([1, 0, 1, 0])]
    mask = torch.ones_like(tokens)
    found = distinct(SimpleNamespace(components={"text_encoder": reader}))["text_encoder"]
    out = found(tokens, attention_mask=mask)
    assert reader.rows[-1] == rows  # of all texts, where an axis of two may be that of two tokens
    expected = reader(tokens, attention_mask=mask)
    assert torch.equal(out.states, expected.states)
    assert torch.equal(out.each[0], expected.each[0])


def test_networks_that_are_compiled_are_told_apart():
    """Their wrappers are of one class, but what each is called with is not alike."""
    plain, keywords = family("controlnet")
    compiled, _ = family("controlnet")
    compiled.unet, compiled.controlnet = (
        torch.compile(net) for net in (compiled.unet, compiled.controlnet)
    )
    names = {kind_of(net) for net in networks(compiled).values()}
    assert names == {"UNet2DConditionModel", "ControlNetModel"}
    run = {"particles": 3, "max_batch": 2, "progress": False, **keywords}
    settings = FeynmanKac(num_scores=1)
    with torch.compiler.set_stance("force_eager"):
        both = [steer(p, "a", brightness, settings=settings, **run) for p in (plain, compiled)]
    assert torch.equal(both[0].latents, both[1].latents)


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
