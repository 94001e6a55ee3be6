"""Augmentations of pictures before they are scored, against torchvision and PIL."""

import statistics

import numpy as np
import pytest
import torch
from colour_channels import HERE, IMAGES, PROMPTS, RED, load, noisy_size, values
from PIL import Image
from torchvision.transforms.v2 import functional as vision

import rewards
from rewards.algebra import augment
from rewards.images import to_images


def test_augmentation_off_is_the_reward_itself():
    spec = "augmented({r}, draws=1, crop=0, jitter=0, noise=0)"
    torch.testing.assert_close(values(spec), RED)


def test_augmentations_are_fixed_by_the_seed_and_averaged():
    spec = f"augmented({HERE}:noisy_size, draws=3, crop=0.4, flip=true, jitter=0.3, noise=0)"
    draws = augment.draw(3, 0, 0.4, True, 0.3)
    each = [noisy_size(augment.augment(IMAGES, one), PROMPTS) for one in draws]
    total, components = load(spec).evaluate(IMAGES, PROMPTS)
    torch.testing.assert_close(total, torch.stack(each).mean(0))
    torch.testing.assert_close(components["noisy_size"], total)
    assert torch.equal(total, load(spec)(IMAGES, PROMPTS))
    assert not torch.equal(total, load(spec.replace("draws", "seed=1, draws"))(IMAGES, PROMPTS))
    assert augment.draw(5, 0, 0.4, True, 0.3)[:3] == draws


def test_noise_is_the_same_for_every_picture_and_has_the_given_size():
    grey = torch.full((2, 3, 200, 200), 0.5)
    seen = []

    def look(images, prompts):
        seen.append(images.clone())
        return images.mean((1, 2, 3))

    part = rewards.load(look, imports=True)
    augment.augmented(part, draws=2, crop=0, jitter=0, noise=0.05)(grey, ["", ""])
    assert torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0], seen[1])
    for x in seen:
        # 120 000 normal numbers: the standard error of their deviation is 0.2 %
        assert x[0].std().item() == pytest.approx(0.05, rel=0.01)
        assert x[0].mean().item() == pytest.approx(0.5, abs=0.001)


def test_draws_stay_within_their_bounds_and_use_them():
    draws = augment.draw(2000, 7, 0.2, True, 0.1)
    assert all(
        0.8 <= one.keep <= 1 and 0 <= one.down <= 1 and 0 <= one.across <= 1 for one in draws
    )
    for factors in zip(*((d.brightness, d.contrast, d.saturation) for d in draws), strict=True):
        assert min(factors) == pytest.approx(0.9, abs=0.002)
        assert max(factors) == pytest.approx(1.1, abs=0.002)
        assert statistics.fmean(factors) == pytest.approx(1, abs=0.01)
    # a share of 2000 fair coins: four standard errors are 0.045
    assert statistics.fmean(one.flip for one in draws) == pytest.approx(0.5, abs=0.045)


def test_colours_change_as_torchvision_changes_them():
    one = augment.Draw(1, 0, 0, True, 1.2, 0.8, 1.3)
    expected = vision.adjust_brightness(IMAGES.flip(3), 1.2)
    expected = vision.adjust_saturation(vision.adjust_contrast(expected, 0.8), 1.3)
    torch.testing.assert_close(augment.augment(IMAGES, one), expected, atol=1e-3, rtol=0)


def test_a_crop_is_cut_and_enlarged_as_pil_does():
    pictures = np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3), dtype=np.uint8)
    one = augment.Draw(0.8, 0.25, 1.0, False, 1, 1, 1)
    box = (10, 2, 50, 34)  # 32 of 40 rows from 2 of 8, 40 of 50 columns from 10 of 10
    cut = Image.fromarray(pictures[0]).crop(box).resize((50, 40), Image.Resampling.BICUBIC)
    ours = augment.augment(to_images(pictures), one)
    assert (ours - to_images(cut)).abs().max() < 1.6 / 255
