"""PickScore and HPS: the published checkpoints' names, the authors' preprocessing, the scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
from clip_folders import pictures, twin_folders
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards.images import normalize, to_images
from rewards.models import hps, pickscore
from rewards.models.clip import ClipReward
from rewards.models.hps import HpsReward
from rewards.models.pickscore import PickScoreReward
from rewards.towers.checkpoints import fit, read_state
from rewards.towers.dual_encoder import OPENAI_MEAN, OPENAI_STD, prepare
from rewards.towers.openclip import build
from rewards.towers.sources import RANDOM_CONFIG, open_source, randomise

PROMPTS = ["a red circle", "Two “blue” stars", "", "a photograph " * 60]
PARAMETERS = 986_109_441


def pickscore_shapes() -> dict[str, tuple[int, ...]]:
    """The keys of PickScore_v1 as it was uploaded, position_ids included, and their shapes."""
    found: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_model.embeddings.position_ids": (1, 77),
        "text_model.embeddings.token_embedding.weight": (49408, 1024),
        "text_model.embeddings.position_embedding.weight": (77, 1024),
        "vision_model.embeddings.position_ids": (1, 257),
        "vision_model.embeddings.class_embedding": (1280,),
        "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1280),
        "visual_projection.weight": (1024, 1280),
        "text_projection.weight": (1024, 1024),
    }
    for norm, width in (
        ("text_model.final_layer_norm", 1024),
        ("vision_model.pre_layrnorm", 1280),
        ("vision_model.post_layernorm", 1280),
    ):
        found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, depth, width in (("text", 24, 1024), ("vision", 32, 1280)):
        for i in range(depth):
            layer = f"{tower}_model.encoder.layers.{i}"
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                found[f"{layer}.self_attn.{name}.weight"] = (width, width)
                found[f"{layer}.self_attn.{name}.bias"] = (width,)
            for name in ("layer_norm1", "layer_norm2"):
                found |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
            found[f"{layer}.mlp.fc1.weight"] = (4 * width, width)
            found[f"{layer}.mlp.fc1.bias"] = (4 * width,)
            found[f"{layer}.mlp.fc2.weight"] = (width, 4 * width)
            found[f"{layer}.mlp.fc2.bias"] = (width,)
    return found


def hps_shapes() -> dict[str, tuple[int, ...]]:
    """The keys of the HPS checkpoints, those of open_clip's ViT-H-14, and their shapes."""
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    for norm, width in (("ln_final", 1024), ("visual.ln_pre", 1280), ("visual.ln_post", 1280)):
        found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, depth, width in (("", 24, 1024), ("visual.", 32, 1280)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            found[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            found[f"{block}.attn.in_proj_bias"] = (3 * width,)
            found[f"{block}.attn.out_proj.weight"] = (width, width)
            found[f"{block}.attn.out_proj.bias"] = (width,)
            for name in ("ln_1", "ln_2"):
                found |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
            found[f"{block}.mlp.c_fc.weight"] = (4 * width, width)
            found[f"{block}.mlp.c_fc.bias"] = (4 * width,)
            found[f"{block}.mlp.c_proj.weight"] = (width, 4 * width)
            found[f"{block}.mlp.c_proj.bias"] = (width,)
    return found


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def huge() -> dict[str, Any]:
    """Both ViT-H/14 without memory for their weights."""
    with torch.device("meta"):
        return {"pickscore": pickscore.build(), "hps": build(hps.CONFIG)}


@pytest.mark.parametrize(
    ("name", "shapes", "ignore"),
    [("pickscore", pickscore_shapes(), pickscore.POSITION_IDS), ("hps", hps_shapes(), ())],
)
def test_every_published_key_is_explained(huge, name, shapes, ignore):
    model = huge[name]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    fit(model, on_meta(shapes), "the file", ignore=ignore)
    gone = dict(on_meta(shapes))
    del gone["logit_scale"]
    with pytest.raises(ValueError, match="lacks logit_scale; it looks like"):
        fit(model, gone, "the file", ignore=ignore)
    more = on_meta(shapes | {"score_predictor.weight": (1,)})
    with pytest.raises(ValueError, match="has unknown score_predictor"):
        fit(model, more, "the file", ignore=ignore)


def test_the_architecture_is_open_clips_and_transformers_vit_h_14():
    assert open_clip.get_model_config("ViT-H-14") == hps.CONFIG
    text, vision = hps.CONFIG["text_cfg"], hps.CONFIG["vision_cfg"]  # pyright: ignore
    theirs_text, theirs_vision = (pickscore.CONFIG[f"{part}_config"] for part in ("text", "vision"))
    for one, other in ((text, theirs_text), (vision, theirs_vision)):
        assert one["width"] == other["hidden_size"] == other["intermediate_size"] / 4
        assert one["layers"] == other["num_hidden_layers"]
    assert vision["width"] // vision["head_width"] == theirs_vision["num_attention_heads"]
    assert text["heads"] == theirs_text["num_attention_heads"]


def authors(x: Tensor, side: int = 224) -> Tensor:
    """What HPSv2's ResizeMaxSize does to one picture (3, h, w), in torchvision's own calls."""
    h, w = x.shape[1:]
    scale = side / float(max(h, w))
    height, width = round(h * scale), round(w * scale)
    x = TF.resize(x, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    down, right = side - height, side - width
    return TF.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)


@pytest.mark.parametrize(
    "size",
    [(100, 200), (200, 100), (512, 512), (333, 517), (517, 333), (37, 90), (150, 333), (224, 100)],
)
def test_hps_pictures_are_filled_up_as_the_authors_do(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = prepare(x, (224, 224), "bicubic", "longest")
    # in float32 torchvision's weights are themselves off by 1e-5
    wanted = torch.stack([authors(picture) for picture in x.double()]).float()
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)
    assert found.shape == (2, 3, 224, 224)


def test_black_is_filled_in_before_normalising():
    x = torch.ones(1, 3, 100, 200)
    found = normalize(prepare(x, (224, 224), "bicubic", "longest"), OPENAI_MEAN, OPENAI_STD)
    black = torch.tensor([-1.7922625, -1.7520971, -1.4802198])
    for rows, inside in ((slice(0, 56), False), (slice(56, 168), True), (slice(168, 224), False)):
        same = (found[0, :, rows] - black[:, None, None]).abs().amax() < 1e-6
        assert same != inside
    assert (found[0, :, 56] - black[:, None]).abs().min() > 3
    assert (found[0, :, 167] - black[:, None]).abs().min() > 3


def test_hps_is_the_cosine_of_its_towers():
    shown = to_images(pictures(4, 48, 64))
    reward = HpsReward("random:3")
    model: Any = reward.towers.model
    pixels = torch.stack([authors(picture, 32) for picture in shown])
    ids = open_clip.SimpleTokenizer(context_length=77)(PROMPTS)
    with torch.no_grad():
        image = model.encode_image(normalize(pixels, OPENAI_MEAN, OPENAI_STD), normalize=True)
        wanted = (image * model.encode_text(ids, normalize=True)).sum(-1)
    torch.testing.assert_close(reward(shown, PROMPTS), wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 0.02
    assert (ClipReward("random:3")(shown, PROMPTS) - wanted).abs().max() > 1e-3  # it crops


@pytest.fixture
def small_hps(tmp_path, monkeypatch) -> Path:
    """A folder with both versions' checkpoints, wrapped as published, of a small tower."""
    monkeypatch.setattr(hps, "CONFIG", RANDOM_CONFIG)
    for seed, name in enumerate(hps.FILES.values()):
        state = randomise(build(RANDOM_CONFIG), seed).state_dict()
        wrapped = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {}}}
        torch.save(wrapped, tmp_path / name)
    return tmp_path


def test_hps_reads_the_published_files(small_hps):
    shown = to_images(pictures(4, 40, 30))
    wanted = [HpsReward(f"random:{seed}")(shown, PROMPTS) for seed in range(2)]
    old = HpsReward(str(small_hps), "v2")
    torch.testing.assert_close(old(shown, PROMPTS), wanted[0], atol=0, rtol=0)
    new = HpsReward(str(small_hps / "HPS_v2.1_compressed.pt"))
    assert HpsReward(str(small_hps)).towers is not old.towers
    torch.testing.assert_close(new(shown, PROMPTS), wanted[1], atol=0, rtol=0)
    path = small_hps / "HPS_v2.1_compressed.pt"
    save_file(read_state(path), path.with_suffix(".safetensors"))
    path.unlink()
    converted = HpsReward(str(path.with_suffix(".safetensors")))
    torch.testing.assert_close(converted(shown, PROMPTS), wanted[1], atol=0, rtol=0)


def test_hps_refuses_the_other_version_and_other_files(small_hps):
    with pytest.raises(ValueError, match=r"HPS_v2_compressed.pt is not version v2.1"):
        HpsReward(str(small_hps / "HPS_v2_compressed.pt"))
    with pytest.raises(ValueError, match=r"version 2.1 is unknown; did you mean 'v2.1'"):
        HpsReward(str(small_hps), 2.1)  # pyright: ignore[reportArgumentType]
    path = small_hps / "HPS_v2.1_compressed.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        HpsReward(str(small_hps))
    torch.save({"layers.0.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(
        ValueError,
        match=r"lacks positional_embedding, text_projection, .* more; it looks like a LAION",
    ):
        HpsReward(str(small_hps))
    path.unlink()
    with pytest.raises(ValueError, match=r"holds none of \['HPS_v2.1_compressed.pt'"):
        HpsReward(str(small_hps))


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> tuple[Path, Any]:
    """A small CLIP with GELU, in transformers' folder, and the model."""
    _, folder, model = twin_folders(tmp_path_factory.mktemp("twin"), False)
    return folder, model


@pytest.fixture
def small_pickscore(twin, tmp_path, monkeypatch) -> Path:
    """That folder as PickScore's was uploaded: with position_ids."""
    config = json.loads((twin[0] / "config.json").read_text())
    monkeypatch.setattr(pickscore, "CONFIG", config)
    folder = Path(shutil.copytree(twin[0], tmp_path / "pickscore"))
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors")
    return folder


def test_pickscore_is_the_logit_of_transformers_clip(twin, small_pickscore, monkeypatch):
    from transformers import AutoTokenizer

    shown = to_images(pictures(4, 32, 32))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(small_pickscore))
    reward = PickScoreReward(str(small_pickscore))
    monkeypatch.setattr(pickscore, "load_tokenizer", lambda place: tokenizer)  # it is slow
    rows = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = twin[1](**rows, pixel_values=normalize(shown, OPENAI_MEAN, OPENAI_STD))
    logits = output.logits_per_image.diagonal()
    cosine = logits / twin[1].logit_scale.exp()
    for scale, wanted in (("logit", logits), ("cosine", cosine), ("flow_grpo", logits / 26)):
        one = PickScoreReward(str(small_pickscore), scale)
        assert one.towers is reward.towers
        torch.testing.assert_close(one(shown, PROMPTS), wanted, atol=2e-5, rtol=1e-5)
        assert one.range == (pytest.approx(-one.range[1]), one.range[1])  # pyright: ignore
    assert cosine.std() > 0.02
    state = read_state(small_pickscore / "model.safetensors")
    torch.save(state, small_pickscore / "pytorch_model.bin")
    alone = PickScoreReward(str(small_pickscore / "pytorch_model.bin"))
    torch.testing.assert_close(alone(shown, PROMPTS), logits, atol=2e-5, rtol=1e-5)


def test_pickscore_names_what_a_wrong_file_holds(small_pickscore):
    path = small_pickscore / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match="cut short"):
        PickScoreReward(str(small_pickscore))
    save_file(build(RANDOM_CONFIG).state_dict(), path)
    with pytest.raises(ValueError, match=r"lacks .*it looks like an open_clip model"):
        PickScoreReward(str(small_pickscore))
    path.unlink()
    with pytest.raises(ValueError, match="holds none of"):
        PickScoreReward(str(small_pickscore))
    with pytest.raises(ValueError, match="did you mean 'flow_grpo'"):
        PickScoreReward("random:0", "flow-grpo")


