"""What users do to rewards, and what then happens: scores that are right, or one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import rewards
from rewards.algebra.aggregate import minimum
from rewards.best_of_n import Choice, read_choices, score_choices
from rewards.images import resize, rgb, to_images
from rewards.models.dino import DinoReward
from rewards.models.vlm_judge import JudgeReward
from rewards.spec import format_terms, parse
from rewards.towers.checkpoints import moved
from rewards.towers.dual_encoder import prepare
from rewards.towers.sources import towers

PROMPTS = ["a red circle", "two stars"]
IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
MODELS = [
    "clip({})",
    "siglip({})",
    "aesthetic({})",
    "pickscore({})",
    "hps({})",
    "hpsv3({})",
    "imagereward({})",
    "dino({})",
]


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=rf"(?s)\A(?!.*\n).*{message}")  # in one line


@pytest.mark.parametrize("spec", [*MODELS, "harmonic(clip({}), siglip({}))"])
def test_what_was_loaded_and_used_in_inference_mode_passes_gradients_later(spec):
    references = list(IMAGES.flip(0))
    with torch.inference_mode():
        reward = rewards.load(spec.replace("{}", "random:81"))
        reward(IMAGES, PROMPTS, references=references)
    images = IMAGES.clone().requires_grad_()
    scores = reward(images, PROMPTS, references=references)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().max() > 0


def test_what_was_built_or_moved_in_inference_mode_holds_no_inference_tensors():
    with torch.inference_mode():
        linear = moved(torch.nn.Linear(2, 2), torch.device("meta"))
        clip = towers("random:82")
        clip.to(torch.device("meta"))
        dino = DinoReward("random:82").view
        dino.to(torch.device("meta"))
    for module in (linear, clip.model, dino.backbone.model):
        assert not any(p.is_inference() or p.device.type != "meta" for p in module.parameters())


def test_resizing_in_inference_mode_leaves_nothing_behind_that_bars_gradients():
    images = torch.rand(
        1, 3, 19, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        resize(images, (17, 29))
    torch.autograd.grad(resize(images.requires_grad_(), (17, 29)).sum(), images)


@pytest.mark.parametrize(
    "spec",
    [
        *MODELS,
        "aesthetic(tiny)",
        "dino(tiny)",
        "objects(detector=owlv2, source={})",
        "objects(detector=grounding_dino, source={})",
    ],
)
def test_loading_leaves_the_global_generator_as_it_was(spec):
    before = torch.get_rng_state()
    rewards.load(spec.replace("{}", "random:83"))
    assert torch.equal(torch.get_rng_state(), before)


def bright(images, prompts):
    return images.mean((1, 2, 3))


def test_what_is_not_differentiable_gives_no_gradient():
    images = IMAGES.clone().requires_grad_()
    clip, jpeg = rewards.load("clip(random:0)"), rewards.load("jpeg")
    mixed = rewards.load("clip(random:0) + jpeg")
    for reward in (
        mixed,
        minimum(clip, jpeg),
        rewards.load(bright),
        rewards.load(bright).parts[0].reward,
    ):
        assert not reward.differentiable
        assert not reward(images, PROMPTS).requires_grad
    assert not any(x.requires_grad for x in mixed.evaluate(images, PROMPTS)[1].values())
    assert rewards.load("clip(random:0) + 0*jpeg")(images, PROMPTS).requires_grad


def test_a_component_that_is_only_logged_looks_through_the_tower_of_the_others(monkeypatch):
    reward = rewards.load("0*clip(random:84) + aesthetic(random:84)")
    tower = reward.parts[0].reward.towers
    calls = []
    real = tower.encode_image
    monkeypatch.setattr(tower, "encode_image", lambda x: calls.append(len(x)) or real(x))
    images = IMAGES.clone().requires_grad_()
    total, components = reward.evaluate(images, PROMPTS)
    assert calls == [2]
    assert total.requires_grad
    assert not components["clip"].requires_grad
    assert list(components) == ["clip", "aesthetic"]
    alone = rewards.load("clip(random:84)")(images, PROMPTS)
    torch.testing.assert_close(components["clip"], alone.detach())


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(mode):
    with refused(mode):
        to_images(Image.new(mode, (4, 4)))


def test_transparency_is_dropped_and_other_8_bit_modes_are_read():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for picture in (clear, clear.convert("RGB"), clear.convert("P"), clear.convert("CMYK")):
        assert to_images(picture)[0, :, 0, 0].tolist() == [1, 0, 0]
    assert rgb(Image.new("LA", (4, 4), (255, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(2, 300), (300, 2), (3, 47), (64, 64), (32, 500), (40, 32)])
def test_a_crop_of_a_long_picture_is_pillows_crop_of_the_whole(size):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(1, 3, *size, generator=generator) * 255).round() / 255
    found = prepare(images, (32, 32), "bicubic", "shortest")
    h, w = size
    tall, wide = (32, 32 * w // h) if h <= w else (32 * h // w, 32)
    top, left = round((tall - 32) / 2), round((wide - 32) / 2)
    pixels = (images[0] * 255).byte().permute(1, 2, 0).numpy()
    whole = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BICUBIC)
    expected = to_images(whole.crop((left, top, left + 32, top + 32)))
    assert (found - expected).abs().max() < 1.5 / 255
    torch.testing.assert_close(
        found, resize(images, (tall, wide))[:, :, top : top + 32, left : left + 32]
    )


def test_of_a_long_picture_only_the_crop_is_resized():
    # the whole would have 224 x 4,480,000 pixels
    pixels = prepare(torch.full((1, 3, 1, 20_000), 0.5), (224, 224), "bicubic", "shortest")
    torch.testing.assert_close(pixels, torch.full((1, 3, 224, 224), 0.5))


def test_a_picture_of_no_pixels_is_refused():
    with refused("h and w at least 1"):
        rewards.load("jpeg")(torch.zeros(2, 3, 0, 0), PROMPTS)


@pytest.mark.parametrize("name", ["a.png", ["a.png"], b"a"])
def test_a_file_s_name_is_no_picture(name):
    with refused("PIL.Image.open"):
        to_images(name)


@pytest.mark.parametrize("spec", ["dino(random:0)", "delta(jpeg)"])
def test_a_file_s_name_is_no_reference(spec):
    with refused("PIL.Image.open"):
        rewards.load(spec)(IMAGES, PROMPTS, references=["a.png", "b.png"])


@pytest.mark.parametrize(("height", "width"), [(8, 4000), (4000, 8), (16, 2001)])
def test_a_picture_too_thin_for_the_ocr_engine_is_refused(height, width):
    with refused(f"{width} × {height} pixels"):
        rewards.load("ocr")(torch.zeros(1, 3, height, width), ['"CAT"'])


def test_a_picture_that_the_ocr_engine_can_just_take_is_read():
    assert rewards.load("ocr")(torch.zeros(1, 3, 17, 2000), ['"CAT"']).tolist() == [0]
    assert rewards.load("ocr")(torch.zeros(1, 3, 18, 2100), ['"CAT"']).tolist() == [0]


def test_a_picture_too_large_for_jpeg_is_refused():
    with refused("65500"):
        rewards.load("jpeg")(torch.zeros(1, 3, 1, 70_000), ["a"])


@pytest.mark.parametrize("spec", ["clip(random:0)", "jpeg", "ocr"])
@pytest.mark.parametrize("prompts", [None, 5, [None, None], [1, 2], ["a", b"b"], ["a", "\ud800"]])
def test_what_is_no_text_is_no_prompt(spec, prompts):
    reward = rewards.load(spec)
    with refused("prompt"):
        reward(IMAGES, prompts)
    with refused("prompt"):
        reward.check(prompts)


class Given:
    """A reward that gives what it was told to."""

    name = "given"
    differentiable = False
    range = (None, None)

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def __call__(self, images, prompts, *, references=None):
        return self.scores


@pytest.mark.parametrize("make", [Given, lambda scores: lambda images, prompts: scores])
def test_scores_come_as_float32_or_better_or_are_refused(make):
    double = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for scores in ([1.0, 2.0], (1, 2), double.half(), double, double.numpy()):
        wanted = torch.as_tensor(scores).dtype == torch.float64
        total, components = rewards.load(make(scores)).evaluate(IMAGES, PROMPTS)
        for found in (total, *components.values()):
            assert found.dtype == (torch.float64 if wanted else torch.float32)
            assert found.tolist() == [1, 2]
    for scores in (None, ["a", "b"], 3.0, [1.0], {"a": 1}):
        with refused("must return one number per image"):
            rewards.load(make(scores))(IMAGES, PROMPTS)


def test_the_spec_of_what_cannot_be_imported_says_so_and_is_refused():
    def clip(images, prompts):
        return images.mean((1, 2, 3))

    for reward, spec in ((lambda images, prompts: [1, 2], "<lambda>"), (clip, "<clip>")):
        loaded = rewards.load(reward)
        assert loaded.spec == spec == format_terms(parse(spec))
        assert loaded.name == spec.strip("<>")
        with refused(f"{spec} .* cannot be imported"):
            rewards.load(f"jpeg + 0.5*{loaded.spec}")
    assert rewards.load(Given([1, 2])).spec == "<given>"
    assert minimum(rewards.load(clip), rewards.load("jpeg")).spec == "min(<clip>, jpeg)"
    assert rewards.load(bright).spec == f"{__name__}:bright"


@pytest.mark.parametrize("weight", [None, "much", [1]])
def test_a_weight_is_a_number(weight):
    with refused("the weight of 'clip.tiny.' is"):
        rewards.load({"clip(tiny)": weight})


def test_aggregators_nest_20_deep_at_most():
    def nested(depth: int) -> str:
        return "clip_above(" * depth + "jpeg" + ", at=1)" * depth

    assert rewards.load(nested(20)).spec == nested(20)
    for depth in (21, 500):
        with refused("at most 20 aggregators"):
            rewards.load(nested(depth))
    side = " + ".join(f"a{i}=clip_above(b{i}=jpeg, at=1)" for i in range(25))
    assert len(rewards.load(side).parts) == 25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": "a"}, "low is 'a'"),
        ({"low": "a", "high": 3}, "low is 'a'"),
        ({"low": 0, "high": float("inf")}, "high inf"),
        ({"low": 3, "high": 0}, "low below high"),
        ({"question": 5}, "question is 5"),
        ({"pattern": 5}, "pattern is 5"),
        ({"key_env": 5}, "key_env is 5"),
    ],
)
def test_a_judge_s_settings_are_checked(settings, message):
    with refused(message):
        JudgeReward(url="http://127.0.0.1:1/v1", model="m", **settings)
    assert JudgeReward(url="http://127.0.0.1:1/v1", model="m", low=0, high=1.5).range == (0, 1)


@pytest.mark.parametrize("detector", ["os:getcwd", "math:pi", "os:no_such"])
def test_a_detector_is_a_function_of_images_and_names(detector):
    with refused(f"'{detector}'"):
        rewards.load(f"objects(detector={detector})", imports=True)


def test_choices_that_are_not_there_are_named(tmp_path):
    with refused("absent.jsonl"):
        read_choices(tmp_path / "absent.jsonl")
    with refused("absent.png"):
        score_choices(rewards.load("jpeg"), [Choice("a", ("absent.png",), ("b.png",))], tmp_path)
