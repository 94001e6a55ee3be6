"""What is on record of a run: that it tells two models apart, and that it repeats any picture."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import family, picture
from torch.testing._internal.two_tensor import TwoTensor

import rewards
from rewards.models.clip import ClipReward
from rewards.models.jpeg import JpegReward
from rewards.models.objects import ObjectsReward
from rewards.models.ocr import OcrReward
from steering import FeynmanKac, manifest, steer
from steering.manifest import fingerprint
from steering.pipeline import steer_each
from steering.scoring import PromptScorer

# peft, of the second adapter on a network
pytestmark = pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")

PLAIN = FeynmanKac(min_ess=0.0)
SHARP = FeynmanKac(reward_scale=300.0, min_ess=0.9)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 10


def against(images, prompts, references=None):
    return images.mean((1, 2, 3)) * 10


def recorded(pipe, keywords, prompts=("a red cube",), reward=brightness, **more):
    return steer(pipe, prompts, reward, 2, PLAIN, progress=False, **keywords, **more).manifest


def described(pipe, **keywords):
    """The manifest of a run that need not run."""
    return manifest.describe(pipe, PLAIN, keywords, [("a red cube", 0)])


# --- weights


def layers(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.Linear(64, 64))


def test_a_fingerprint_is_of_the_values_whatever_their_layout():
    assert fingerprint(layers()) == fingerprint(layers())
    assert fingerprint(layers().to(memory_format=torch.channels_last)) == fingerprint(layers())
    assert len(fingerprint(layers())) == 16
    int(fingerprint(layers()), 16)


def test_a_fingerprint_differs_with_values_shapes_dtypes_and_names():
    tuned = layers()
    with torch.no_grad():
        tuned.get_parameter("1.weight")[:, 5] += 1e-6  # a single column of the 64
    swapped = torch.nn.ModuleDict({"a": layers()[0], "b": layers()[1]})
    found = {
        fingerprint(module)
        for module in (layers(), layers(1), layers().half(), layers()[0], tuned, swapped)
    }
    assert len(found) == 6


def test_a_fingerprint_of_weights_elsewhere_or_made_of_parts():
    """Meta tensors have no values; a quantised weight is a tensor made of others."""
    assert fingerprint(layers().to("meta")) == fingerprint(layers(1).to("meta"))
    ones, twos = torch.ones(3, 3), torch.full((3, 3), 2.0)
    found = []
    for pair in ((ones, twos), (ones, ones)):
        module = torch.nn.Module()
        module.register_buffer("weight", TwoTensor(*pair))
        found.append(fingerprint(module))
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["sd", "sd3", "controlnet"])
def test_every_network_has_a_fingerprint_and_so_has_the_preview(name):
    pipe, keywords = family(name)
    preview = AutoencoderTiny(
        latent_channels=pipe.vae.config.latent_channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    weights = recorded(pipe, keywords, preview=preview)["weights"]
    modules = {n for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert weights.keys() == modules | {"preview"}
    assert weights["vae"] == fingerprint(pipe.vae)


def test_weights_are_read_once_a_run_and_not_once_a_prompt(monkeypatch):
    pipe, keywords = family("sd")
    read = []
    monkeypatch.setattr(manifest, "fingerprint", lambda module: read.append(module) or "0" * 16)
    recorded(pipe, keywords, prompts=["one", "two", "three"])
    assert sorted(map(id, read)) == sorted({id(module) for module in read})


# --- LoRA


def adapted(scales, seed=0):
    """An SD with adapters "a" and "b" on its network, of which those in `scales` are in use."""
    pipe, _ = family("sd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("a", "b"):
            target = ["to_q", "to_v"]
            config = LoraConfig(r=2, lora_alpha=4, target_modules=target, init_lora_weights=False)
            pipe.unet.add_adapter(config, adapter_name=name)
    pipe.unet.eval()
    pipe.set_adapters(list(scales), list(scales.values()))
    return pipe


def test_an_adapter_is_recorded_with_its_scale():
    found = described(adapted({"a": 0.5, "b": 0.25}))["adapters"]
    assert found == [  # alpha / rank is 2
        {"name": "a", "component": "unet", "scale": 1.0},
        {"name": "b", "component": "unet", "scale": 0.5},
    ]
    assert [entry["name"] for entry in described(adapted({"b": 1.0}))["adapters"]] == ["b"]


def test_manifests_differ_with_the_scale_and_the_weights_of_an_adapter():
    one, other, again = (described(adapted({"a": scale})) for scale in (1.0, 0.7, 1.0))
    assert one == again
    assert one | {"adapters": None} == other | {"adapters": None}
    assert one["adapters"] != other["adapters"]
    tuned = described(adapted({"a": 1.0}, seed=1))
    assert one["adapters"] == tuned["adapters"]
    assert one["weights"]["unet"] != tuned["weights"]["unet"]
    assert one["weights"]["vae"] == tuned["weights"]["vae"]


def test_adapters_that_are_off_are_not_in_use_and_fused_ones_change_the_weights():
    pipe = adapted({"a": 1.0})
    before = described(pipe)
    pipe.fuse_lora()
    assert described(pipe)["weights"]["unet"] != before["weights"]["unet"]
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert described(pipe)["adapters"] == []
    assert described(family("sd")[0])["adapters"] == []


def test_a_scale_that_differs_between_layers_is_recorded_as_all_its_values():
    pipe = adapted({"a": 1.0})
    pipe.set_adapters(["a"], [{"unet": {"down": 0.5}}])
    assert described(pipe)["adapters"][0]["scale"] == [1.0, 2.0]


# --- scheduler, attention, versions


def test_the_schedulers_config_is_recorded_as_json():
    pipe, _ = family("pixart")  # DPM-Solver, one of whose settings is minus infinity
    found = described(pipe)
    assert found["scheduler"] == "DPMSolverMultistepScheduler"
    config = found["scheduler_config"]
    assert (config["solver_order"], config["lambda_min_clipped"]) == (2, "-inf")
    assert not any(name.startswith("_") for name in config)
    json.dumps(found, allow_nan=False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_start=0.002)
    assert described(pipe)["scheduler_config"] != config


def test_what_computes_the_attention_is_recorded():
    pipe, _ = family("flux")
    assert described(pipe)["attention"]["transformer"] == ["FluxAttnProcessor native"]
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "flash"
    found = described(pipe)["attention"]
    assert found["transformer"] == ["FluxAttnProcessor flash"]
    assert found["text_encoder"] == ["sdpa"]
    sd, _ = family("sd")
    assert described(sd)["attention"]["unet"] == ["AttnProcessor2_0"]
    sd.unet.set_default_attn_processor()
    sd.enable_attention_slicing()
    assert described(sd)["attention"]["unet"] == ["SlicedAttnProcessor"]


def test_versions_are_those_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(manifest, "_PACKAGES", ("torch", "Pillow", "no-such-package"))
    monkeypatch.setattr(manifest, "_versions", manifest._versions.__wrapped__)  # not what was kept
    versions = described(family("sd")[0])["versions"]
    assert versions.keys() == {"python", "torch", "Pillow"}
    assert torch.__version__.startswith(versions["torch"])


# --- the reward

BUILT_IN = [
    (ClipReward("random:0", scale="logit"), "clip(source=random:0, scale=logit)"),
    (ClipReward("random:1", batch_size=3), "clip(source=random:1, batch_size=3)"),
    (OcrReward(), "ocr"),
    (OcrReward("exact", limit_side_len=160), "ocr(mode=exact, limit_side_len=160)"),
    (OcrReward(upscale=2, detect=False), "ocr(upscale=2, detect=false)"),
    (JpegReward("incompressibility"), "jpeg(mode=incompressibility)"),
    (ObjectsReward("share"), "objects(mode=share)"),
]


@pytest.mark.parametrize(("reward", "spec"), BUILT_IN, ids=[spec for _, spec in BUILT_IN])
def test_a_built_in_reward_is_recorded_as_the_text_that_loads_it(reward, spec):
    prompt = "a star" if isinstance(reward, ObjectsReward) else 'say "a"'
    assert PromptScorer(reward, [prompt], None).name == spec
    again = rewards.load(spec, imports=True)
    assert again == rewards.load(reward)
    assert again.spec == spec
    (part,) = again.parts
    assert type(part.reward) is type(reward)
    for name in ("scale", "batch_size", "towers", "mode", "reader"):  # towers, readers are shared
        assert getattr(part.reward, name, None) == getattr(reward, name, None)


def test_a_sum_recorded_from_a_built_in_reward_keeps_its_arguments():
    whole = rewards.load(JpegReward("incompressibility"))
    assert (whole.name, whole.spec) == ("jpeg", "jpeg(mode=incompressibility)")


# --- the prompts of a part


def test_a_part_holds_its_own_prompts_and_join_gives_back_all():
    pipe, _ = family("sd")
    prompts = ["one", "two", "one", "three"]
    negative = ["n1", "n2", "n3", "n4"]
    embeds = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 2, "negative_prompt": negative, "prompt_embeds": embeds}
    parts = [
        part.manifest
        for part in steer_each(
            pipe, prompts, against, 1, PLAIN,
            prompts_per_call=2, progress=False, references=[picture(i) for i in range(4)], **given,
        )
    ]  # fmt: skip
    first, second = parts
    assert second["prompts"] == ["one", "three"]
    assert second["occurrences"] == [1, 0]
    assert second["pipeline_keywords"]["negative_prompt"] == ["n3", "n4"]
    assert second["pipeline_keywords"]["num_inference_steps"] == 2
    assert len(set(first["references"] + second["references"])) == 4
    assert first["references"][0].startswith("image (16, 16) sha256 ")
    rows = [part["pipeline_keywords"]["prompt_embeds"] for part in parts]
    assert [len(found) for found in rows] == [2, 2]
    assert len({*rows[0], *rows[1]}) == 4
    whole = manifest.join(parts)
    assert (whole["prompts"], whole["occurrences"]) == (prompts, [0, 0, 1, 0])
    assert whole["pipeline_keywords"]["negative_prompt"] == negative
    assert [manifest.select(whole, [i, i + 1]) for i in (0, 2)] == parts
    assert manifest.join(parts[:1]) == first


def test_one_text_for_all_prompts_stays_one():
    pipe, keywords = family("sd")
    for negative in ("blurry", ["blurry"]):
        given = keywords | {"negative_prompt": negative}
        found = recorded(pipe, given, prompts=["one", "two", "three"], prompts_per_call=2)
        assert found["pipeline_keywords"]["negative_prompt"] == negative
        assert found["references"] is None


def test_halvings_after_the_first_prompt_are_on_record(monkeypatch):
    pipe, keywords = family("sd")
    real, calls = pipe.unet.forward, []

    def small(x, *args, **kw):
        calls.append(len(x))
        if len(calls) > 8 and len(x) > 2:  # after the first prompt's six steps
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x, *args, **kw)

    monkeypatch.setattr(pipe.unet, "forward", small)
    out = list(steer_each(pipe, ["a", "b", "c"], brightness, 2, PLAIN, progress=False, **keywords))
    assert [part.manifest["halvings"] for part in out] == [0, 1, 1]
    assert type(out[0]).join(out).manifest["halvings"] == 1


def test_the_second_of_two_equal_prompts_is_repeated_from_its_png_alone(tmp_path):
    pipe, keywords = family("sd3")
    prompts = ["two dots", "a red cube", "a red cube"]
    out = steer(pipe, prompts, brightness, 3, SHARP, seed=5, progress=False, **keywords)
    out.save(tmp_path)
    with Image.open(tmp_path / "0002-01.png") as saved:
        about, pixels = json.loads(saved.info["parameters"]), np.asarray(saved)
    assert "two dots" not in json.dumps(about)
    run = about["run"]
    settings = FeynmanKac(**run["settings"] | {"funnel": tuple(run["settings"]["funnel"])})
    (again,) = steer_each(
        copy.copy(pipe),
        [about["prompt"]] * (about["occurrence"] + 1),
        brightness,
        run["particles"],
        settings,
        seed=run["seed"],
        only=[about["occurrence"]],
        progress=False,
        **run["pipeline_keywords"],
    )
    assert np.array_equal(np.asarray(again.images[0][about["particle"]]), pixels)
    assert again.rewards[0, about["particle"]].item() == about["reward"]
    assert again.manifest == manifest.select(out.manifest, [2])


def test_a_png_names_its_own_references_only(tmp_path):
    pipe, keywords = family("sd")
    pictures = [[picture(0)], [picture(1), picture(2)]]
    out = steer(
        pipe, ["a", "b"], against, 1, PLAIN, progress=False, references=pictures, **keywords
    )
    out.save(tmp_path)
    with Image.open(tmp_path / "0001-00.png") as saved:
        about = json.loads(saved.info["parameters"])
    assert about["references"] == out.manifest["references"][1]
    assert len(about["references"]) == 2
    saved = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert saved == out.manifest | {"results": saved["results"]}


def test_arrays_and_tensors_are_recorded_by_their_content():
    pipe, _ = family("sd")
    values = [np.zeros(3), np.ones(3), torch.zeros(3), torch.ones(3), torch.zeros(3).bfloat16()]
    found = [described(pipe, cross_attention_kwargs={"x": value}) for value in values]
    texts = [entry["pipeline_keywords"]["cross_attention_kwargs"]["x"] for entry in found]
    assert len(set(texts)) == 5
    assert texts[2].startswith("tensor (3,) torch.float32 sha256 ")
