"""The objects reward: the embedded world's detector, and any detector by GenEval's protocol."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rewards_colours import Palette

import rewards
from rewards.evaluation_cache import sharing
from rewards.geneval import rules
from rewards.geneval import tiny_world as shapes
from rewards.geneval.prompts import phrase
from rewards.geneval.rules import Detection, Expected, relations
from rewards.geneval.tiny_world import detect
from rewards.images import to_images
from rewards.models import objects
from rewards.models.objects import ObjectsReward
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
    images, scenes = renders(task, 40, seed=3)
    prompts = [scene.prompt for scene in scenes]
    assert ObjectsReward()(images, prompts).mean() >= 0.97
    assert ObjectsReward()(soft(images), prompts).mean() >= 0.9
    assert ObjectsReward()(images[:20], prompts[1:21]).mean() < 0.5


def test_detections_say_what_was_drawn_and_where():
    images, scenes = renders("counting", 30, seed=1)
    for found, scene in zip(detect(images), scenes, strict=True):
        drawn = sorted(scene.things, key=lambda thing: thing.x - thing.radius)
        assert sorted((d.name, d.colour) for d in found) == sorted(
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
        assert [d.name for d in small] == [d.name for d in big]
        np.testing.assert_allclose(np.array(big[0].box), 2 * np.array(small[0].box), atol=2.1)


def test_empty_and_noisy_pictures_hold_no_things():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert detect(torch.cat([noise, torch.zeros(1, 3, 64, 64)])) == [[], [], []]


def test_a_soft_edge_is_not_taken_for_another_colour():
    """Nearest-colour labels, the obvious way, see a rim of other colours where edges are soft."""
    images, scenes = renders("colors", 60, seed=4)
    small = F.interpolate(images, scale_factor=0.25, mode="area")
    blurred = F.interpolate(small, size=64, mode="bilinear")
    names = list(shapes.COLOURS)
    drawn = torch.tensor([names.index(scene.things[0].colour) for scene in scenes])
    other = F.one_hot(drawn, len(names)).bool().logical_not()

    background = blurred[:, None, :, 0, 0]
    palette = torch.tensor(list(shapes.COLOURS.values())) / 255
    colours = torch.cat([background, palette.expand(len(images), -1, -1)], 1)
    nearest = (blurred[:, None] - colours[..., None, None]).pow(2).sum(2).argmin(1)
    rim = F.one_hot(nearest, len(names) + 1).permute(0, 3, 1, 2)[:, 1:].sum((2, 3))
    wrong = shapes._masks(blurred).sum((2, 3))
    assert (wrong * other).sum(1).float().mean() < 2
    assert (rim * other).sum(1).float().mean() > 20


def expectations(prompt: str) -> tuple[list[Expected], str]:
    """The things that a prompt asks for, and the relation of the first to the second."""
    found = phrase(shapes.GRAMMAR, prompt)
    assert found is not None
    return found[1], found[2]


def holds(prompt: str, found: Sequence[Detection]) -> list[bool]:
    """Which conditions of a prompt hold, by itself: each count, nothing else, the relation."""
    wanted, relation = expectations(prompt)
    groups = [[d for d in found if d.name == e.name and e.colour in ("", d.colour)] for e in wanted]
    checks = [len(group) == e.count for group, e in zip(groups, wanted, strict=True)]
    checks.append(len(found) == sum(e.count for e in wanted))
    if relation:
        checks.append(
            any(relation in relations(a.box, b.box) for a in groups[0] for b in groups[1])
        )
    return checks


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


def test_share_is_the_mean_of_what_is_asked_for():
    images, scenes = renders("position", 6, seed=5)
    swapped, expected = [], []
    for scene in scenes:
        relation = next(r for r in world.RELATIONS if f" {r} " in scene.prompt)
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        swapped.append(scene.prompt.replace(relation, other[relation]))
        # two counts, two colours in half of the prompts, nothing else, and the place
        asked = 6 if any(colour in scene.prompt for colour in shapes.COLOURS) else 4
        expected.append((asked - 1) / asked)
    assert len(set(expected)) == 2
    torch.testing.assert_close(
        rewards.load("objects(share)")(images, swapped), torch.tensor(expected)
    )
    assert rewards.load("objects")(images, swapped).sum() == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_world_s_prompts_are_entries_of_geneval_s_tasks(task):
    images, scenes = renders(task, 8, seed=6)
    reward = ObjectsReward()
    for scene, found in zip(scenes, detect(images), strict=True):
        entry = reward.entry(scene.prompt)
        assert entry.tag == task
        assert set(entry.names) == set(shapes.SHAPES)
        # nothing else may be there, so that "at least" is "exactly", and what `holds` says
        for things in (found, found[:-1], [*found, thing("star", "red", 8, 8)]):
            right = all(holds(scene.prompt, things))
            assert rules.strict(entry, things) == rules.exactly(entry, things) == right


# a detector of one's own, as objects(detector="test_rewards_objects:fake") names it

SEEN: list[tuple[int, list[list[str]]]] = []


def fake(images, names):
    """Each name at the left if the picture is dark, and twice at the right if it is bright."""
    SEEN.append((len(images), [list(row) for row in names]))
    found = []
    for image, row in zip(images, names, strict=True):
        count, x = (2, 40.0) if image.mean() > 0.5 else (1, 5.0)
        box = (x, 10.0, x + 16, 26.0)
        found.append([rules.Detection(name, "", box, 0.6) for name in row for _ in range(count)])
    return found


def none(images, names):
    return []


PHOTOGRAPHS = ["a photo of a dog", "a photo of two cats", "a photo of a cow and a bus"]


@pytest.fixture
def pictures():
    SEEN.clear()
    dark, bright = torch.full((3, 48, 64), 0.2), torch.full((3, 48, 64), 0.8)
    return torch.stack([dark, bright, dark])


def test_a_detector_of_one_s_own_is_asked_for_the_prompts_things(pictures):
    reward = ObjectsReward(detector="test_rewards_objects:fake", batch_size=2)
    assert reward(pictures, PHOTOGRAPHS).tolist() == [1, 0, 1]  # 0.6 does not count, see below
    assert SEEN == [(2, [["dog"], ["cat"]]), (1, [["cow", "bus"]])]
    assert str(rewards.load(reward.spec, imports=True)) == reward.spec


def test_thresholds_are_geneval_s_for_such_a_detector_and_can_be_given(pictures):
    name = "test_rewards_objects:fake"
    prompts = ["a photo of two cats"] * 3
    assert ObjectsReward(detector=name)(pictures, prompts).tolist() == [0, 0, 0]
    lower = ObjectsReward(detector=name, counting_threshold=0.5)
    assert lower(pictures, prompts).tolist() == [0, 1, 0]
    single = ObjectsReward(detector=name, counting_threshold=0.5, overlap=0.9)
    assert single(pictures, prompts).tolist() == [0, 0, 0]
    higher = ObjectsReward(detector=name, threshold=0.7)
    assert higher(pictures, ["a photo of a dog"] * 3).tolist() == [0, 0, 0]


def test_two_modes_of_one_setting_look_once(pictures):
    call = "objects(mode={}, detector='test_rewards_objects:fake', counting_threshold=0.5)"
    total = rewards.load(f"a={call.format('strict')} + b={call.format('share')}", imports=True)
    _, scores = total.evaluate(pictures, ["a photo of two cats"] * 3)
    assert scores["a"].tolist() == [0, 1, 0]
    assert scores["b"].tolist() == [0.5, 1, 0.5]
    assert len(SEEN) == 1
    with sharing():  # the pictures are the same, what is asked of them is not
        reward = ObjectsReward(detector="test_rewards_objects:fake")
        assert reward(pictures, ["a photo of a dog"] * 3).tolist() == [1, 1, 1]
        assert reward(pictures, ["a photo of two dogs"] * 3).tolist() == [0, 0, 0]
    assert len(SEEN) == 3


def test_a_detector_that_gives_too_few_lists_is_refused(pictures):
    with pytest.raises(ValueError, match="returned 0 lists for 3 images"):
        ObjectsReward(detector="test_rewards_objects:none")(pictures, PHOTOGRAPHS)


def test_a_metadata_file_says_what_any_prompt_asks_for(pictures, tmp_path):
    file = tmp_path / "metadata.jsonl"
    include = [{"class": "unicorn", "count": 2}]
    line = {"tag": "two_object", "include": include, "prompt": "two unicorns in a field"}
    file.write_text(json.dumps(line))
    reward = ObjectsReward(detector="test_rewards_objects:fake", metadata=str(file))
    assert reward(pictures, ["two unicorns in a field"] * 3).tolist() == [0, 1, 0]
    assert reward.entry("a photo of a dog").tag == "single_object"
    assert (
        rewards.load(reward.spec, imports=True)(pictures, ["two unicorns in a field"] * 3).sum()
        == 1
    )
    with pytest.raises(ValueError, match="its metadata file"):
        reward.check(["three unicorns"])
    with pytest.raises(ValueError, match="the embedded world lacks what"):
        ObjectsReward(metadata=str(file)).check(["two unicorns in a field"])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"mode": "lax"}, "'lax' is unknown"),
        ({"detector": "owl"}, "did you mean 'owlv2'"),
        ({"detector": "no.such:thing"}, "cannot be imported"),
        ({"detector": "rewards.models.objects:MODES"}, "is not a function"),
        ({"source": "tiny"}, "world takes no source"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"overlap": True}, "overlap is True"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metadata": "absent.jsonl"}, "no metadata file"),
        ({"detector": "owlv2", "source": "/absent"}, "'/absent'"),
        ({"detector": "owlv2", "source": "random:x"}, "whole number"),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(settings, what):
    with pytest.raises(ValueError, match=what):
        ObjectsReward(**settings)


def test_colours_are_looked_at_only_where_they_are_asked_for(monkeypatch, pictures):
    clip = Palette()
    monkeypatch.setattr(objects, "towers", lambda source, device: clip)
    reward = ObjectsReward(detector="test_rewards_objects:fake")
    reward(pictures, PHOTOGRAPHS)
    assert not clip.shapes
    prompts = [
        "a photo of a red dog",
        "a photo of a blue dog",
        "a photo of a red cow and a blue bus",
    ]
    coloured = pictures * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert reward(coloured, prompts).tolist() == [1, 0, 0]
    assert len(clip.shapes) == 4
