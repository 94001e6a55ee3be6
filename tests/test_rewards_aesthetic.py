"""Aesthetic heads: the published files' numbers, their algebra, and the tower's."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_folders import pictures
from safetensors.torch import save_file

import rewards
from rewards.evaluation_cache import sharing
from rewards.images import resize, to_images
from rewards.models import aesthetic
from rewards.models.aesthetic import AestheticHead, AestheticReward, collapse, head_of
from rewards.towers import dual_encoder
from rewards.towers.checkpoints import read_state
from rewards.towers.sources import open_source, randomise

DATA = Path(__file__).parents[2] / "shared" / "data" / "aesthetic"
PUBLISHED = pytest.mark.skipif(not DATA.is_dir(), reason="the published heads are not here")
V2, RELU = "sac+logos+ava1-l14-linearMSE.pth", "ava+logos-l14-reluMSE.pth"
V1 = {name: f"sa_0_4_vit_{name}_linear.pth" for name in ("l_14", "b_32", "b_16")}
PROMPTS = ["a red circle"] * 4


def head(name: str) -> Any:
    return head_of(read_state(DATA / name), name)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@PUBLISHED
@pytest.mark.parametrize(
    ("name", "low", "high"), [(V1["l_14"], -2.457909, 11.304426), (V2, 1.655480, 5.746761)]
)
def test_published_heads_give_the_golden_numbers(name, low, high):
    x = torch.stack(
        [torch.from_numpy(np.load(DATA / f"rating{i}.npy")).float().flatten() for i in (0, 9)]
    )
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2), atol=1e-3, rtol=0)
    found = head(name)(x).squeeze(-1)
    torch.testing.assert_close(found, torch.tensor([low, high]), atol=1e-5, rtol=1e-5)


@PUBLISHED
def test_version_2_on_vectors_with_known_answers():
    x = torch.zeros(3, 768)
    x[1, 0], x[2] = 1, 768**-0.5
    wanted = torch.tensor([5.236646, 4.545052, 4.883285])
    torch.testing.assert_close(head(V2)(x).squeeze(-1), wanted, atol=2e-6, rtol=0)
    plane = collapse(head(V2))
    assert plane is not None
    assert plane[0].norm().item() == pytest.approx(17.99562477643365, rel=1e-9)
    assert plane[1].item() == pytest.approx(5.236645844819847, rel=1e-9)


@PUBLISHED
def test_published_files_are_told_apart_by_their_keys():
    sizes = {V2: 927_969, RELU: 927_969, V1["l_14"]: 769, V1["b_32"]: 513, V1["b_16"]: 513}
    for name, parameters in sizes.items():
        assert count(head(name)) == parameters
    assert collapse(head(RELU)) is None
    assert isinstance(head(V1["b_32"]), torch.nn.Linear)


@PUBLISHED
def test_the_relu_head_is_what_its_keys_say():
    state, x = read_state(DATA / RELU), F.normalize(torch.randn(5, 768, generator=seeded(0)), dim=1)
    wanted = x
    for key in (0, 3, 6, 9, 11):
        wanted = wanted @ state[f"layers.{key}.weight"].T + state[f"layers.{key}.bias"]
        wanted = wanted.relu() if key < 11 else wanted
    torch.testing.assert_close(head(RELU)(x), wanted, atol=1e-5, rtol=1e-5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_head_without_activations_is_affine():
    made = randomise(AestheticHead(96), 4)
    for layer in made.get_submodule("layers").children():
        if isinstance(layer, torch.nn.Linear):
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=seeded(len(layer.bias))))
    x = torch.randn(8, 96, generator=seeded(1))
    plane = collapse(made)
    assert plane is not None
    wanted = (x.double() @ plane[0] + plane[1]).float()
    torch.testing.assert_close(made(x).squeeze(-1), wanted, atol=1e-5, rtol=1e-5)
    assert list(made.state_dict())[::2] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]
    keys = list(AestheticHead(8, relu=True).state_dict())
    assert keys[::2] == [f"layers.{i}.weight" for i in (0, 3, 6, 9, 11)]


def test_scores_are_the_head_on_unit_embeddings(tmp_path):
    made = randomise(AestheticHead(32, relu=True), 4)
    torch.save(made.state_dict(), tmp_path / "mine.pth")
    shown = to_images(pictures(4, 32, 32))
    pair = open_source("random:7")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pair.mean, pair.std))
    embedding: Any = pair.model
    with torch.no_grad():
        embedding = embedding.encode_image((shown - mean) / std, normalize=True)
        wanted = made(embedding).squeeze(-1)
    reward = AestheticReward(str(tmp_path / "mine.pth"), "random:7")
    torch.testing.assert_close(reward(shown, PROMPTS), wanted, atol=1e-5, rtol=1e-5)
    tenth = AestheticReward(str(tmp_path / "mine.pth"), "random:7", "vbench")
    torch.testing.assert_close(tenth(shown, PROMPTS), wanted / 10, atol=1e-5, rtol=1e-5)
    assert reward.range == (None, None)
    assert wanted.std() > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(shown, PROMPTS).dtype == torch.float32


def test_the_range_of_a_linear_head_is_what_unit_vectors_reach(tmp_path):
    state = {"weight": torch.zeros(1, 32), "bias": torch.tensor([5.0])}
    state["weight"][0, :2] = torch.tensor([3.0, 4.0])
    save_file(state, tmp_path / "aesthetic.safetensors")
    assert AestheticReward(str(tmp_path), "random:0").range == (pytest.approx(0), pytest.approx(10))
    tenth = AestheticReward(str(tmp_path), "random:0", "vbench")
    assert tenth.range == (pytest.approx(0), pytest.approx(1))


def test_the_tower_is_shared_with_clip(monkeypatch):
    reward = rewards.load("clip(random:0) + aesthetic(random:0)")
    pair = reward.parts[0].reward.towers
    assert reward.parts[1].reward.towers is pair
    seen = []
    encode = pair.encode_image
    monkeypatch.setattr(pair, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    images = to_images(pictures(4, 40, 40)).mul(0.8).add(0.1).requires_grad_()
    with sharing():
        total = reward(images, PROMPTS)
    assert seen == [4]
    assert torch.autograd.grad(total.sum(), images)[0].abs().amax((1, 2, 3)).min() > 0


@PUBLISHED
def test_a_head_knows_the_tower_it_was_trained_on(monkeypatch, tmp_path):
    asked = []

    def tower(source: str, device: Any) -> Any:
        asked.append(source)
        return SimpleNamespace(width=768 if "L-14" in source else 512)

    monkeypatch.setattr(aesthetic, "towers", tower)
    for name in (V2, RELU, *V1.values()):
        AestheticReward(str(DATA / name))
    assert asked == ["ViT-L-14/openai"] * 3 + ["ViT-B-32/openai", "ViT-B-16/openai"]
    with pytest.raises(ValueError, match=r"768 numbers but the CLIP ViT-B-32/openai gives 512"):
        AestheticReward(str(DATA / V2), "ViT-B-32/openai")
    changed = read_state(DATA / V1["b_32"])
    torch.save({**changed, "bias": changed["bias"] + 1}, tmp_path / V1["b_32"])
    with (
        pytest.warns(UserWarning, match="SHA-256 differs"),
        pytest.raises(ValueError, match=r"512 numbers and does not say.*clip=ViT-B-32"),
    ):
        AestheticReward(str(tmp_path))
    shutil.copy(DATA / V1["b_16"], tmp_path / "renamed.pth")
    AestheticReward(str(tmp_path / "renamed.pth"))
    assert asked[-1] == "ViT-B-16/openai"
    shutil.copy(DATA / V2, tmp_path)  # of several in a folder, version 2
    assert AestheticReward(str(tmp_path)).range == (
        pytest.approx(-12.75898),
        pytest.approx(23.23227),
    )


def test_a_head_of_another_width_than_the_tower_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1, 48), "bias": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="embeddings of 48 numbers but the CLIP random:0 gives 32"):
        AestheticReward(str(tmp_path / "h.safetensors"), "random:0")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"fc.weight": (1, 4), "fc.bias": (1,)},
            r"not an aesthetic head: it holds fc.weight, fc",
        ),
        ({"visual.transformer.resblocks.0.x": (1,)}, "looks like an open_clip model"),
        (
            {"layers.0.weight": (1024, 8)},
            r"lacks layers.0.bias, layers.2.weight, layers.2.bias and",
        ),
        (
            {"scoring_head.0.weight": (1024, 8), "scoring_head.7.bias": (1,)},
            r"lacks scoring_head.0.bias, scoring_head.2.weight, scoring_head.2.bias and",
        ),
        ({"scoring_head.0.bias": (1024,)}, "looks like an aesthetic head, version 2.5"),
        ({"weight": (2, 8), "bias": (2,)}, r"misshapen weight \(2, 8\) for \(1, 8\)"),
    ],
)
def test_other_checkpoints_are_refused_by_name(state, message):
    with pytest.raises(ValueError, match=message):
        head_of({key: torch.zeros(shape) for key, shape in state.items()}, "that file")


V25 = DATA / "aesthetic_predictor_v2_5.pth"


@pytest.mark.skipif(not V25.is_file(), reason="the published file is not here")
def test_version_25_is_affine_with_these_numbers():
    plane = collapse(head(V25.name))
    assert plane is not None
    assert plane[0].norm().item() == pytest.approx(25.452311294055384, rel=1e-9)
    assert plane[1].item() == pytest.approx(1.9390382943099373, rel=1e-9)


def mlp(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """discus0434's head, without its dropouts."""
    for key in (0, 2, 4, 6, 8):
        x = F.linear(x, state[f"scoring_head.{key}.weight"], state[f"scoring_head.{key}.bias"])
    return x.squeeze(-1)


