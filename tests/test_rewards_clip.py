"""CLIP rewards, against open_clip's and transformers' own preprocessing and towers."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_folders import WORDS, pictures, word_rules
from safetensors.torch import save_file

import rewards
from rewards.images import resize, to_images
from rewards.models.clip import ClipReward
from rewards.towers import dual_encoder as towers_module
from rewards.towers.dual_encoder import prepare
from rewards.towers.openclip import WordTokenizer, build
from rewards.towers.sources import open_source, towers

PROMPTS = ["a red circle", "a blue star", "a red circle", "star"]


def tiny_config(quick_gelu: bool = False) -> dict:
    text = {"context_length": 8, "vocab_size": len(WORDS), "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3] * 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as the embedded CLIP is stored: configuration, half-precision weights, words."""
    path = tmp_path_factory.mktemp("clip")
    config = tiny_config()
    (path / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # open_clip initialises from the global generator
        state = build(config).state_dict()
        for name, value in state.items():
            if value.ndim > 1:
                state[name] = torch.randn(value.shape) * 0.2
    save_file({k: v.half() for k, v in state.items()}, path / "open_clip_model.safetensors")
    word_rules().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (47, 80), (100, 33)])
def test_scores_equal_open_clip_with_its_own_preprocessing(folder, size, monkeypatch):
    parts: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model, _, preprocess = parts
    shown = pictures(4, *size)
    ids = WordTokenizer(folder, 8)(PROMPTS)
    pixels = torch.stack([torch.as_tensor(preprocess(picture)) for picture in shown])
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(ids, normalize=True)
    expected = (image * text).sum(-1)
    found = ClipReward(str(folder))(to_images(shown), PROMPTS)
    assert found.std() > 0.02  # or the tolerances would say nothing
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    # what is left is PIL's rounding to bytes: with that too, the scores are the same
    monkeypatch.setattr(towers_module, "resize", partial(resize, exact=True))
    found = ClipReward(str(folder))(to_images(shown), PROMPTS)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (47, 80), (100, 33), (32, 32)])
def test_preprocessing_is_openais_resize_and_centre_crop(size):
    from torchvision.transforms import v2

    shown = pictures(1, *size)[0]
    crop = v2.Compose(
        [v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)]
    )
    expected = to_images(crop(shown))
    found = prepare(to_images(shown), (32, 32), "bicubic", "shortest")
    assert (found - expected).abs().max() < 1.6 / 255


