"""The objects reward: the embedded world's detector, and any detector by GenEval's protocol."""

import copy
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

import rewards
from rewards.backends import detectors
from rewards.evaluation_cache import sharing
from rewards.geneval import rules
from rewards.geneval import tiny_world as shapes
from rewards.geneval.prompts import CLASSES, phrase
from rewards.geneval.rules import Detection, Expected, relations
from rewards.geneval.tiny_world import detect
from rewards.images import normalize, to_images
from rewards.models import objects
from rewards.models.objects import ObjectsReward
from rewards.towers.dino_backbone import MEAN, STD
from rewards.towers.dual_encoder import OPENAI_MEAN, OPENAI_STD
from rewards.towers.sources import randomise
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


# colours


class Palette(torch.nn.Module):
    """A CLIP whose features are colours: of the word in the text, or the mean of the picture."""

    def __init__(self):
        super().__init__()
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
        self.texts: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def text_features(self, prompts):
        self.texts += prompts
        words = [next(c for c in rules.COLOURS if f" a {c}" in prompt) for prompt in prompts]
        rgb = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
        return torch.tensor([rgb.get(word, (-1.0, -1.0, -1.0)) for word in words])

    def image_features(self, images):
        self.shapes.append(tuple(images.shape))
        return F.normalize(images.mean((2, 3)), dim=-1)


def test_a_colour_is_that_of_the_box_or_of_the_mask_in_it(monkeypatch):
    clip = Palette()
    monkeypatch.setattr(objects, "towers", lambda source, device: clip)
    image = torch.zeros(3, 40, 60)
    image[0, :, :30], image[2, :, 30:] = 1, 1  # red at the left, blue at the right
    image[1, 5:9, 2:6] = 1
    image[0, 5:9, 2:6] = 0  # a green patch
    patch = torch.zeros(40, 60, dtype=torch.bool)
    patch[5:9, 2:6] = True
    left, right = (0.4, 0.0, 29.6, 40.0), (31.0, 2.0, 90.0, 70.0)
    found = [
        rules.Detection("dog", "", left, 1),
        rules.Detection("dog", "", right, 1),  # reaches beyond the picture
        rules.Detection("dog", "", left, 1, patch),
        rules.Detection("dog", "", (3.0, 6.0, 3.1, 6.2), 1),  # thinner than a pixel
    ]
    assert objects.ClipColours("any")(image, found) == ["red", "blue", "green", "green"]
    assert clip.shapes == [(1, 3, 40, 30), (1, 3, 38, 29), (1, 3, 40, 30), (1, 3, 1, 1)]
    assert clip.texts[:3] == [
        "a photo of a red dog",
        "a photo of a red-colored dog",
        "a photo of a red object",
    ]


def test_outside_the_mask_is_geneval_s_grey():
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = True
    piece = objects.cut(torch.ones(3, 4, 4), rules.Detection("dog", "", (0, 0, 2, 2), 1, mask))
    assert piece[0].tolist() == pytest.approx(np.array([[0.6, 0.6], [0.6, 1]]))


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


def test_the_classifier_is_open_clip_s_of_geneval_s_templates():
    clip = objects.towers("random:0")
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    templates = [
        lambda c: f"a photo of a {c} teddy bear",
        lambda c: f"a photo of a {c}-colored teddy bear",
        lambda c: f"a photo of a {c} object",
    ]
    weights = open_clip.build_zero_shot_classifier(
        clip.model, tokenizer, rules.COLOURS, templates, num_classes_per_batch=None
    )
    generator = torch.Generator().manual_seed(0)
    words = []
    for _ in range(12):
        hue = torch.rand(3, 1, 1, generator=generator)
        image = (hue + 0.3 * torch.randn(3, 32, 32, generator=generator)).clamp(0, 1)
        whole = rules.Detection("teddy bear", "", (0, 0, 32, 32), 1)
        (word,) = objects.ClipColours("random:0")(image, [whole])
        best = int((clip.image_features(image[None]) @ weights).argmax())
        assert word == rules.COLOURS[best]
        words.append(word)
    assert len(set(words)) > 1


# the zero-shot detectors, on random weights

NAMES = [["dog"], ["bench", "cat"], ["dog"], ["cat", "dog", "bench"]]
WORDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS |= {word: 2000 + i for i, word in enumerate(("dog", "cat", "bench", "teddy", "bear"))}


