"""DINO rewards against transformers, timm, torchvision and the formulas written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dino_models import MODELS, disturbed, pictures, stored
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import transforms
from transformers import (
    Dinov2Config,
    Dinov2Model,
)

import rewards
from rewards.images import to_images
from rewards.models.dino import MODES, DinoReward
from rewards.sets import SetReward
from rewards.towers import dino_backbone
from rewards.towers.dino_backbone import Tokens, from_timm

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def cosines(model: Any, prefix: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every mode written out for one picture and one reference, both (1, 3, h, w)."""
    normalize = transforms.Normalize(*IMAGENET)
    a, b = (model(normalize(z)).last_hidden_state[0] for z in (x, y))
    grid = F.cosine_similarity(a[prefix:, None], b[None, prefix:], dim=-1)
    cls = F.cosine_similarity(a[0], b[0], dim=0)
    best = torch.stack([row.max() for row in grid]).mean()
    return {
        "cls": cls,
        "patch_max": best,
        "aligned": torch.stack([grid[i, i] for i in range(len(grid))]).mean(),
        "hybrid": 0.7 * cls + 0.3 * best,
    }


@pytest.mark.parametrize("kind", MODELS)
def test_scores_equal_those_computed_from_transformers_own_output(kind, tmp_path):
    model, prefix = stored(kind, tmp_path)
    x, y = pictures(3), pictures(3, seed=8)
    expected = [cosines(model, prefix, x[i : i + 1], y[i : i + 1]) for i in range(3)]
    for mode in MODES:
        scores = DinoReward(str(tmp_path), mode)(x, ["p"] * 3, references=list(y))
        theirs = torch.stack([row[mode] for row in expected])
        torch.testing.assert_close(scores, theirs.detach(), atol=1e-5, rtol=0)
        assert scores.std() > 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_published_names_are_what_is_read(kind, tmp_path):
    # save_pretrained writes the names of the files on the hub
    stored(kind, tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    if kind == "dinov3":
        assert any(key.endswith("layer.0.attention.k_proj.weight") for key in keys)
        assert "embeddings.register_tokens" in keys
    else:
        assert "encoder.layer.0.attention.attention.query.weight" in keys
        assert "embeddings.patch_embeddings.projection.weight" in keys
    assert ("encoder.layer.1.mlp.weights_in.weight" in keys) == (kind == "dinov2 swiglu")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_timms_weights_give_timms_features(registers, gated, tmp_path):
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer

    extra = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU} if gated else {}
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=128,
        depth=2,
        num_heads=2,
        num_classes=0,
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        mlp_ratio=2 * 344 / 128 if gated else 4,  # two thirds of 512, up to a multiple of 8, twice
        **extra,
    )
    disturbed(model)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    view = DinoReward(str(tmp_path / "vit.pth")).view
    x = pictures(2)
    theirs = F.normalize(model.forward_features(transforms.Normalize(*IMAGENET)(x)), dim=-1)
    ours = view.tokens(x)
    torch.testing.assert_close(ours.cls, theirs[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.patches, theirs[:, 1 + registers :], atol=1e-5, rtol=0)


def test_the_originals_names_are_read_as_timms():
    import timm

    model: Any = timm.create_model("vit_giant_patch14_reg4_dinov2", pretrained=False, depth=1)
    state = model.state_dict()
    config, timms = from_timm(state)
    assert config["model_type"] == "dinov2_with_registers"
    assert config["use_swiglu_ffn"]
    # facebookresearch/dinov2 keeps the CLS token's position apart, and has a mask token
    zero = torch.zeros(1, 1, 1536)
    original = {
        key.replace("reg_token", "register_tokens").replace("fc1", "w12").replace("fc2", "w3"): v
        for key, v in state.items()
    }
    original["pos_embed"] = torch.cat([zero, state["pos_embed"]], 1)
    original["mask_token"] = torch.zeros(1, 1536)
    settings, found = from_timm(original)
    assert settings == config
    assert list(found) == list(timms)
    assert all(torch.equal(found[key], timms[key]) for key in timms)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("small", 22_056_576), ("base", 86_580_480), ("large", 304_368_640), ("giant", 1_136_480_768)],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    import timm

    with torch.device("meta"):
        timms: Any = timm.create_model(f"vit_{name}_patch14_dinov2", pretrained=False)
        config, state = from_timm(timms.state_dict())
        ours = Dinov2Model(Dinov2Config.from_dict(config))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(value.numel() for value in state.values()) == parameters
    assert config["image_size"] == 518