def test_transformers_clip_folder_gives_what_transformers_gives(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    names = ("<pad>", "<unk>", "<start>", "<end>")
    special = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), names, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_rules(), **special)
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2, "projection_dim": 16}
    text = shared | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": 8}
    vision = shared | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)  # the library initialises from the global generator
    model: Any = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(tmp_path)

    shown = pictures(4, 32, 32)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(shown, return_tensors="pt").pixel_values
    rows = tokenizer(PROMPTS, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        texts = model.get_text_features(rows.input_ids).pooler_output
    expected = F.cosine_similarity(image, texts)
    reward = ClipReward(str(tmp_path))
    torch.testing.assert_close(reward(to_images(shown), PROMPTS), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.02


def test_word_tokenizer_equals_transformers(folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_rules(), pad_token="<pad>")
    texts = ["a red circle", "", "star", "a a a a a a a a a a a a", "unheard words"]
    expected = tokenizer(
        texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    ).input_ids
    found = WordTokenizer(folder / "tokenizer.json", 8)(texts)
    assert found.dtype == torch.int64
    torch.testing.assert_close(found, torch.as_tensor(expected))


def test_chunks_and_order_do_not_change_scores(folder):
    images = to_images(pictures(5, 40, 40))
    prompts = [*PROMPTS, "a star"]
    whole = ClipReward(str(folder))(images, prompts)
    for batch_size in (1, 2, 5):
        chunked = ClipReward(str(folder), batch_size=batch_size)(images, prompts)
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    order = [3, 0, 4, 2, 1]
    moved = ClipReward(str(folder))(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(moved, whole[order], atol=1e-5, rtol=0)
    assert whole.dtype == torch.float32
    assert whole.shape == (5,)
    assert ClipReward(str(folder))(images[:0], []).shape == (0,)


def test_equal_prompts_are_encoded_once_and_remembered(folder, monkeypatch):
    found = open_source(str(folder))
    asked = []
    encode = found.encode_text
    monkeypatch.setattr(found, "encode_text", lambda texts: asked.extend(texts) or encode(texts))
    first = found.text_features(PROMPTS)
    again = found.text_features(["star", "a red circle"])
    assert asked == ["a red circle", "a blue star", "star"]
    torch.testing.assert_close(again, first[[3, 0]], atol=0, rtol=0)
    monkeypatch.setattr(towers_module, "CACHED_PROMPTS", 2)
    found.text_features(["a"])
    assert len(found._features) == 2


def test_rewards_of_the_same_weights_share_their_towers(folder):
    reward = rewards.load(f"clip({folder}) + l=0*clip({folder}, scale=logit)", imports=True)
    assert reward.parts[0].reward.towers is reward.parts[1].reward.towers
    assert towers("random:1") is not towers("random:2")


def test_gradients_follow_grad_mode_and_stay_with_their_picture(folder):
    reward = ClipReward(str(folder), batch_size=2)
    images = (to_images(pictures(3, 40, 40)) * 0.8 + 0.1).requires_grad_()
    with torch.inference_mode():
        reward(images, PROMPTS[:3])  # what is remembered here must serve gradients below
    with torch.no_grad():
        assert not reward(images, PROMPTS[:3]).requires_grad
    scores = reward(images, PROMPTS[:3])
    (grad,) = torch.autograd.grad(scores[1], images)
    assert grad[1].abs().sum() > 0
    assert grad[[0, 2]].abs().sum() == 0
    assert not any(p.requires_grad for p in reward.towers.model.parameters())
    # the slope along the gradient, by central differences
    with torch.no_grad():
        step = 0.05 * grad / grad.norm()
        up, down = (reward(images + sign * step, PROMPTS[:3])[1] for sign in (1, -1))
    assert ((up - down) / 0.1).item() == pytest.approx(grad.norm().item(), rel=0.05)


def test_the_last_product_is_float32_under_autocast(folder):
    reward = ClipReward(str(folder))
    images = to_images(pictures(4, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(images, PROMPTS)
        rounded = scores.bfloat16().float()
    assert scores.dtype == torch.float32
    assert (scores - rounded).abs().max() > 0


def test_scale_presets(folder):
    images = to_images(pictures(4, 32, 32))
    cosine = ClipReward(str(folder))(images, PROMPTS)
    logit = ClipReward(str(folder)).logit_scale
    assert logit.item() == pytest.approx(1 / 0.07, rel=1e-3)  # open_clip's initial value
    expected = {
        "cosine": cosine,
        "percent": 100 * cosine,
        "logit": logit * cosine,
        "diffusion_nft": logit * cosine / 100,
        "adv_grpo": logit * cosine / 30,
    }
    for name, value in expected.items():
        reward = ClipReward(str(folder), name)
        torch.testing.assert_close(reward(images, PROMPTS), value)
        low, high = reward.range
        assert low is not None
        assert high is not None
        assert ((value >= low) & (value <= high)).all()
    hessel = ClipReward(str(folder), "hessel")
    prefixed = ClipReward(str(folder))(images, ["A photo depicts " + prompt for prompt in PROMPTS])
    torch.testing.assert_close(hessel(images, PROMPTS), 2.5 * prefixed.clamp(min=0))
    assert hessel.range == (0.0, 2.5)
    assert set(ClipReward.scales) == {*expected, "hessel"}


def test_random_towers_depend_on_their_seed_alone():
    images = to_images(pictures(2, 32, 32))
    torch.manual_seed(1)
    first = open_source("random:7").image_features(images)
    torch.manual_seed(2)
    second = open_source("random:7").image_features(images)
    other = open_source("random:8").image_features(images)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert (first - other).abs().max() > 0.01


def test_the_activation_is_checked_against_the_configuration(monkeypatch):
    build(tiny_config(quick_gelu=True))
    monkeypatch.setattr(open_clip.model, "QuickGELU", torch.nn.GELU)
    with pytest.raises(ValueError, match="quick_gelu=True"):
        build(tiny_config(quick_gelu=True))


def test_tags_are_built_with_the_activation_they_were_trained_with(monkeypatch, folder):
    asked = {}

    def create(name, tag, **kwargs):
        asked[name, tag] = kwargs["force_quick_gelu"]
        raise RuntimeError("no network in tests")

    monkeypatch.setattr(open_clip, "create_model", create)
    session = SimpleNamespace(head=lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(ValueError, match="give a folder"):
            ClipReward(f"ViT-B-32/{tag}")
    assert asked == {("ViT-B-32", "openai"): True, ("ViT-B-32", "laion2b_s34b_b79k"): False}


def test_without_a_network_the_error_names_the_folder_option_at_once(monkeypatch):
    def no_session():
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", no_session)
    for source in ("ViT-L-14/openai", "no-such-organisation/clip", "hf-hub:no-such/clip"):
        with pytest.raises(ValueError, match="source=/path/to/folder"):
            ClipReward(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no CLIP folder"),
        ("ViT-B-32/nonsense", "no weights 'nonsense'"),
        ("nonsense", "is neither"),
        ("random:x", "whole number"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        ClipReward(source)


def test_folders_that_are_no_clip_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither open_clip_config"):
        ClipReward(str(tmp_path))
    for kind, words in (("bert", "'bert'"), ("siglip2", "siglip2-base-patch16-224")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=words):
            ClipReward(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {}, "sound": 1}}')
    with pytest.raises(ValueError, match="no CLIP that open_clip builds"):
        ClipReward(str(tmp_path))
    with pytest.raises(ValueError, match="source is 3"):
        ClipReward(3)  # pyright: ignore[reportArgumentType]
    for size in (0, "two", 1.5):
        with pytest.raises(ValueError, match=f"batch_size is {size!r}"):
            ClipReward("random:0", batch_size=size)  # pyright: ignore[reportArgumentType]