def photographs(h: int = 48, w: int = 72) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(len(NAMES), 3, 6, 9, generator=generator)
    smooth = F.interpolate(coarse, (h, w), mode="bilinear").clamp(0, 1)
    return (smooth * 255).round() / 255


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(detectors, "SHORTEST", 64)
    monkeypatch.setattr(detectors, "LONGEST", 100)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders as `save_pretrained` writes them, with the tokenizers' classes and ids of the hub."""
    root = tmp_path_factory.mktemp("detectors")
    grounding = copy.deepcopy(detectors.RANDOM_CONFIGS["grounding-dino"])
    grounding["text_config"]["vocab_size"] = 2100
    vocabulary = {f"[unused{i}]": i for i in range(2100) if i not in WORDS.values()} | WORDS
    open_clip_s = open_clip.SimpleTokenizer()
    clip_s = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    owl = copy.deepcopy(detectors.RANDOM_CONFIGS["owlv2"])
    owl["text_config"] |= {"vocab_size": 49408, "max_position_embeddings": 16}
    models = {
        "owlv2": (
            transformers.Owlv2ForObjectDetection(transformers.Owlv2Config.from_dict(owl)),
            transformers.CLIPTokenizer(
                vocab={clip_s.get(k, k): v for k, v in open_clip_s.encoder.items()},
                merges=list(open_clip_s.bpe_ranks),  # pyright: ignore[reportArgumentType]
                pad_token="!",
                model_max_length=16,
            ),
        ),
        "grounding_dino": (
            transformers.GroundingDinoForObjectDetection(
                transformers.GroundingDinoConfig.from_dict(grounding)
            ),
            transformers.BertTokenizer(vocab=vocabulary),
        ),
    }
    for i, (name, (model, tokenizer)) in enumerate(models.items()):
        randomise(model, i)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


KINDS = {"owlv2": detectors.Owlv2, "grounding_dino": detectors.GroundingDino}
BOTH = pytest.mark.parametrize("kind", KINDS)


def table(found: list[rules.Detection]) -> torch.Tensor:
    return torch.tensor([[*d.box, d.score] for d in found])


@BOTH
@pytest.mark.parametrize("where", ["random", "folder"])
def test_neither_company_nor_order_changes_what_is_detected(kind, where, folders):
    detector = KINDS[kind]("random:1" if where == "random" else str(folders[kind]))
    images = photographs()
    together = detector(images, NAMES)
    assert [len(found) for found in together] == [len(together[0])] * 4
    assert len({d.name for d in together[3]}) > 1
    order = [2, 0, 3, 1]
    mixed = detector(images[order], [NAMES[i] for i in order])
    for i, found in enumerate(together):
        (alone,) = detector(images[i : i + 1], NAMES[i : i + 1])
        for other in (alone, mixed[order.index(i)]):
            assert [d.name for d in found] == [d.name for d in other]
            torch.testing.assert_close(table(found), table(other), atol=1e-3, rtol=1e-4)
        assert all(d.name in NAMES[i] and d.colour == "" for d in found)
    assert detector(images[:1], [[]]) == [[]]
    assert not any(p.requires_grad for p in detector.model.parameters())


@BOTH
def test_only_what_exceeds_the_floor_is_given(kind):
    images = photographs()[:1]
    (every,) = KINDS[kind]("random:1")(images, [["dog"]])
    floor = sorted(d.score for d in every)[len(every) // 2]
    (some,) = KINDS[kind]("random:1", floor)(images, [["dog"]])
    assert some == [d for d in every if d.score > floor]
    assert 0 < len(some) < len(every)


def test_owlv2_is_what_transformers_makes_of_the_same_pictures(folders):
    folder = folders["owlv2"]
    model = transformers.Owlv2ForObjectDetection.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image_processor = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    processor: Any = transformers.Owlv2Processor(image_processor, tokenizer)
    image, names = photographs(40, 56)[:1], ["cat", "teddy bear"]
    texts = [[f"a photo of a {name}" for name in names]]
    picture = (image[0] * 255).round().to(torch.uint8)
    inputs = processor(text=texts, images=picture, return_tensors="pt")
    ours = normalize(detectors.padded(image, 64), OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(ours, inputs["pixel_values"], atol=1e-4, rtol=0)
    with torch.no_grad():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.3, target_sizes=[(40, 56)], text_labels=[names]
    )
    (found,) = detectors.Owlv2(str(folder), floor=0.3)(image, [names])
    assert [d.name for d in found] == theirs["text_labels"]
    end = torch.tensor([56.0, 40, 56, 40])  # we end things where the picture ends
    boxes = theirs["boxes"].clamp(min=0).minimum(end)
    torch.testing.assert_close(table(found)[:, :4], boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(table(found)[:, 4], theirs["scores"], atol=1e-4, rtol=0)
    assert len(set(theirs["text_labels"])) == 2
    assert len(found) < 64


def test_grounding_dino_is_what_transformers_makes_of_the_same_pictures(folders):
    folder = folders["grounding_dino"]
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 100}
    processor: Any = transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size=size), tokenizer
    )
    image, names = photographs(64, 96)[:1], ["cat", "teddy bear", "dog"]  # no need to resize
    picture = (image[0] * 255).round().to(torch.uint8)
    inputs = processor(images=picture, text=[names], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], normalize(image, MEAN, STD))
    assert inputs["input_ids"].tolist() == [[101, 2001, 1012, 2003, 2004, 1012, 2000, 1012, 102]]
    with torch.no_grad():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0, target_sizes=[(64, 96)]
    )
    (maps,) = build_label_maps(outputs.logits, inputs["input_ids"])
    # as the authors evaluate on COCO: a row of the map adds up to one
    share = maps / maps.sum(1, keepdim=True)
    scores, labels = (outputs.logits[0].sigmoid() @ share.T).max(1)
    (found,) = detectors.GroundingDino(str(folder))(image, [names])
    assert [d.name for d in found] == [names[i] for i in labels.tolist()]
    boxes = theirs["boxes"].clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
    torch.testing.assert_close(table(found)[:, :4], boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(table(found)[:, 4], scores, atol=1e-4, rtol=0)
    assert len({d.name for d in found}) > 1


def test_grounding_dino_looks_at_what_transformers_makes_of_a_picture(folders):
    seen = []
    detector = detectors.GroundingDino(str(folders["grounding_dino"]))
    detector.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    for h, w in ((40, 70), (200, 90)):
        image = photographs(h, w)[:1]
        picture = (image[0] * 255).round().to(torch.uint8)
        size = {"shortest_edge": 64, "longest_edge": 100}
        processor: Any = transformers.GroundingDinoImageProcessor(size=size)
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        detector(image, [["dog"]])
        # transformers rounds the resized picture to bytes, here it stays as it is
        torch.testing.assert_close(seen[-1], theirs, atol=1.1 / 255 / min(STD), rtol=0)


def test_grounding_dino_looks_at_the_sizes_that_transformers_takes():
    for h, w in itertools.product((37, 64, 100, 512, 768, 800, 1024, 1333), repeat=2):
        expected = get_size_with_aspect_ratio((h, w), 800, 1333)
        assert detectors.at_most(h, w, 800, 1333) == expected, (h, w)


def test_the_text_of_owlv2_is_open_clip_s(folders):
    detector = detectors.Owlv2(str(folders["owlv2"]))
    texts = [f"a photo of a {name}" for name in CLASSES]
    ids, mask = detector.tokenize(texts)
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=16)(texts))
    assert torch.equal(mask, (ids > 0).long())