def test_pickscore_takes_the_tokenizer_that_is_at_hand(tmp_path, monkeypatch):
    asked = []

    def load(place: str) -> str:
        asked.append(place)
        if fails and place == pickscore.TOKENIZER:
            raise ValueError("no network")
        return place

    fails = False
    monkeypatch.setattr(pickscore, "load_tokenizer", load)
    hub_id = "yuvalkirstain/PickScore_v1"
    assert pickscore._tokenizer(hub_id, tmp_path) == pickscore.TOKENIZER
    assert pickscore._tokenizer(str(tmp_path), tmp_path) == pickscore.TOKENIZER
    fails = True
    assert pickscore._tokenizer(hub_id, tmp_path) == hub_id
    (tmp_path / "tokenizer.json").touch()
    assert pickscore._tokenizer(str(tmp_path), tmp_path) == str(tmp_path)
    assert asked == [pickscore.TOKENIZER] * 3 + [hub_id, str(tmp_path)]


def test_random_pickscore_shares_clips_tower_and_hps_does_not():
    clip, picked, ranked = (kind("random:0") for kind in (ClipReward, PickScoreReward, HpsReward))
    assert picked.towers is clip.towers
    assert ranked.towers is not clip.towers
    assert open_source("random:0").mode == "shortest"
    assert ranked.towers.mode == "longest"
