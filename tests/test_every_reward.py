"""What every built-in reward promises, one parametrised test each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import rewards
from rewards.backends.reward_messages import Served, restored, write_answer
from rewards.models.base import Card
from rewards.models.jpeg import JpegReward

N = 7
SHAPES = ["a red circle", "two stars", "three triangles", "a cross", "four squares", "a star"]


@dataclass(frozen=True)
class Case:
    """A spec that loads offline, prompts that it can score, references where it needs them.

    network: whether it scores through a module of torch.
    """

    spec: str
    prompts: tuple[str, ...] = (*SHAPES, "a blue cross above a red star")
    references: bool = False
    size: tuple[int, int] = (61, 84)
    network: bool = True

    def inputs(self) -> tuple[Tensor, list[str], list[Any] | None]:
        generator = torch.Generator().manual_seed(5)
        coarse = torch.rand(N, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, self.size, mode="bilinear").clamp(0, 1)
        if not self.references:
            return images, list(self.prompts), None
        pictures = torch.rand(N, 2, 3, *self.size, generator=generator)
        return images, list(self.prompts), list(pictures)


QUESTIONS = Path(__file__).with_name("shapes_questions.jsonl")
WORDS = tuple(f'the word "{word}"' for word in ("CAT", "SUN", "CRAB", "OX", "TEA", "HIVE", "DOG"))
CASES = {
    case.spec: case
    for case in (
        Case("clip(tiny)"),
        Case(f"soft_tifa('{QUESTIONS}', url=http://127.0.0.1:1/v1, model=stub)", network=False),
        Case(
            "judge(preset=unifiedreward_edit_quality, url=http://127.0.0.1:1/v1, model=stub, "
            "compares=true, pattern='Score: ([0-9.]+)', low=0, high=10)",
            references=True,
            network=False,
        ),
        Case("clip(random:0)"),
        Case("siglip(random:0)"),
        Case("clip_image(random:0)", references=True),
        Case("aesthetic(random:0)"),
        Case("pickscore(random:0)", size=(64, 80)),
        Case("hps(random:0)", size=(48, 64)),
        Case("hpsv3(random:0, dtype=float32)"),
        Case("imagereward(random:0)"),
        Case("dino(random:0)", references=True),
        Case("critic(random:0)"),
        Case("ocr", WORDS, network=False),
        Case("objects", network=False),
        Case(
            "objects(mode=share, detector=owlv2, source=random:0, colours=random:0, "
            "threshold=0.6, counting_threshold=0.7)"
        ),
        Case("remote(http://127.0.0.1:1)", network=False),
        Case("jpeg", network=False),
        Case("judge(url=http://127.0.0.1:1/v1, model=stub)", network=False),
    )
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """A judge's model, which likes bright pictures, and a server of jpeg, without connections.

    tests/judge_server.py and tests/reward_server.py have servers.
    """

    def answer(self: Any, pictures: Any, question: str) -> str:
        return f"Score: {pictures[-1].mean() / 25.5:.4f}"

    def first(self: Any, pictures: Any, question: str, words: Any) -> tuple[list[float], float]:
        return [pictures[-1].mean() / 255 for _ in words], 0.0

    served = Served("jpeg", "", ("jpeg",), (None, 0.0), False, False, 2**26, 2**10, 2**24)
    reward = JpegReward()

    def score(self: Any, request: bytes, stop: Any) -> bytes:
        sent = safetensors.torch.load(request)
        images, text = sent["images"], json.loads(bytes(sent["text"].tolist()))
        scores = reward(restored(images, text["reciprocal"]), text["prompts"])
        return write_answer(scores, {"jpeg": scores}, "")

    monkeypatch.setattr("rewards.backends.chat_endpoint.Endpoint.answer", answer)
    monkeypatch.setattr("rewards.backends.chat_endpoint.Endpoint.first", first)
    monkeypatch.setattr("rewards.backends.reward_client.RewardClient.describe", lambda _: served)
    monkeypatch.setattr("rewards.backends.reward_client.RewardClient.score", score)


_LOADED: dict[str, Any] = {}


def loaded(case: Case) -> Any:
    if case.spec not in _LOADED:
        _LOADED[case.spec] = rewards.load(case.spec, imports=True)
    return _LOADED[case.spec]


def score(case: Case, images: Tensor, rows: list[int]) -> Tensor:
    _, prompts, references = case.inputs()
    given = None if references is None else [references[i] for i in rows]
    return loaded(case)(images, [prompts[i] for i in rows], references=given)


def test_every_built_in_reward_has_a_case():
    named = {case.spec.partition("(")[0] for case in CASES.values()}
    assert named == set(rewards.available())


@ALL
def test_batches_chunks_and_order_do_not_change_a_score(case):
    images, _, _ = case.inputs()
    rows = list(range(N))
    together = score(case, images, rows)
    alone = torch.cat([score(case, images[i : i + 1], [i]) for i in rows])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    order = [3, 0, 6, 1, 5, 2, 4]
    torch.testing.assert_close(
        score(case, images[order], order), together[order], atol=1e-5, rtol=1e-5
    )
    part = loaded(case).parts[0].reward
    if hasattr(part, "batch_size"):
        whole, part.batch_size = part.batch_size, 3
        try:
            chunked = score(case, images, rows)
        finally:
            part.batch_size = whole
        torch.testing.assert_close(chunked, together, atol=1e-5, rtol=1e-5)


@ALL
def test_scores_are_float32_one_an_image_and_the_input_stays(case):
    images, _, _ = case.inputs()
    before = images.clone()
    scores = score(case, images, list(range(N)))
    assert scores.shape == (N,)
    assert scores.dtype == torch.float32
    assert scores.device == images.device
    assert torch.equal(images, before)
    half = score(case, images.to(torch.bfloat16), list(range(N)))
    assert half.dtype == torch.float32
    low, high = loaded(case).range
    assert low is None or scores.min() >= low - 1e-5
    assert high is None or scores.max() <= high + 1e-5


@ALL
def test_no_image_gives_no_score(case):
    images, _, _ = case.inputs()
    assert score(case, images[:0], []).shape == (0,)


@ALL
def test_gradients_exist_where_promised_and_reach_only_their_own_image(case):
    reward = loaded(case)
    images, _, _ = case.inputs()
    images.requires_grad_(True)
    scores = score(case, images, list(range(N)))
    assert scores.requires_grad == reward.differentiable
    if not reward.differentiable:
        return
    (gradient,) = torch.autograd.grad(scores[2], images)
    assert torch.isfinite(gradient).all()
    assert gradient[2].abs().max() > 0
    gradient[2] = 0
    assert gradient.abs().max() == 0
    with torch.no_grad():
        assert not score(case, images, list(range(N))).requires_grad


FLAT = {
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "grey": (0.5, 0.5, 0.5),
    "red": (1.0, 0.0, 0.0),
    "a colour": (0.2, 0.7, 0.4),
}
OF_OTHERS = [
    "lcb(clip(random:0), siglip(random:0), kappa=2)",
    "harmonic(a=clip(random:0), clip(random:1))",
    "uncertainty(a=clip(random:0), clip(random:1))",
    "median(a=clip(random:0), b=clip(random:0), clip(random:1))",
    "min(a=clip(random:0), clip(random:1))",
    "log_sigmoid(clip(random:0))",
    "augmented(clip(random:0), flip=true)",
    "clip_above(clip(random:0), at=0)",
    "par(clip(random:0), ref=0)",
]


@pytest.mark.parametrize("colour", FLAT)
@pytest.mark.parametrize("spec", [*CASES, *OF_OTHERS])
def test_flat_pictures_have_scores_and_finite_gradients(spec, colour):
    """Early previews are flat, and roots, norms and quotients have no slope there."""
    case = CASES.get(spec, Case(spec))
    reward = loaded(case)
    images = torch.tensor(FLAT[colour]).view(1, 3, 1, 1).repeat(2, 1, *case.size)
    images.requires_grad_(True)
    _, prompts, references = case.inputs()
    given = None if references is None else [images[:1].detach(), *references[:1]]
    scores = reward(images, prompts[:2], references=given)
    assert torch.isfinite(scores).all()
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert torch.isfinite(gradient).all()


def test_a_slope_of_hypot_is_what_the_test_above_is_for():
    def edges(images: Tensor, prompts: Any) -> Tensor:
        across, down = images[..., :-1, 1:].sub(images[..., :-1, :-1]), images[..., 1:, :-1]
        return torch.hypot(across, down - images[..., :-1, :-1]).mean((1, 2, 3))

    edges.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]
    images = torch.full((1, 3, 5, 8), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(rewards.load(edges)(images, [""]).sum(), images)
    assert gradient.isnan().any()


def modules(value: Any) -> Iterator[torch.nn.Module]:
    """Those that an object of ours holds, however deep."""
    if isinstance(value, torch.nn.Module):
        yield value
    elif type(value).__module__.startswith("rewards."):
        for inner in vars(value).values():
            yield from modules(inner)


@ALL
def test_the_weights_are_frozen_and_in_evaluation_mode(case):
    score(case, case.inputs()[0], list(range(N)))  # some load a network when it is needed
    found = list(modules(loaded(case).parts[0].reward))
    assert bool(found) == case.network
    for module in found:
        assert not module.training
        assert list(module.parameters())
        assert not any(p.requires_grad for p in module.parameters())


@ALL
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 2 - 1,
        lambda x: x * 255,
        lambda x: x.where(x > 0.5, float("nan")),
        lambda x: x[:, :1],
        lambda x: x[0],
        lambda x: (x * 255).to(torch.uint8),
        lambda x: x[:-1],
    ],
    ids=["-1..1", "0..255", "nan", "grey", "no batch", "bytes", "too few"],
)
def test_bad_images_are_refused_with_a_sentence(case, spoil):
    images, _, _ = case.inputs()
    with pytest.raises(ValueError, match=r"\w+ .* .*"):
        score(case, spoil(images), list(range(N)))


@ALL
def test_the_spec_gives_the_same_reward_again(case):
    reward = loaded(case)
    assert str(rewards.load(str(reward), imports=True)) == str(reward)
    # the object alone, as steer(reward=ClipReward(...)) gets it, is recorded by the same text
    assert rewards.load(reward.parts[0].reward).spec == rewards.load(str(reward), imports=True).spec


@ALL
def test_the_card_is_complete(case):
    card = type(loaded(case).parts[0].reward).card
    assert isinstance(card, Card)
    assert all(isinstance(value, str) for value in vars(card).values())
    assert card.licence
    assert card.range
    assert card.citation
    assert inspect.getdoc(type(loaded(case).parts[0].reward))
