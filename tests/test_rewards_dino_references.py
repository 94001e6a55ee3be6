"""The references of DINO rewards: how they are pooled, kept, and looked at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dino_models import pictures, stored
from PIL import Image

from rewards.evaluation_cache import sharing
from rewards.images import to_images
from rewards.models.dino import MODES, DinoReward
from rewards.towers import dino_backbone


@pytest.mark.parametrize("mode", MODES)
def test_several_references_are_pooled_by_their_largest_or_mean_score(mode):
    images, others = pictures(2), pictures(3, seed=9)
    single = torch.stack(
        [DinoReward("random:0", mode)(images, ["p"] * 2, references=[y, y]) for y in others]
    )
    largest = DinoReward("random:0", mode)(images, ["p"] * 2, references=[others, others])
    mean = DinoReward("random:0", mode, pool="mean")(images, ["p"] * 2, references=[others] * 2)
    torch.testing.assert_close(largest, single.amax(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, single.mean(0), atol=1e-6, rtol=0)


def test_references_may_be_pictures_of_any_kind_and_size():
    images = pictures(2)
    arrays = [(x * 255).byte().permute(1, 2, 0).contiguous().numpy() for x in pictures(2, seed=9)]
    large = Image.fromarray(arrays[1]).resize((80, 48))
    reward = DinoReward("random:0", "hybrid")
    expected = reward(
        images, ["p"] * 2, references=[[to_images(arrays[0])[0], to_images(large)[0]]] * 2
    )
    for entry in ([Image.fromarray(arrays[0]), large], (arrays[0], large)):
        torch.testing.assert_close(reward(images, ["p"] * 2, references=[entry, entry]), expected)
    one = reward(images, ["p"] * 2, references=torch.stack([to_images(arrays[0])[0]] * 2))
    for entry in (Image.fromarray(arrays[0]), to_images(arrays[0]), [arrays[0]]):
        torch.testing.assert_close(reward(images, ["p"] * 2, references=[entry, entry]), one)


def test_every_image_has_its_own_references():
    images = pictures(3)
    reward = DinoReward("random:0")
    scores = reward(images, ["p"] * 3, references=[images[1], images[1], images[2]])
    torch.testing.assert_close(scores[1:], torch.ones(2), atol=1e-5, rtol=0)
    assert scores[0] < 1 - 1e-3


def counted(model: Any, calls: list[int]) -> Any:
    return model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))


def test_a_reference_is_computed_once_whatever_object_holds_it():
    reward = DinoReward("random:11")
    images, reference = pictures(4), pictures(1, seed=9)[0]
    calls: list[int] = []
    hook = counted(reward.view.backbone.model, calls)
    reward(images, ["p"] * 4, references=[reference.clone() for _ in range(4)])
    assert calls == [4, 1]
    reward(images, ["p"] * 4, references=[[reference, pictures(1, seed=10)[0]]] * 4)
    assert calls == [4, 1, 4, 1]
    hook.remove()


def test_a_reference_first_seen_in_half_precision_is_kept_in_full():
    x, y = DinoReward("random:14").view, pictures(1, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = x.reference(y)
    torch.testing.assert_close(first.patches, x.tokens(y).patches[0], atol=1e-6, rtol=0)


def test_the_oldest_references_are_forgotten(monkeypatch):
    monkeypatch.setattr(dino_backbone, "REFERENCES", 2)
    view = DinoReward("random:12").view
    calls: list[int] = []
    hook = counted(view.backbone.model, calls)
    y = pictures(3)
    for i in (0, 1, 0, 2, 0, 1):
        view.reference(y[i : i + 1])
    assert len(calls) == 4  # 0, 1, 2, and 1 again
    hook.remove()


def test_two_modes_look_at_the_pictures_once():
    first, second = DinoReward("random:13"), DinoReward("random:13", "aligned")
    images, other = pictures(3), pictures(3, seed=9)
    calls: list[int] = []
    hook = counted(first.view.backbone.model, calls)
    with sharing():
        first(images, ["p"] * 3, references=list(other))
        second(images, ["p"] * 3, references=list(other))
    assert calls == [3, 1, 1, 1]
    hook.remove()


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_what_was_first_seen_in_inference_mode_lets_gradients_pass_later(kind, tmp_path):
    stored(kind, tmp_path)
    reward = DinoReward(str(tmp_path), "hybrid")
    images, other = pictures(2), list(pictures(2, seed=9))
    with torch.inference_mode():
        before = reward(images.clone(), ["p"] * 2, references=other)
    images.requires_grad_(True)
    scores = reward(images, ["p"] * 2, references=other)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    torch.testing.assert_close(scores.detach(), before.clone())
    assert not reward.view.reference(other[0][None]).cls.is_inference()


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        (None, "compares with references= but got none; pass one entry for each image"),
        ([pictures(1)[0]], "2 images need references of 2 entries but got 1"),
        (7, "2 images need references of 2 entries but got int"),
        ([[], pictures(1)[0]], "no image for image 0; give at least one"),
        ([pictures(1)[0], None], "no image for image 1"),
        ([pictures(1)[0], pictures(0)], "no image for image 1"),
        ([pictures(1)[0] * 255, pictures(1)[0]], r"in \[0, 1\] but these lie in"),
    ],
    ids=["none", "too few", "number", "empty", "hole", "empty tensor", "0..255"],
)
def test_missing_references_say_how_to_give_them(references, sentence):
    with pytest.raises(ValueError, match=sentence):
        DinoReward("random:0")(pictures(2), ["p"] * 2, references=references)
