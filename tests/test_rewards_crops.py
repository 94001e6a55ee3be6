"""Pictures of any size reach each tower as the processor that was published with it gives them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_folders import clip_tokenizer, twin_folders
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from rewards.backends.detectors import at_most, padded
from rewards.images import normalize, resize, to_images
from rewards.models import pickscore
from rewards.models.clip import ClipReward
from rewards.models.critic import PreferenceModel
from rewards.models.dino import DinoReward
from rewards.models.imagereward import ImageRewardReward
from rewards.models.pickscore import PickScoreReward
from rewards.towers import dual_encoder as towers_module
from rewards.towers.dino_backbone import MEAN, STD
from rewards.towers.dual_encoder import OPENAI_MEAN, OPENAI_STD, prepare
from rewards.towers.transformers_clip import HALF

# (h, w): SDXL's own, others' usual ones, odd ones, tall and wide ones, and some below 224
SIZES = [
    (832, 1216),
    (1216, 832),
    (1024, 1440),
    (1440, 1024),
    (768, 1344),
    (640, 1536),
    (1536, 640),
    (333, 517),
    (517, 333),
    (225, 226),
    (224, 301),
    (301, 224),
    (512, 512),
    (64, 1000),
    (1000, 64),
    (31, 47),
]
# that the two ways of rounding tell apart at 32 pixels, and some where they agree
SMALL = [(32, 35), (35, 32), (64, 79), (80, 47), (100, 33), (31, 32), (32, 32)]


def photo(height: int, width: int) -> Image.Image:
    """Detail at every scale, on the grid of bytes, so that a pixel's shift is seen."""
    rng = np.random.default_rng(height * 10_000 + width)
    small = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def exact(monkeypatch) -> None:
    """PIL's very bytes, so that nothing is left between two preprocessings but a mistake."""

    monkeypatch.setattr(towers_module, "resize", partial(resize, exact=True))


def by_transformers(picture: Image.Image, side: int, pil: bool = True) -> Tensor:
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    crop = {"height": side, "width": side}
    kind = CLIPImageProcessorPil if pil else CLIPImageProcessor
    processor = kind(size={"shortest_edge": side}, crop_size=crop)
    return processor(picture, return_tensors="pt").pixel_values


def by_torchvision(picture: Image.Image, side: int) -> Tensor:
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.Compose([v2.Resize(side, interpolation=bicubic), v2.CenterCrop(side)])
    return normalize(to_images(crop(picture)), OPENAI_MEAN, OPENAI_STD)


def shifted(size: tuple[int, int], side: int = 224) -> bool:
    """Whether the two ways of rounding differ at this size."""
    low, high = sorted(size)
    rest = side * high // low - side
    return rest // 2 != round(rest / 2)


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_rounded_as_transformers_and_as_torchvision_do(size, exact):
    picture = photo(*size)
    ways = {True: by_transformers(picture, 224), False: by_torchvision(picture, 224)}
    for floor, wanted in ways.items():
        pixels = prepare(to_images(picture), (224, 224), "bicubic", "shortest", floor)
        found = normalize(pixels, OPENAI_MEAN, OPENAI_STD)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (ways[True] - ways[False]).abs().max() > 0.2 or not shifted(size)


def test_the_sizes_above_tell_the_two_apart():
    assert sum(map(shifted, SIZES)) >= 5
    assert shifted((832, 1216))
    assert sum(shifted(size, 32) for size in SMALL) >= 3


@pytest.mark.parametrize("size", SIZES[:4])
def test_transformers_default_processor_crops_there_too(size):
    """The one that CLIPProcessor and AutoProcessor make now resizes by torchvision, unclipped."""
    picture = photo(*size)
    pixels = prepare(to_images(picture), (224, 224), "bicubic", "shortest", floor=True)
    found, wanted = normalize(pixels, OPENAI_MEAN, OPENAI_STD), by_transformers(picture, 224, False)
    assert (found - wanted).abs().mean() < 0.01
    assert (found - wanted).abs().mean() < 0.2 * (found - wanted.roll(1, -1)).abs().mean()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Any]:
    """One CLIP of 32 pixels in open_clip's folder, in transformers', and transformers' model."""
    opened, transformed, model = twin_folders(tmp_path_factory.mktemp("crops"), False)
    return opened, transformed, model