@pytest.fixture(scope="module")
def version_25(tmp_path_factory) -> tuple[Path, Path, Any, Any, dict[str, torch.Tensor]]:
    """A SigLIP and a head of random weights: their files, model, processor, the head's weights.

    The published tower has an image of 384 pixels, which is no multiple of its patch of 14 either.
    """
    from test_rewards_siglip import tokenizer
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    folder = tmp_path_factory.mktemp("siglip25")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": 10, "max_position_embeddings": 8}
    vision = shared | {"image_size": 37, "patch_size": 7}
    tower: Any = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 9)
    tower.logit_bias.fill_(-1.0)
    tower.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": 37, "width": 37}, resample=3)
    processor.save_pretrained(folder)
    made = randomise(AestheticHead(32, kind="scoring_head"), 4)
    state = {
        k: torch.randn(v.shape, generator=seeded(i))
        for i, (k, v) in enumerate(made.state_dict().items())
    }
    state = {k: (v * v[0].numel() ** -0.5).bfloat16() for k, v in state.items()}
    torch.save(state, folder / "aesthetic_predictor_v2_5.pth")
    return folder, folder / "aesthetic_predictor_v2_5.pth", tower, processor, state


@pytest.mark.parametrize("size", [(37, 37), (61, 84), (20, 150), (5, 3), (1, 1), (500, 333)])
@pytest.mark.filterwarnings("ignore:.*not the file that was published")
def test_version_25_is_its_formula_on_the_tower_of_transformers(version_25, size, monkeypatch):
    folder, file, tower, processor, state = version_25
    shown = pictures(4, *size)
    with torch.no_grad():
        seen = tower.vision_model(processor(shown, return_tensors="pt").pixel_values).pooler_output
        wanted = mlp(
            {k: v.float() for k, v in state.items()}, seen / seen.norm(dim=-1, keepdim=True)
        )
    reward = AestheticReward(str(file), str(folder))
    assert wanted.std() > 1e-3  # else closeness would say little
    monkeypatch.setattr(dual_encoder, "resize", partial(resize, exact=True))
    torch.testing.assert_close(reward(to_images(shown), PROMPTS), wanted, atol=1e-5, rtol=1e-5)
    plane = collapse(reward.head)
    assert plane is not None
    low, high = (plane[1] - plane[0].norm(), plane[1] + plane[0].norm())
    assert reward.range == (pytest.approx(low.item()), pytest.approx(high.item()))


