"""The colours of things in photographs, which GenEval's classifier finds."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from rewards.geneval import rules
from rewards.models import objects


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