@pytest.mark.parametrize("names", [["st. bernard", "dog"], ["", "dog"], [f"dog{'y' * 60}"] * 5])
def test_names_that_are_no_phrases_of_one_caption_are_refused(names):
    with pytest.raises(ValueError, match="cannot read the names"):
        detectors.GroundingDino("random:0")(photographs()[:1], [names])


@pytest.mark.parametrize(
    ("model", "config", "millions"),
    [
        # google/owlv2-base-patch16-ensemble: 155M; IDEA-Research/grounding-dino-tiny: 172M
        ("Owlv2ForObjectDetection", {"vision_config": {"image_size": 960}}, 155),
        ("GroundingDinoForObjectDetection", {}, 172),
    ],
)
def test_the_published_architectures_have_the_published_size(model, config, millions):
    cls = getattr(transformers, model)
    with torch.device("meta"):
        built = cls(cls.config_class.from_dict(config))
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == millions


@BOTH
def test_a_checkpoint_that_is_not_the_model_is_refused(kind, folders, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    key = {"owlv2": "layer_norm.weight", "grounding_dino": "model.text_projection.weight"}[kind]
    save_file({k: v for k, v in state.items() if k != key}, weights)
    with pytest.raises(ValueError, match=f"lacks {re.escape(key)}"):
        KINDS[kind](str(folder))
    save_file(state | {"extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"has unknown extra\.weight"):
        KINDS[kind](str(folder))
    save_file(state | {key: torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match="has misshapen"):
        KINDS[kind](str(folder))
    unused = {"owlv2": "box_bias", "grounding_dino": "model.text_backbone.pooler.dense.weight"}
    save_file(state | {unused[kind]: torch.zeros(1)}, weights)
    KINDS[kind](str(folder))
    weights.write_bytes((folders[kind] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        KINDS[kind](str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="is a 'clip' model"):
        KINDS[kind](str(folder))


@BOTH
def test_the_reward_of_a_zero_shot_detector_keeps_the_convention(kind):
    spec = f"objects(mode=share, detector={kind}, source=random:3, colours=random:0"
    spec += ", threshold=0.6, counting_threshold=0.7, batch_size=3)"
    reward = rewards.load(spec, imports=True)
    assert str(rewards.load(str(reward), imports=True)) == str(reward)
    images = photographs()
    prompts = ["a photo of a red dog", "a photo of two cats", "a photo of a bear", *PHOTOGRAPHS[2:]]
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32
    assert 0 <= scores.min() <= scores.max() <= 1
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores)
    assert reward(images[:0], []).shape == (0,)
    assert (
        rewards.load(spec, imports=True).parts[0].reward.detector is reward.parts[0].reward.detector
    )
