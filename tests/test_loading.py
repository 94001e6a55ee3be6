"""tilt.loading: what is no pipeline, or does not fit one, is refused in a sentence."""

import json
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_parts
import tiny_pipelines
import torch
from command_line import SMALL, refused
from diffusers import (
    AutoencoderTiny,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import dummy_torch_and_transformers_and_sentencepiece_objects

from steering import FeynmanKac, steer, tiny
from steering.manifest import fingerprint
from tilt import loading
from tilt.commands import steer as script
from tilt.loading import PREVIEWS, load_pipeline, load_preview, pick_preview
from tilt.model_files import files_of, variant_of


@pytest.mark.parametrize("kind", ["NoSuchPipeline", "UNet2DConditionModel"])
def test_model_index_that_names_no_pipeline_is_refused(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=f"cannot load the model .*{kind}.*name one that does"):
        load_pipeline(str(tmp_path), torch.float32)


def test_an_empty_file_is_no_lora_for_a_pipeline_without_a_loader(tmp_path):
    tiny_pipelines.pixart().save_pretrained(tmp_path)
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    with pytest.raises(ValueError, match=r"cannot be read .*PixArtAlphaPipeline takes a local"):
        load_pipeline(str(tmp_path), torch.float32, lora=str(lora))


# --- what is there, before weights are loaded


@pytest.mark.parametrize("load", [loading.check_trainable, lambda x: load_pipeline(x, torch.half)])
@pytest.mark.parametrize("index", [{"_class_name": "KolorsPipeline"}, {"unet": "KolorsPipeline"}])
def test_a_package_that_the_libraries_need_for_a_class_is_named(tmp_path, monkeypatch, load, index):
    """diffusers then exports a class that only complains; it takes no prompt."""
    without = vars(dummy_torch_and_transformers_and_sentencepiece_objects)["KolorsPipeline"]
    monkeypatch.setitem(vars(diffusers), "KolorsPipeline", without)
    monkeypatch.setattr("diffusers.utils.import_utils._sentencepiece_available", False)
    parts = {"unet": ["diffusers", index.get("unet", "UNet2DConditionModel")]}
    index = {"_class_name": "StableDiffusionPipeline"} | index | parts
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = "needs sentencepiece, which is not installed: pip install sentencepiece$"
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path))


