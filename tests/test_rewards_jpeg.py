"""Sizes as JPEG against PIL's own files, and the scales that others use."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.images import to_images

RNG = np.random.default_rng(0)
FLAT = np.zeros((64, 64, 3), np.uint8)
NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def kilobytes(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        ("jpeg", -1.0),
        ("jpeg(incompressibility)", 1.0),
        ("jpeg(scale=flow_grpo)", -1 / 500),
        ("jpeg(incompressibility, flow_grpo)", 1.0),
    ],
)
def test_scores_are_the_size_of_pils_file(spec, factor):
    scores = rewards.load(spec)(to_images([FLAT, NOISE]), ["", ""])
    wanted = torch.tensor([kilobytes(FLAT), kilobytes(NOISE)]) * factor
    torch.testing.assert_close(scores, wanted)
    assert (scores[0] > scores[1]) == (factor < 0)


def test_small_images_of_the_reference_are_of_the_size_measured_there():
    # only roughly, as it depends on libjpeg: 0.691 KB (black, 64 px) and 308 KB (noise, 512 px)
    assert kilobytes(FLAT) == pytest.approx(0.691, rel=0.1)
    big = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert -rewards.load("jpeg")(to_images(big), [""]).item() == pytest.approx(308, rel=0.05)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("jpeg(mode=small)", "take one of"), ("jpeg(scale=flow_gpro)", "flow_grpo")],
)
def test_unknown_modes_and_scales_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(spec)