def test_pictures_are_resized_and_cropped_as_by_torchvision():
    picture = Image.fromarray(
        (pictures(1, 50, 77)[0] * 255).byte().permute(1, 2, 0).contiguous().numpy()
    )
    reward = DinoReward("random:0", size=40)
    seen = []
    model = reward.view.backbone.model
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    reward.image_features(to_images(picture))
    hook.remove()
    theirs = transforms.Compose(
        [
            transforms.Resize(40, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(40),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET),
        ]
    )(picture)
    torch.testing.assert_close(seen[0][0], theirs, atol=1.5 / 255 / 0.22, rtol=0)


def test_the_size_is_224_or_what_a_smaller_model_was_made_for(monkeypatch):
    assert DinoReward("random:0").view.size == 32
    assert DinoReward("random:0", size=64).view.size == 64
    features = [DinoReward("random:0", size=s).image_features(pictures(1)) for s in (32, 64)]
    assert (features[0] - features[1]).abs().max() > 1e-3
    reward = DinoReward("random:0")
    monkeypatch.setattr(reward.view.backbone, "side", 518)
    assert dino_backbone.view("random:0").size == 224


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_against_itself_is_one(mode):
    images = pictures(3, 40, 56)
    scores = DinoReward("random:0", mode)(images, ["p"] * 3, references=list(images))
    torch.testing.assert_close(scores, torch.ones(3), atol=1e-5, rtol=0)


