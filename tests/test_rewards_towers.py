"""Towers: one CLIP in open_clip's, transformers' and torchmetrics' hands; shared features."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import open_clip
import pytest
import torch
from clip_folders import clip_tokenizer, pictures, twin_folders
from safetensors.torch import load_file, save_file

import rewards
from rewards.evaluation_cache import sharing
from rewards.images import to_images
from rewards.models.clip import ClipReward
from rewards.models.siglip import SiglipReward
from rewards.towers import sources, transformers_clip
from rewards.towers.openclip import build, open_clip_towers
from rewards.towers.sources import open_source

PROMPTS = ["a red circle", "a blue star", "a red circle", "star", "a star"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDY = ["a red circle", "Two blue STARS, and a dog's bone", "", "a photograph " * 60]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """quick_gelu -> the same weights as open_clip's folder, transformers' folder and model."""
    return [twin_folders(tmp_path_factory.mktemp("twins"), quick) for quick in (False, True)]


@pytest.fixture
def copied(twins, tmp_path):
    """Copies of the folders with GELU, to be spoilt."""
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in twins[False][:2]]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_and_transformers_give_one_score_on_converted_weights(twins, quick_gelu):
    ours, theirs, twin = twins[quick_gelu]
    shown = to_images(pictures(4, 32, 32))  # of the tower's size, so that nothing is resized
    first = ClipReward(str(ours), "logit")(shown, WORDY)
    second = ClipReward(str(theirs), "logit")(shown, WORDY)
    ids = clip_tokenizer()(WORDY, padding=True, truncation=True, return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    twin_scores = twin(**ids, pixel_values=(shown - mean) / std).logits_per_image.diagonal()
    scale = twin.logit_scale.exp()
    torch.testing.assert_close(second / scale, twin_scores / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(first / scale, second / scale, atol=1e-5, rtol=0)
    assert first.std() / scale > 0.02


def test_percent_is_torchmetrics_clip_score(twins):
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPImageProcessor, CLIPProcessor

    _, folder, model = twins[True]
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    processor = CLIPProcessor(CLIPImageProcessor(**sizes), clip_tokenizer())
    # torchmetrics 1.9 takes transformers 4's return value, a tensor
    old: Any = SimpleNamespace(
        config=model.config,
        to=lambda device: old,
        get_image_features=lambda pixels: model.get_image_features(pixels).pooler_output,
        get_text_features=lambda *given: model.get_text_features(*given).pooler_output,
    )
    shown = to_images(pictures(4, 32, 32)).repeat_interleave(3, 0)
    texts = WORDY[:3] * 4
    ours = ClipReward(str(folder), "percent")(shown, texts)
    theirs = [
        clip_score(image, text, cast(Any, lambda: (old, processor)))
        for image, text in zip((shown * 255).round().to(torch.uint8), texts, strict=True)
    ]
    torch.testing.assert_close(ours.clamp(min=0), torch.stack(theirs), atol=1e-3, rtol=0)
    assert (ours > 1).sum() >= 2  # torchmetrics makes 0 of what is negative


@pytest.mark.parametrize(
    ("name", "total", "visual"),
    [
        ("ViT-B-32", 151_277_313, 87_849_216),
        ("ViT-B-16", 149_620_737, 86_192_640),
        ("ViT-L-14", 427_616_513, 303_966_208),
        ("ViT-L-14-336", 427_944_193, 304_293_888),
        ("ViT-H-14", 986_109_441, 632_076_800),
    ],
)
def test_architectures_have_the_published_number_of_parameters(name, total, visual):
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.visual.parameters()) == visual


def test_transformers_large_clip_has_the_published_number_of_parameters():
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        model: Any = CLIPModel(config)
    assert sum(p.numel() for p in model.parameters()) == 427_616_513


def test_every_tag_is_preprocessed_as_open_clip_does():
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    model: Any = torch.nn.Module()
    model.visual, model.encode_image = SimpleNamespace(image_size=224), None
    for name, tag in open_clip.list_pretrained():
        given: Any = open_clip.get_pretrained_cfg(name, tag)
        theirs: Any = merge_preprocess_dict(asdict(PreprocessCfg()), given)
        ours = open_clip_towers(model, None, 1, given)  # pyright: ignore[reportArgumentType]
        assert (ours.filter, ours.mode) == (theirs["interpolation"], theirs["resize_mode"])
        assert (tuple(ours.mean), tuple(ours.std)) == (tuple(theirs["mean"]), tuple(theirs["std"]))


def test_the_folders_own_preprocessing_counts_and_else_openais(copied, monkeypatch):
    _, folder = copied
    monkeypatch.setattr(transformers_clip, "load_tokenizer", lambda place: None)  # it is slow
    found = open_source(str(folder))
    assert (found.mean, found.std) == (MEAN, STD)
    assert (found.size, found.filter, found.mode) == ((32, 32), "bicubic", "shortest")
    given: dict[str, Any] = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2}
    given |= {"size": {"shortest_edge": 32}, "crop_size": 32, "do_center_crop": True}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": given}))
    found = open_source(str(folder))
    assert (found.mean, found.std) == ([0.1] * 3, [0.2] * 3)
    assert (found.filter, found.mode) == ("bilinear", "shortest")
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    assert open_source(str(folder)).mode == "squash"
    for wrong in ('{"size": 40, "crop_size": 32}', '{"do_center_crop": false}'):
        (folder / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(ValueError, match="is not supported"):
            open_source(str(folder))


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_the_activation_of_transformers_towers_is_the_configurations(twins, tower, monkeypatch):
    _, folder, model = twins[True]
    config = json.loads((folder / "config.json").read_text())
    transformers_clip.check_hidden_act(model, config, "gelu", folder)
    for part in ("text_config", "vision_config"):
        del config[part]["hidden_act"]  # as in files of old: OpenAI's
    transformers_clip.check_hidden_act(model, config, "quick_gelu", folder)
    layer = getattr(model, tower).encoder.layers[1]
    monkeypatch.setattr(layer.mlp, "activation_fn", torch.nn.GELU())
    with pytest.raises(ValueError, match=f"the {tower[:4]}.* tower .*'quick_gelu'.*another"):
        transformers_clip.check_hidden_act(model, config, "quick_gelu", folder)
    config[f"{tower[:-6]}_config"]["hidden_act"] = "relu"
    with pytest.raises(ValueError, match="'relu'"):
        transformers_clip.check_hidden_act(model, config, "quick_gelu", folder)


def test_weights_that_do_not_fit_are_named(copied):
    ours, theirs = copied
    path = theirs / "model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    save_file({k: v for k, v in state.items() if "layers.1" not in k}, path)
    with pytest.raises(
        ValueError, match=r"lacks .*layers\.1.*and 29 more; it looks like a transfo"
    ):
        ClipReward(str(theirs))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        ClipReward(str(theirs))
    (ours / "open_clip_pytorch_model.bin").unlink()
    save_file(state, ours / "open_clip_model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks positional_embedding, .*looks like a transformers"
    ):
        ClipReward(str(ours))


def test_weights_in_several_files_are_put_together(copied):
    _, folder = copied
    shown = to_images(pictures(4, 40, 32))
    whole = ClipReward(str(folder))(shown, WORDY)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    torch.testing.assert_close(
        ClipReward(str(folder), batch_size=31)(shown, WORDY), whole, atol=0, rtol=0
    )


@pytest.mark.parametrize("grad", [True, False])
def test_the_image_tower_runs_once_for_rewards_that_look_together(grad, monkeypatch):
    first, second = ClipReward("random:0"), ClipReward("random:0", "logit", batch_size=2)
    pair = first.towers
    seen = []
    encode = pair.encode_image
    monkeypatch.setattr(pair, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    images = (to_images(pictures(5, 40, 40)) * 0.8 + 0.1).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        alone = first(images, PROMPTS), second(images, PROMPTS)
        assert seen == [5, 2, 2, 1]
        seen.clear()
        with sharing():
            together = first(images, PROMPTS), second(images, PROMPTS)
            assert seen == [5]
            second(images.clone(), PROMPTS)
            assert seen == [5, 2, 2, 1]  # another tensor may hold other pictures
            with torch.no_grad():
                assert not first(images, PROMPTS).requires_grad
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if grad:
        grads = [torch.autograd.grad((a + b).sum(), images)[0] for a, b in (alone, together)]
        assert grads[0].abs().max() > 0
        torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


def test_a_sum_of_rewards_looks_once(monkeypatch):
    reward = rewards.load("clip(random:0) + l=0.5*clip(random:0, scale=logit)")
    pair = reward.parts[0].reward.towers
    seen = []
    encode = pair.encode_image
    monkeypatch.setattr(pair, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    reward(to_images(pictures(5, 32, 32)), PROMPTS)
    assert seen == [5]


def test_text_is_encoded_in_full_precision_whoever_asks_first():
    first, second = (open_source("random:0") for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = first.text_features(PROMPTS)
    torch.testing.assert_close(rough, second.text_features(PROMPTS), atol=0, rtol=0)


def test_a_siglip_is_no_clip(monkeypatch):
    pair = SiglipReward("random:0").towers
    monkeypatch.setattr("rewards.models.clip.towers", lambda source, device: pair)
    with pytest.raises(ValueError, match=r"use siglip\(random:0\)"):
        ClipReward("random:0")


def test_the_embedded_clip_is_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "TINY", tmp_path / "none")
    with pytest.raises(ValueError, match="reinstall"):
        open_source("tiny")