@pytest.mark.parametrize("kept", ["folder", "cache"])
def test_weights_in_a_variant_alone_are_loaded(tmp_path, monkeypatch, kept):
    """Kolors is published in fp16 alone."""
    pipe, name, folder = tiny_pipelines.sd(), str(tmp_path / "model"), tmp_path / "model"
    if kept == "cache":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        name, revision = "some/model", "0" * 40
        folder = tmp_path / "models--some--model" / "snapshots" / revision
        (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
        (tmp_path / "models--some--model" / "refs" / "main").write_text(revision)
    pipe.save_pretrained(folder, variant="fp16")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")  # both
    loaded = load_pipeline(name, torch.float32)
    assert fingerprint(loaded.unet) == fingerprint(pipe.unet)


def test_the_variant_is_that_of_a_part_without_other_weights():
    index = {"unet": ["diffusers", "A"], "vae": ["diffusers", "B"], "prior": [None, None]}
    index["text_encoder"] = ["kolors", "ChatGLMModel"]
    unet, vae = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
    both = [f"{vae}.safetensors", f"{vae}.fp16.safetensors", "text_encoder/model.safetensors"]
    shard = "-00001-of-00002"
    for files, variant in [
        ([*both, f"{unet}.bin"], None),
        ([*both, f"{unet}{shard}.safetensors", f"{unet}.fp16{shard}.safetensors"], None),
        ([*both, f"{unet}.fp16.safetensors"], "fp16"),
        ([*both, f"{unet}.fp16{shard}.safetensors"], "fp16"),
        ([*both, f"{unet}{shard}.fp16.safetensors"], "fp16"),
        ([*both, f"{unet}.non_ema.bin", "readme.fp16.bin"], "non_ema"),
        ([*both, "prior/model.fp16.bin", "other/model.fp16.bin"], None),  # parts that it lacks
        ([], None),
    ]:
        assert variant_of(index, files) == variant, files
    with pytest.raises(ValueError, match="the variants bf16, fp16 alone; give a folder with one"):
        variant_of(index, [f"{unet}.fp16.bin", f"{unet}.bf16.bin"])


def test_the_files_of_the_hub_are_asked_for(monkeypatch):
    held = [SimpleNamespace(rfilename="unet/model.fp16.bin")]
    info = lambda self, name, timeout: SimpleNamespace(siblings=held)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    assert files_of("some/model", offline=False) == ["unet/model.fp16.bin"]
    assert files_of("some/model", offline=True) == []


# --- preview decoders


# what the config.json of madebyollin/taesd, taesdxl (4), taesd3 and taef1 (16) say
PUBLISHED = {
    "act_fn": "relu",
    "decoder_block_out_channels": (64, 64, 64, 64),
    "encoder_block_out_channels": (64, 64, 64, 64),
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": (3, 3, 3, 1),
    "num_encoder_blocks": (1, 3, 3, 3),
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
# what the config.json of the models' vae say
VAES = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}
IDS = dict(zip(VAES, PREVIEWS.values(), strict=True))


def published_vae(family, **config):
    """A VAE with that model's latents, 8 pixels a side; few channels within."""
    given = {**VAES[family], **config}
    return tiny_pipelines.vae(
        given.pop("latent_channels"),
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **given,
    )


def published(family, **config):
    """A small pipeline whose latents have the shape and the scale of the published model's."""
    pipe = getattr(tiny_pipelines, family)()
    parts = {**pipe.components, "vae": published_vae(family, **config)}
    if family == "sd3":
        channels = {"in_channels": 16, "out_channels": 16}
        config = {**pipe.transformer.config, **channels}
        parts["transformer"] = tiny_parts.seeded(SD3Transformer2DModel, config)
        pipe = StableDiffusion3Pipeline(**parts)
    elif family == "flux":
        config = {**pipe.transformer.config, "in_channels": 64}
        parts["transformer"] = tiny_parts.seeded(FluxTransformer2DModel, config)
        pipe = FluxPipeline(**parts)
    elif family == "sd":
        pipe = type(pipe)(**parts, requires_safety_checker=False)
    else:
        pipe = type(pipe)(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(monkeypatch):
    """Published decoders that are at hand: the ids that are asked for, with random weights."""
    asked = []

    def from_pretrained(name, dtype, local_files_only):
        asked.append(name)
        channels = 16 if name.endswith(("sd3", "f1")) else 4
        config = {**PUBLISHED, "latent_channels": channels}
        return tiny_parts.seeded(AutoencoderTiny, config).to(dtype)

    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "where", lambda name: (name, False))
    return asked


@pytest.mark.parametrize("channels", [4, 16])
def test_published_decoders_decode_8_pixels_a_side(channels):
    with torch.device("meta"):
        decoder: Any = AutoencoderTiny(**PUBLISHED, latent_channels=channels)
        images = decoder.decode(torch.empty(2, channels, 64, 64)).sample
    assert images.shape == (2, 3, 512, 512)
    assert decoder.config.scaling_factor == 1  # latents of unit variance, as the network has them
    assert decoder.config.shift_factor == 0


@pytest.mark.parametrize("family", VAES)
def test_auto_is_the_published_decoder_of_the_vae_and_steers(family, served):
    pipe = published(family)
    preview = load_preview("auto", "some/model", torch.float32, pipe)
    assert served == [IDS[family]]
    seen = []

    def reward(images, prompts):
        seen.append(images.shape)
        return images.mean((1, 2, 3))

    size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 5}
    settings = FeynmanKac(num_scores=2)
    out = steer(pipe, ["a cat"], reward, 2, settings, preview=preview, progress=False, **size)
    assert seen == [(2, 3, 64, 64)] * (len(out.lineage.scores) + 1)