def test_each_reward_scores_what_its_own_processor_gives(folders, exact, monkeypatch):
    opened, transformed, model = folders
    monkeypatch.setattr(pickscore, "CONFIG", json.loads((transformed / "config.json").read_text()))
    prompt = "a red circle"
    by_place = {transformed: by_transformers, opened: by_torchvision}
    rewards = [(PickScoreReward(str(transformed)), by_transformers)]
    rewards += [(ClipReward(str(place), "logit"), by) for place, by in by_place.items()]
    critics = [(PreferenceModel(str(place)), by) for place, by in by_place.items()]
    rows = clip_tokenizer()([prompt], return_tensors="pt")
    for size in SMALL:
        picture = photo(*size)
        images = to_images(picture)
        for reward, by in rewards:
            with torch.no_grad():
                output = model(**rows, pixel_values=by(picture, 32))
            wanted = output.logits_per_image[:, 0]
            torch.testing.assert_close(reward(images, [prompt]), wanted, atol=5e-4, rtol=1e-4)
        for critic, by in critics:
            (found,) = critic.features(images, 1)
            torch.testing.assert_close(found, by(picture, 32), atol=1e-5, rtol=0)


def seen_by(module: torch.nn.Module, look: Any) -> Tensor:
    """The pixels that reach a network while `look()` runs."""
    found = []
    hook = module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    look()
    hook.remove()
    return found[0]


@pytest.mark.parametrize("size", SMALL)
def test_dino_and_imagereward_crop_as_the_authors_transforms_do(size, exact):
    picture = photo(*size)
    images = to_images(picture)
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.Compose([v2.Resize(32, interpolation=bicubic), v2.CenterCrop(32)])
    wanted = to_images(crop(picture))
    dino, blip = DinoReward("random:0"), ImageRewardReward("random:0")
    pixels = seen_by(dino.view.backbone.model, lambda: dino.image_features(images))
    torch.testing.assert_close(pixels, normalize(wanted, MEAN, STD), atol=1e-5, rtol=0)
    tower = blip.scorer.network.blip["visual_encoder"]
    pixels = seen_by(tower, lambda: blip(images, ["a"]))
    wanted = normalize(wanted, OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(pixels, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [*SMALL, (832, 1216), (333, 517)])
@pytest.mark.parametrize("resample", [2, 3])
def test_siglip_squashes_as_its_processor_does(size, resample, exact):
    from transformers import SiglipImageProcessorPil

    picture = photo(*size)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=resample)
    wanted = processor(picture, return_tensors="pt").pixel_values
    found = prepare(to_images(picture), (32, 32), {2: "bilinear", 3: "bicubic"}[resample], "squash")
    torch.testing.assert_close(normalize(found, HALF, HALF), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (33, 47), (31, 64), (64, 31), (64, 64)])
def test_owlv2_pads_as_its_processor_does(size):
    from transformers import Owlv2ImageProcessor

    picture = photo(*size)
    processor = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    wanted = processor(picture, return_tensors="pt").pixel_values
    found = normalize(padded(to_images(picture), 64), OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_grounding_dino_takes_the_sizes_of_its_processor():
    from transformers.image_transforms import get_size_with_aspect_ratio

    sizes = [*SIZES, *SMALL]
    rng = np.random.default_rng(0)
    sizes += [(int(h), int(w)) for h, w in rng.integers(16, 3000, (2000, 2))]
    for h, w in sizes:
        assert at_most(h, w, 800, 1333) == get_size_with_aspect_ratio((h, w), 800, 1333), (h, w)