def tokens(*shape: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(*shape[:-2], shape[-1], generator=generator)
    patches = torch.randn(*shape, generator=generator)
    return Tokens(F.normalize(cls, dim=-1), F.normalize(patches, dim=-1))


def test_patch_max_ignores_where_the_references_patches_lie_and_aligned_does_not():
    x, y = tokens(9, 16, seed=1), tokens(2, 9, 16, seed=2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    moved = Tokens(y.cls, y.patches[:, order])
    torch.testing.assert_close(MODES["patch_max"](x, y, 0), MODES["patch_max"](x, moved, 0))
    assert (MODES["aligned"](x, y, 0) - MODES["aligned"](x, moved, 0)).abs().min() > 1e-3
    both = Tokens(x.cls, x.patches[order])
    torch.testing.assert_close(MODES["aligned"](both, moved, 0), MODES["aligned"](x, y, 0))


def test_modes_are_ordered_and_hybrid_lies_between_its_ends():
    x, y = tokens(9, 16, seed=1), tokens(5, 9, 16, seed=2)
    cls, best, same, mixed = (
        MODES[m](x, y, 0.7) for m in ("cls", "patch_max", "aligned", "hybrid")
    )
    assert (best >= same).all()
    torch.testing.assert_close(mixed, 0.7 * cls + 0.3 * best)
    torch.testing.assert_close(MODES["hybrid"](x, y, 1.0), cls)
    torch.testing.assert_close(MODES["hybrid"](x, y, 0.0), best)


def test_features_of_a_set_are_unit_vectors_whose_products_are_the_scores():
    reward = DinoReward("random:0", batch_size=2)
    images = pictures(5)
    features = reward.image_features(images)
    assert features.shape == (5, 64)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    scores = reward(images, ["p"] * 5, references=[images[0]] * 5)
    torch.testing.assert_close(features @ features[0], scores, atol=1e-6, rtol=0)
    assert reward.image_features(images.requires_grad_(True)).requires_grad
    view = reward.view
    other = pictures(4, seed=9)
    contributions = SetReward(view, "mmd", other)(images.detach(), ["p"] * 5)
    assert contributions.shape == (5,)
    given = SetReward(reward.image_features, "mmd", view.image_features(other))
    torch.testing.assert_close(given(images.detach(), ["p"] * 5), contributions)
    with pytest.raises(ValueError, match=r"image_features\(\) got no images"):
        reward.image_features(images[:0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "random:0", "mode": "clss"}, "did you mean 'cls' of"),
        ({"source": "random:0", "pool": "median"}, r"the DINO pool 'median' is unknown"),
        (
            {"source": "random:0", "size": 30},
            "multiple of the patch of random:0, 8, up to 2048; take size=32",
        ),
        ({"source": "random:0", "size": 0}, "take size=8"),
        ({"source": "random:0", "size": "x"}, "take size=224"),
        ({"source": "random:0", "cls_weight": 1.5}, "must be from 0 to 1"),
        ({"source": "random:0", "batch_size": 0}, "must be a whole number, at least 1"),
        ({"source": "random:x"}, "needs a whole number, as in random:0"),
        ({"source": 3}, "give its name as text"),
        ({"source": "/nowhere/at/all"}, "neither a file, a folder that exists nor a hub id"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DinoReward(**arguments)


def test_other_and_broken_checkpoints_are_refused(tmp_path):
    stored("dinov2", tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    settings, whole = json.loads(config.read_text()), path.read_bytes()
    state = {key: value.clone() for key, value in load_file(path).items()}  # not mapped

    def opened(match: str, source: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=match):
            DinoReward(str(source))

    path.write_bytes(whole[: len(whole) // 2])
    opened("cut short; fetch it again")
    save_file({k: v for k, v in state.items() if k != "layernorm.bias"}, path)
    opened("does not match Dinov2Model: it lacks layernorm.bias; it looks like a transformers")
    save_file({**state, "head.weight": torch.zeros(2)}, path)
    opened("it has unknown head.weight")
    save_file({**state, "layernorm.bias": torch.zeros(2)}, path)
    opened(r"it has misshapen layernorm.bias \(2,\) for \(128,\)")
    save_file({"vision_model.x": torch.zeros(2), "text_model.x": torch.zeros(2)}, path)
    opened(r"it lacks .*, .*, .* and \d+ more; it looks like a transformers CLIP or SigLIP model")
    config.write_text(json.dumps({**settings, "model_type": "clip"}))
    opened("is a 'clip' model but DINO needs one of")
    config.unlink()
    opened("holds none of")
    opened("no config.json beside it .* looks like a transformers CLIP", path)
    path.unlink()
    config.write_text(json.dumps(settings))
    opened("holds none of")


def test_a_vision_transformer_that_is_no_dinov2_is_refused(tmp_path):
    import timm

    model: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1)
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"no blocks\.0\.ls1\.gamma, so it is no DINOv2"):
        DinoReward(str(path))


def test_loading_says_nothing_and_leaves_the_librarys_settings(tmp_path, capfd):
    from transformers.utils import logging

    stored("dinov2", tmp_path)
    capfd.readouterr()
    level = logging.get_verbosity()
    DinoReward(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == level
    assert logging.is_progress_bar_enabled()


def test_half_precision_files_are_computed_in_float32(tmp_path):
    stored("dinov2", tmp_path)[0].half().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["layernorm.bias"].dtype == torch.float16
    reward = DinoReward(str(tmp_path))
    assert {p.dtype for p in reward.view.backbone.model.parameters()} == {torch.float32}


def test_the_embedded_model_says_so_where_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(dino_backbone, "TINY", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"the embedded DINO is missing at .*; reinstall tilt"):
        rewards.load("dino(tiny)")


@pytest.mark.skipif(
    not (dino_backbone.TINY / "config.json").is_file(), reason="rewards/tiny/dino is absent"
)
def test_the_embedded_model_sees_64_pixels_in_patches_of_8():
    reward = DinoReward("tiny")
    assert (reward.view.size, reward.view.backbone.patch) == (64, 8)
    images = pictures(2, 64, 64)
    scores = reward(images, ["p"] * 2, references=list(images))
    torch.testing.assert_close(scores, torch.ones(2), atol=1e-5, rtol=0)