@pytest.mark.filterwarnings("ignore:.*not the file that was published")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_gradients_of_version_25_are_those_of_its_formula(version_25, autocast):
    folder, file, tower, _, state = version_25
    images = to_images(pictures(2, 37, 37)).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = AestheticReward(str(file), str(folder))(images, PROMPTS[:2])
        (ours,) = torch.autograd.grad(scores.sum(), images)
        seen = tower.vision_model((images - 0.5) / 0.5).pooler_output.float()
    unit = seen / seen.norm(dim=-1, keepdim=True)
    wanted = mlp({k: v.float() for k, v in state.items()}, unit)
    (theirs,) = torch.autograd.grad(wanted.sum(), images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
    assert theirs.abs().amax((1, 2, 3)).min() > 1e-5
    far = 0.05 if autocast else 1e-4  # roundings to 2^-9 in two layers, forward and backward
    torch.testing.assert_close(ours, theirs, atol=far * theirs.abs().max().item(), rtol=far)


def test_version_25_knows_its_keys_and_its_tower(version_25, monkeypatch):
    asked = []
    monkeypatch.setattr(
        aesthetic, "towers", lambda *given: asked.append(given[0]) or SimpleNamespace(width=1152)
    )
    keys = list(AestheticHead(8, kind="scoring_head").state_dict())
    assert keys[::2] == [f"scoring_head.{i}.weight" for i in (0, 2, 4, 6, 8)]
    assert count(AestheticHead(1152, kind="scoring_head")) == 1_321_185
    monkeypatch.setattr(
        aesthetic, "read_state", lambda path: AestheticHead(1152, kind=aesthetic.V25).state_dict()
    )
    with pytest.warns(UserWarning, match="not the file that was published"):
        AestheticReward(str(version_25[1]))
    assert asked == ["google/siglip-so400m-patch14-384"]


def test_the_embedded_head_sits_on_the_embedded_clip(monkeypatch, tmp_path):
    monkeypatch.setattr(aesthetic, "TINY", tmp_path / "aesthetic.safetensors")
    with pytest.raises(ValueError, match=r"missing at .*give a file"):
        AestheticReward("tiny")
    save_file({"weight": torch.ones(1, 64), "bias": torch.zeros(1)}, aesthetic.TINY)
    reward = AestheticReward("tiny")
    assert reward.towers is rewards.load("clip(tiny)").parts[0].reward.towers
    assert reward(to_images(pictures(4, 64, 64)), PROMPTS).std() > 0


def test_the_default_is_fetched_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def find(source, *names):
        asked.append((source, names))
        return tmp_path / "none.pth"

    monkeypatch.setattr(aesthetic, "fetch", find)
    with pytest.raises(FileNotFoundError):
        AestheticReward()
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", aesthetic.FILES)]
    with pytest.raises(ValueError, match="did you mean 'raw'"):
        AestheticReward("random:0", scale="row")
