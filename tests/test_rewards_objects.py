"""The detector of coloured shapes, against the renderer of the embedded world."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rewards
from rewards import objects
from rewards.images import to_images
from rewards.objects import Detection, Expected, ObjectsReward, detect, expectations, holds
from scripts.tiny import world

TASKS = world.TASKS[:-1]


def renders(task: str, n: int, seed: int) -> tuple[torch.Tensor, list[world.Scene]]:
    rng = np.random.default_rng(seed)
    scenes = [world.scene(rng, task, unseen=bool(i % 2)) for i in range(n)]
    return to_images([world.render(scene) for scene in scenes]), scenes


def soft(images: torch.Tensor) -> torch.Tensor:
    """Half the resolution, and noise of 15/255: worse than the embedded models' samples."""
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(small, size=64, mode="bilinear") + 0.06 * noise).clamp(0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_renders_of_every_task_pass_their_own_prompts(task):
    images, scenes = renders(task, 60, seed=3)
    prompts = [scene.prompt for scene in scenes]
    assert ObjectsReward()(images, prompts).mean() >= 0.98
    assert ObjectsReward()(soft(images), prompts).mean() >= 0.9
    assert ObjectsReward()(images, [*prompts[1:], prompts[0]]).mean() < 0.5


def test_detections_say_what_was_drawn_and_where():
    images, scenes = renders("counting", 30, seed=1)
    for found, scene in zip(detect(images), scenes, strict=True):
        drawn = sorted(scene.things, key=lambda thing: thing.x - thing.radius)
        assert sorted((d.shape, d.colour) for d in found) == sorted(
            (t.shape, t.colour) for t in drawn
        )
        for d in found:
            x = (d.box[0] + d.box[2]) / 2
            nearest = min(np.hypot(t.x - x, t.y - (d.box[1] + d.box[3]) / 2) for t in drawn)
            assert nearest < 2.5
            assert d.score > 0.8


def test_boxes_are_in_pixels_of_the_picture_given():
    images, _ = renders("colors", 4, seed=2)
    large = F.interpolate(images, scale_factor=2, mode="nearest")
    for small, big in zip(detect(images), detect(large), strict=True):
        assert [d.shape for d in small] == [d.shape for d in big]
        np.testing.assert_allclose(np.array(big[0].box), 2 * np.array(small[0].box), atol=2.1)


def test_empty_and_noisy_pictures_hold_no_things():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert detect(torch.cat([noise, torch.zeros(1, 3, 64, 64)])) == [[], [], []]


def test_a_soft_edge_is_not_taken_for_another_colour():
    """Nearest-colour labels, the obvious way, see a rim of other colours where edges are soft."""
    images, scenes = renders("colors", 60, seed=4)
    small = F.interpolate(images, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, size=64, mode="bilinear")
    names = list(objects.COLOURS)
    drawn = torch.tensor([names.index(scene.things[0].colour) for scene in scenes])
    other = F.one_hot(drawn, len(names)).bool().logical_not()

    background = blurred[:, None, :, 0, 0]
    palette = torch.tensor(list(objects.COLOURS.values())) / 255
    colours = torch.cat([background, palette.expand(len(images), -1, -1)], 1)
    nearest = (blurred[:, None] - colours[..., None, None]).pow(2).sum(2).argmin(1)
    rim = F.one_hot(nearest, len(names) + 1).permute(0, 3, 1, 2)[:, 1:].sum((2, 3))
    wrong = objects._masks(blurred).sum((2, 3))
    assert (wrong * other).sum(1).float().mean() < 2
    assert (rim * other).sum(1).float().mean() > 20


@pytest.mark.parametrize(
    ("prompt", "wanted", "relation"),
    [
        ("a circle", [Expected("circle", "", 1)], ""),
        ("an orange star", [Expected("star", "orange", 1)], ""),
        ("one cross", [Expected("cross", "", 1)], ""),
        ("three crosses", [Expected("cross", "", 3)], ""),
        ("two red squares", [Expected("square", "red", 2)], ""),
        ("a circle and a star", [Expected("circle", "", 1), Expected("star", "", 1)], ""),
        (
            "a red circle left of a blue star",
            [Expected("circle", "red", 1), Expected("star", "blue", 1)],
            "left of",
        ),
    ],
)
def test_prompts_are_parsed(prompt, wanted, relation):
    assert expectations(prompt) == (wanted, relation)


@pytest.mark.parametrize("prompt", ["a dog", "", 'the word "STAR"', "a circle beside a star"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="cannot score"):
        rewards.load("objects").check([prompt])
    with pytest.raises(ValueError, match="'lax' is unknown"):
        ObjectsReward("lax")


def thing(shape: str, colour: str, x: float, y: float) -> Detection:
    return Detection(shape, colour, (x - 10, y - 10, x + 10, y + 10), 1.0)


@pytest.mark.parametrize(
    ("prompt", "found", "expected"),
    [
        ("a circle", [thing("circle", "red", 30, 30)], [True, True]),
        ("a red circle", [thing("circle", "blue", 30, 30)], [False, True]),
        ("a circle", [thing("circle", "red", 15, 30), thing("star", "red", 45, 30)], [True, False]),
        ("two stars", [thing("star", "red", 15, 30)], [False, False]),
        (
            "a circle above a star",
            [thing("circle", "red", 30, 15), thing("star", "red", 30, 45)],
            [True, True, True, True],
        ),
        (
            "a circle below a star",
            [thing("circle", "red", 30, 15), thing("star", "red", 30, 45)],
            [True, True, True, False],
        ),
        (
            "a circle left of a star",  # 2 px apart: within a tenth of the sizes
            [thing("circle", "red", 30, 30), thing("star", "red", 32, 30)],
            [True, True, True, False],
        ),
        ("a circle left of a star", [thing("circle", "red", 30, 30)], [True, False, False, False]),
    ],
)
def test_rules_on_hand_made_boxes(prompt, found, expected):
    assert holds(prompt, found) == expected


def test_share_is_the_fraction_of_conditions_that_hold():
    images, scenes = renders("position", 6, seed=5)
    swapped = []
    for scene in scenes:
        relation = next(r for r in world.RELATIONS if f" {r} " in scene.prompt)
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        swapped.append(scene.prompt.replace(relation, other[relation]))
    share = rewards.load("objects(share)")(images, swapped)
    torch.testing.assert_close(share, torch.full((6,), 3 / 4))
    assert rewards.load("objects")(images, swapped).sum() == 0
