"""steering.adapters: a LoRA of any published format is loaded whole, and any other one refused."""

import re

import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import lora
from finetune.network import part_of, targets_of
from steering import tiny
from steering.adapters import _loaded, check_lora, load_lora, unload_lora
from tilt import loading

RANK = 2


def layers(module, ends):
    """{name: (out, in)} of the linear layers whose names end so."""
    return {
        name: (part.out_features, part.in_features)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and name.endswith(tuple(ends))
    }


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
OF_UNET = ("to_q", "to_k", "to_v", "to_out.0")
OF_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def pair(shape, down, up, alpha=""):
    """The tensors of one layer under the names of a format."""
    found = {down: torch.randn(RANK, shape[1]), up: torch.randn(shape[0], RANK)}
    return found | ({alpha: torch.tensor(1.0)} if alpha else {})


def kohya(prefix, module, ends, rename=lambda name: name):
    """As sd-scripts writes: dots are underscores, down, up and alpha."""
    state = {}
    for name, shape in layers(module, ends).items():
        key = prefix + rename(name).replace(".", "_")
        state |= pair(shape, f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha")
    return state


def text_model(name):
    """As transformers called the layers when these formats were published."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def sgm(name, each):
    """A layer of the UNet as Stability's own code calls it; each: layers of a block, and one."""
    blocks = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", name)
    if blocks is None:
        return name.replace("mid_block.attentions.0", "middle_block.1")
    way, block, layer, rest = blocks.groups()
    if way == "down":
        return f"input_blocks.{each * int(block) + int(layer) + 1}.1.{rest}"
    return f"output_blocks.{each * int(block) + int(layer)}.1.{rest}"


def of_sd_kohya(pipe):
    text = kohya("lora_te_", pipe.text_encoder, TEXT, text_model)
    return kohya("lora_unet_", pipe.unet, ATTENTION) | text


def of_sdxl_kohya(pipe):
    each = pipe.unet.config.layers_per_block + 1
    state = kohya("lora_unet_", pipe.unet, ATTENTION, lambda name: sgm(name, each))
    state |= kohya("lora_te1_", pipe.text_encoder, TEXT, text_model)
    return state | kohya("lora_te2_", pipe.text_encoder_2, TEXT, text_model)


def of_processors(pipe):
    """As diffusers wrote before 0.18: layers of attention processors."""
    state = {}
    for name, shape in layers(pipe.unet, OF_UNET).items():
        stem, _, end = name.removesuffix(".0").rpartition(".")
        key = f"unet.{stem}.processor.{end}_lora"
        state |= pair(shape, f"{key}.down.weight", f"{key}.up.weight")
    return state


def of_diffusers(pipe):
    """As diffusers' scripts wrote before peft."""
    state = {}
    for name, shape in layers(pipe.unet, OF_UNET).items():
        state |= pair(shape, f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight")
    for name, shape in layers(pipe.text_encoder, OF_TEXT).items():
        key = f"text_encoder.{text_model(name)}.lora_linear_layer"
        state |= pair(shape, f"{key}.down.weight", f"{key}.up.weight")
    return state


def of_peft(pipe):
    """As diffusers writes now."""
    state, part = {}, "unet" if hasattr(pipe, "unet") else "transformer"
    for name, shape in layers(getattr(pipe, part), OF_UNET).items():
        state |= pair(shape, f"{part}.{name}.lora_A.weight", f"{part}.{name}.lora_B.weight")
    for name, shape in layers(pipe.text_encoder, OF_TEXT).items():
        key = f"text_encoder.{text_model(name)}.lora_linear_layer"
        state |= pair(shape, f"{key}.down.weight", f"{key}.up.weight")
    return state


def of_flux_kohya(pipe):
    """As sd-scripts writes: q, k and v are one layer there."""
    state, width = {}, pipe.transformer.inner_dim
    for side in ("img", "txt"):
        for end, shape in (("attn_qkv", (3 * width, width)), ("attn_proj", (width, width))):
            key = f"lora_unet_double_blocks_0_{side}_{end}"
            state |= pair(shape, f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha")
    return state | kohya("lora_te1_", pipe.text_encoder, OF_TEXT, text_model)


def of_flux_xlabs(pipe):
    state, width = {}, pipe.transformer.inner_dim
    for key, outer in (("qkv_lora1", 3), ("proj_lora1", 1), ("qkv_lora2", 3), ("proj_lora2", 1)):
        stem = f"double_blocks.0.processor.{key}"
        state |= pair((outer * width, width), f"{stem}.down.weight", f"{stem}.up.weight")
    return state


FORMATS = {
    "sd kohya": ("sd", of_sd_kohya),
    "sd processors": ("sd", of_processors),
    "sd diffusers": ("sd", of_diffusers),
    "sd peft": ("sd", of_peft),
    "sdxl kohya": ("sdxl", of_sdxl_kohya),
    "sdxl diffusers": ("sdxl", of_diffusers),
    "sd3 peft": ("sd3", of_peft),
    "flux peft": ("flux", of_peft),
    "flux kohya": ("flux", of_flux_kohya),
    "flux xlabs": ("flux", of_flux_xlabs),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_diffusers_converts_is_loaded_whole(kind, tmp_path):
    family, state_of = FORMATS[kind]
    pipe = getattr(tiny_pipelines, family)()
    state = state_of(pipe)
    save_file(state, tmp_path / "file.safetensors")
    load_lora(pipe, str(tmp_path / "file.safetensors"))
    fused = 4 * sum("qkv" in name and "alpha" not in name for name in state) // 2  # into three
    assert len(set(_loaded(pipe))) == sum("alpha" not in n for n in state) + fused


FOREIGN = [
    (kind, family)
    for kind in ("sd kohya", "sdxl kohya", "sd3 peft", "flux kohya")
    for family in ("sd", "sdxl", "sd3", "flux")
    if not kind.startswith(f"{family} ")
]


@pytest.mark.parametrize(("kind", "family"), FOREIGN)
def test_a_lora_of_another_family_is_refused(kind, family, tmp_path):
    own, state_of = FORMATS[kind]
    save_file(state_of(getattr(tiny_pipelines, own)()), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"the LoRA .*file\.safetensors"):
        load_lora(getattr(tiny_pipelines, family)(), str(tmp_path / "file.safetensors"))


def tuned(folder, name="tiny-sd"):
    """A LoRA as our trainers write it; returns its file."""
    pipe = tiny.load(name)
    part = part_of(pipe)
    network = getattr(pipe, part)
    lora.attach(network, targets_of(network), 2, 2, torch.Generator().manual_seed(0))
    return lora.save(type(pipe), part, network, folder)


def test_what_fits_is_counted_and_the_rest_named(tmp_path):
    tuned(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit StableDiffusion3Pipeline") as caught:
        loading.load_pipeline("tiny-sd3", torch.float32, str(tmp_path))
    said = str(caught.value)
    assert all(x in said for x in (str(tmp_path), "0 of its 64 tensors", "unet.down_blocks.1"))


def test_a_single_tensor_that_finds_no_place_is_refused(tmp_path):
    pipe = tiny_pipelines.sd()
    more = pair((4, 4), "unet.no.such.layer.lora_A.weight", "unet.no.such.layer.lora_B.weight")
    state = {n: v for n, v in of_peft(pipe).items() if n.startswith("unet.")}
    save_file(state | more, tmp_path / "file.safetensors")
    fits = f"{len(state)} of its {len(state) + 2} tensors .* but unet.no.such.layer.lora_A"
    with pytest.raises(ValueError, match=fits):
        load_lora(pipe, str(tmp_path / "file.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_with_a_number_that_is_not_finite_is_refused(tmp_path, value):
    pipe = tiny_pipelines.sd()
    state = of_peft(pipe)
    name = next(iter(state))
    state[name][0, 0] = value
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=f"the LoRA .* not finite in 1 of .* such as {name}"):
        load_lora(pipe, str(tmp_path / "file.safetensors"))


def test_a_magnitude_that_diffusers_leaves_out_is_refused(tmp_path):
    pipe = tiny_pipelines.sd()
    state = of_sd_kohya(pipe)
    stem = next(iter(state)).partition(".")[0]
    save_file(state | {f"{stem}.dora_scale": torch.ones(1, 4)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="dora_scale"):
        load_lora(pipe, str(tmp_path / "file.safetensors"))


def test_what_holds_nothing_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    for name, content in (("zero.safetensors", b""), ("junk.safetensors", b"x" * 99)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "junk.bin").write_bytes(b"x" * 99)
    (tmp_path / "none").mkdir()
    for name in ("empty.safetensors", "zero.safetensors", "junk.safetensors", "junk.bin", "none"):
        with pytest.raises(ValueError, match=f"the LoRA .*{name}") as caught:
            load_lora(tiny_pipelines.sd(), str(tmp_path / name))
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "  "])
def test_a_lora_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match=r"the LoRA is .*: name a folder, a file or a hub id"):
        check_lora(name)
    with pytest.raises(ValueError, match="the LoRA is"):
        loading.load_pipeline("tiny-sd", torch.float32, name)


def test_a_folder_of_several_is_no_guess(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds a\.safetensors, b\.safetensors: name one"):
        check_lora(str(tmp_path))


def test_a_class_without_a_loader_takes_its_own_lora_and_no_other(tmp_path):
    pipe = tiny_pipelines.pixart()
    network = pipe.transformer
    weights = lora.attach(network, targets_of(network), 2, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(0.1)
    lora.save(type(pipe), "transformer", network, tmp_path)
    fresh = tiny_pipelines.pixart()
    load_lora(fresh, str(tmp_path))
    ours, theirs = lora.parameters(network), lora.parameters(fresh.transformer)
    assert len(ours) == len(theirs)
    assert all((value == 0.1).all() for value in theirs.values())
    own = [name for name, _ in tiny_pipelines.pixart().transformer.named_parameters()]
    for _ in range(2):  # as rollouts do that follow a training run
        unload_lora(fresh)
        assert [name for name, _ in fresh.transformer.named_parameters()] == own
        load_lora(fresh, str(tmp_path))
        assert len(lora.parameters(fresh.transformer)) == len(ours)
    other = tuned(tmp_path / "other")  # of Stable Diffusion
    with pytest.raises(ValueError, match="was not saved for PixArtAlphaPipeline"):
        load_lora(tiny_pipelines.pixart(), str(other))
    state = load_file(tmp_path / lora.FILE)
    name = next(iter(state))
    state[name] = state[name][:1].clone()
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="was not saved for PixArtAlphaPipeline"):
        load_lora(tiny_pipelines.pixart(), str(tmp_path / "cut.safetensors"))