@pytest.mark.parametrize("family", VAES)
def test_auto_is_known_by_name_before_the_model_is_loaded(family, tmp_path):
    published(family).save_pretrained(tmp_path)
    assert pick_preview("auto", str(tmp_path)) == IDS[family]


# Playground 2.5; a VAE of its own; one of 2 pixels a side
@pytest.mark.parametrize(
    "config",
    [{"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, {"scaling_factor": 0.5}, None],
)
def test_auto_is_none_for_other_latents(config, tmp_path):
    pipe = tiny_pipelines.sdxl() if config is None else published("sdxl", **config)
    assert load_preview("auto", "some/model", torch.float32, pipe) is None
    pipe.save_pretrained(tmp_path)
    assert pick_preview("auto", str(tmp_path)) == "none"


def test_auto_is_none_for_other_decoders(tmp_path):
    pipe = tiny_pipelines.sana()
    assert load_preview("auto", "some/model", torch.float32, pipe) is None
    pipe.save_pretrained(tmp_path)
    assert pick_preview("auto", str(tmp_path)) == "none"


def test_embedded_models_have_one_of_their_own():
    assert pick_preview("auto", "tiny-sd3") == "tiny"
    weights = fingerprint(tiny.preview())
    for choice in ("auto", "tiny"):
        assert fingerprint(load_preview(choice, "tiny-sd3", torch.float32)) == weights


def test_without_the_pipeline_auto_is_the_embedded_one_or_none():
    assert load_preview("auto", "some/model", torch.float32) is None


@pytest.mark.parametrize("choice", ["none", "some/decoder", "tiny"])
def test_what_was_named_is_kept(choice):
    assert pick_preview(choice, "/nowhere") == choice


@pytest.mark.usefixtures("offline")
def test_a_decoder_that_cannot_be_had_is_named_with_the_way_out():
    """Going on without would give other pictures than with it."""
    said = "the preview decoder madebyollin/taesd; .* a folder that holds it, or --preview none$"
    with pytest.raises(ValueError, match=said):
        load_preview("auto", "some/model", torch.float32, published("sd"))


@pytest.mark.usefixtures("offline")
def test_the_hub_says_no_and_the_way_out_is_the_same(monkeypatch):
    monkeypatch.setattr(loading, "where", lambda name: (name, False))
    with pytest.raises(ValueError, match=r"madebyollin/taesd \(.*; give .* or --preview none$"):
        load_preview("madebyollin/taesd", "some/model", torch.float32)


@pytest.mark.usefixtures("offline")
def test_steer_refuses_in_one_sentence_and_runs_without(tmp_path, capsys):
    published("sd").save_pretrained(tmp_path / "model")
    arguments = ["a cat", "--model", str(tmp_path / "model"), *SMALL, "--out", str(tmp_path / "o")]
    capsys.readouterr()
    assert "--preview none" in refused(capsys, *arguments)
    assert script.main([*arguments, "--preview", "none"]) == 0


def test_the_decoder_that_auto_stands_for_is_in_the_manifest(tmp_path, served, capsys):
    """So that a continuation where auto would be another decoder is refused."""
    published("sd").save_pretrained(tmp_path / "model")
    arguments = ["a cat", "--model", str(tmp_path / "model"), *SMALL, "--out", str(tmp_path / "o")]
    size = ["--height", "64", "--width", "64"]
    assert script.main([*arguments, *size]) == 0
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["preview"] == "madebyollin/taesd"
    capsys.readouterr()
    said = refused(capsys, *arguments, *size, "--resume", "--preview", "none")
    assert "--preview 'madebyollin/taesd', not 'none'" in said
    assert script.main([*arguments, *size, "--resume", "--preview", "madebyollin/taesd"]) == 0
