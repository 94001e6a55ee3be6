"""ImageReward against a plain reimplementation that has the published file's names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import rewards
from rewards.evaluation_cache import sharing
from rewards.images import to_images
from rewards.models import imagereward
from rewards.models.imagereward import (
    IGNORED,
    MEAN,
    PUBLISHED,
    STD,
    ImageRewardReward,
    Network,
    Sizes,
    WordPieces,
    renamed,
)
from rewards.towers.checkpoints import fit

WORDS = ["a", "red", "circle", "two", "star", "##s", "##fish", ",", "cafe", "東", "9", "##9"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SMALL = Sizes(32, 8, 128, 2, 128, 2, len(VOCABULARY) + 2)
PROMPTS = ["a red circle", "two stars, a starfish and a red red star", "a"]


def heads(x: Tensor) -> Tensor:
    """(n, l, d) -> (n, d/64, l, 64)."""
    return x.unflatten(-1, (-1, 64)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    weights = (heads(q) @ heads(k).transpose(-1, -2) / math.sqrt(64) + bias).softmax(-1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


def tree(**parts: Any) -> nn.ModuleDict:
    return nn.ModuleDict({k: tree(**v) if isinstance(v, dict) else v for k, v in parts.items()})


def norm(width: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps)


def vision_of(sizes: Sizes) -> nn.ModuleDict:
    """timm's ViT."""
    w = sizes.vision_width

    def block() -> nn.ModuleDict:
        return tree(
            norm1=norm(w, 1e-6),
            attn={"qkv": nn.Linear(w, 3 * w), "proj": nn.Linear(w, w)},
            norm2=norm(w, 1e-6),
            mlp={"fc1": nn.Linear(w, 4 * w), "fc2": nn.Linear(4 * w, w)},
        )

    vision = tree(
        patch_embed={"proj": nn.Conv2d(3, w, sizes.patch, sizes.patch)},
        blocks=nn.ModuleList([block() for _ in range(sizes.vision_depth)]),
        norm=norm(w, 1e-6),
    )
    positions = (sizes.image // sizes.patch) ** 2 + 1
    vision.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, w)))
    vision.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, positions, w)))
    return vision


def text_of(sizes: Sizes) -> nn.ModuleDict:
    """BERT with cross-attention."""
    w, d = sizes.vision_width, sizes.text_width

    def attention(source: int) -> dict[str, Any]:
        inner = {
            "query": nn.Linear(d, d),
            "key": nn.Linear(source, d),
            "value": nn.Linear(source, d),
        }
        return {"self": inner, "output": {"dense": nn.Linear(d, d), "LayerNorm": norm(d, 1e-12)}}

    def layer() -> nn.ModuleDict:
        return tree(
            attention=attention(d),
            crossattention=attention(w),
            intermediate={"dense": nn.Linear(d, 4 * d)},
            output={"dense": nn.Linear(4 * d, d), "LayerNorm": norm(d, 1e-12)},
        )

    embeddings = tree(
        word_embeddings=nn.Embedding(sizes.vocabulary, d),
        position_embeddings=nn.Embedding(512, d),
        LayerNorm=norm(d, 1e-12),
    )
    embeddings.register_buffer("position_ids", torch.arange(512)[None])
    layers = nn.ModuleList([layer() for _ in range(sizes.text_depth)])
    return tree(embeddings=embeddings, encoder={"layer": layers})


class Reference(nn.Module):
    """The published architecture: timm's ViT, BERT with cross-attention, an affine MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d = sizes.text_width
        self.blip = tree(
            visual_encoder=vision_of(sizes),
            text_encoder=text_of(sizes),
            vision_proj=nn.Linear(sizes.vision_width, 256),
            text_proj=nn.Linear(d, 256),
        )
        widths = [1024, None, 128, None, 64, None, 16, 1]
        steps: list[nn.Module] = []
        for width in widths:
            steps.append(nn.Dropout(0.2) if width is None else nn.Linear(d, width))
            d = width or d
        self.mlp = tree(layers=nn.Sequential(*steps))

    def look(self, pixels: Tensor) -> Tensor:
        tower: Any = self.blip["visual_encoder"]
        x = tower["patch_embed"]["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([tower.cls_token.expand(len(x), -1, -1), x], 1) + tower.pos_embed
        for block in tower["blocks"]:
            qkv = block["attn"]["qkv"](block["norm1"](x)).chunk(3, dim=-1)
            x = x + block["attn"]["proj"](attend(*qkv))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return tower["norm"](x)

    def read(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        tower: Any = self.blip["text_encoder"]
        embeddings = tower["embeddings"]
        x = embeddings["word_embeddings"](ids)
        x = x + embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = embeddings["LayerNorm"](x)
        hidden = (1 - mask[:, None, None].float()) * -10000.0
        for layer in tower["encoder"]["layer"]:
            for name, source, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
                part, keys = layer[name], x if source is None else source
                inner = part["self"]
                y = attend(inner["query"](x), inner["key"](keys), inner["value"](keys), bias)
                x = part["output"]["LayerNorm"](x + part["output"]["dense"](y))
            y = layer["output"]["dense"](F.gelu(layer["intermediate"]["dense"](x)))
            x = layer["output"]["LayerNorm"](x + y)
        return x

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.read(self.look(pixels), ids, mask)[:, 0]
        return self.mlp["layers"](h)[:, 0]


@pytest.fixture(scope="module")
def reference() -> Reference:
    model = Reference(SMALL).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        width = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        noise = torch.randn(parameter.shape, generator=generator) * width
        parameter.data = noise + ("orm" in name and name.endswith("weight"))
    return model


@pytest.fixture
def folder(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(imagereward, "PUBLISHED", SMALL)
    torch.save(reference.state_dict(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return tmp_path


def pictures(n: int, height: int = 32, width: int = 32) -> Tensor:
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(7))
    return (x * 255).round() / 255


def test_the_published_model_has_446_665_953_parameters():
    with torch.device("meta"):
        ours, published = Network(PUBLISHED), Reference(PUBLISHED)
    count = sum(p.numel() for p in published.parameters())
    assert count == 446_665_953
    projections = sum(
        p.numel() for name, p in published.named_parameters() if "vision_proj" in name
    ) + sum(p.numel() for name, p in published.named_parameters() if "text_proj" in name)
    assert projections == 459_264
    assert sum(p.numel() for p in ours.parameters()) == count - projections
    parts = [ours.blip["visual_encoder"], ours.blip["text_encoder"], ours.mlp]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [303_301_632, 141_977_088, 927_969]


def test_every_key_of_the_published_file_is_explained():
    with torch.device("meta"):
        ours, published = Network(PUBLISHED), Reference(PUBLISHED).state_dict()
    assert "blip.visual_encoder.blocks.23.attn.qkv.weight" in published
    assert "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight" in published
    assert published["blip.visual_encoder.pos_embed"].shape == (1, 197, 1024)
    fit(ours, renamed(published), "ImageReward.pt", ignore=IGNORED)
    left = {key for key in renamed(published) if key not in ours.state_dict()}
    assert left == {
        "blip.vision_proj.weight",
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
        "blip.text_encoder.embeddings.position_ids",
    }
    for extra in ("blip.visual_encoder.head.weight", "mlp.layers.9.weight"):
        with pytest.raises(ValueError, match=f"has unknown {extra}; it looks like ImageReward"):
            fit(ours, renamed({**published, extra: torch.zeros(1)}), "it", ignore=IGNORED)
    for missing in ("blip.text_encoder.encoder.layer.3.output.dense.bias", "mlp.layers.7.bias"):
        state = {key: value for key, value in published.items() if key != missing}
        with pytest.raises(ValueError, match=f"it does not match Network: it lacks {missing}"):
            fit(ours, renamed(state), "it", ignore=IGNORED)


def test_epsilons_and_activations_are_those_of_blip_and_bert():
    with torch.device("meta"):
        ours: Any = Network(PUBLISHED)
    for tower, eps in (("visual_encoder", 1e-6), ("text_encoder", 1e-12)):
        norms = [m for m in ours.blip[tower].modules() if isinstance(m, nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {eps}
        assert ours.blip[tower].config.hidden_act == "gelu"
    assert ours.blip["visual_encoder"].config.num_attention_heads == 16
    assert ours.blip["text_encoder"].config.num_attention_heads == 12


def test_a_converted_file_scores_as_the_plain_implementation(reference, folder):
    reward = ImageRewardReward(str(folder))
    images = pictures(3)
    ids, mask = reward.scorer.tokens(PROMPTS)
    assert mask.sum(1).tolist() == [5, 14, 3]
    normalize = transforms.Normalize(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    raw = reference(normalize(images), ids, mask)
    assert raw.std() > 0.05  # else closeness would say little
    torch.testing.assert_close(
        reward(images, PROMPTS), (raw - 0.16717362830052426) / 1.0333394966054072, atol=1e-5, rtol=0
    )
    ours = ImageRewardReward(str(folder / "ImageReward.pt"), "raw")(images, PROMPTS)
    torch.testing.assert_close(ours, raw, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_the_plain_implementation(reference, folder):
    reward = ImageRewardReward(str(folder), "raw")
    images = pictures(2).requires_grad_(True)
    (ours,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    normalize = transforms.Normalize(imagereward.OPENAI_MEAN, imagereward.OPENAI_STD)
    score = reference(normalize(images), *reward.scorer.tokens(PROMPTS[:2])).sum()
    (theirs,) = torch.autograd.grad(score, images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_pictures_are_resized_and_cropped_as_by_torchvision(folder):
    reward = ImageRewardReward(str(folder))
    seen = []
    tower = reward.scorer.network.blip["visual_encoder"]
    hook = tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    picture = Image.fromarray((pictures(1, 50, 77)[0] * 255).byte().permute(1, 2, 0).numpy())
    reward(to_images(picture), ["a"])
    hook.remove()
    theirs = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )(picture)
    torch.testing.assert_close(seen[0][0], theirs, atol=1.5 / 255 / 0.26, rtol=0)


def test_the_official_score_is_affine_in_the_raw_one():
    official, raw = ImageRewardReward("random:1"), ImageRewardReward("random:1", "raw")
    assert official.scorer is raw.scorer
    images = pictures(3)
    torch.testing.assert_close(
        official(images, PROMPTS), (raw(images, PROMPTS) - MEAN) / STD, atol=1e-6, rtol=0
    )
    scale = ImageRewardReward.scales["official"]
    raws = torch.tensor([0.16717362830052426, 0.16717362830052426 + 1.0333394966054072])
    torch.testing.assert_close(scale(raws), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_prompt_and_picture_both_count():
    reward = rewards.load("imagereward(random:0)")
    images = pictures(2)
    first = reward(images, ["a red circle"] * 2)
    assert (first[0] - first[1]).abs() > 1e-3
    assert (first - reward(images, ["two stars"] * 2)).abs().min() > 1e-3


def test_two_scales_look_at_the_pictures_once():
    official, raw = ImageRewardReward("random:2"), ImageRewardReward("random:2", "raw")
    calls = []
    tower = official.scorer.network.blip["visual_encoder"]
    hook = tower.register_forward_hook(lambda *args: calls.append(1))
    images = pictures(2)
    with sharing():
        official(images, PROMPTS[:2])
        raw(images, PROMPTS[:2])
    assert len(calls) == 1
    hook.remove()


def test_tokens_equal_those_of_berts_own_tokeniser(tmp_path):
    from transformers import BertTokenizer

    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    theirs: Any = BertTokenizer.from_pretrained(str(tmp_path), do_lower_case=True)
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_tokens(["[ENC]"], special_tokens=True)
    ours = WordPieces(VOCABULARY)
    assert ours.size == len(VOCABULARY) + 2
    prompts = [
        "A Red circle",
        "starfish,stars unknown",
        "Café 東東 a99",
        "tab\tand\nline \u200b a",
        "",
        "[DEC] a [ENC] red [MASK]",
        "red " * 50,
    ]
    ids, mask = ours(prompts)
    rows = theirs(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert torch.equal(ids, rows.input_ids)
    assert torch.equal(mask, rows.attention_mask)
    assert ids.shape == (7, 35)
    assert ids[5, 1] == len(VOCABULARY)
    assert ids[6, -1] == VOCABULARY.index("[SEP]")


def test_a_prompt_is_cut_at_35_tokens():
    reward = rewards.load("imagereward(random:0)")
    images = pictures(1)
    long = reward(images, ["ab" * 30])
    assert torch.equal(long, reward(images, ["ab" * 30 + "c"]))
    assert not torch.equal(long, reward(images, ["ba" * 30]))


def test_a_vocabulary_of_another_size_is_refused(folder):
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 20 tokens .* but ImageReward has 19; take vocab"):
        ImageRewardReward(str(folder))
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no \[PAD\], .* take vocab.txt of bert-base-uncased"):
        ImageRewardReward(str(folder))


def test_a_missing_vocabulary_says_where_it_belongs(folder, monkeypatch):
    def offline(source, *names):
        if source == imagereward.VOCABULARY:
            raise ValueError("no hub")
        return folder / "ImageReward.pt"

    monkeypatch.setattr(imagereward, "fetch", offline)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab.txt nor available .* put vocab.txt"):
        ImageRewardReward(str(folder))


def test_other_and_broken_checkpoints_are_refused(folder):
    path = folder / "ImageReward.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short; fetch it again"):
        ImageRewardReward(str(folder))
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"lacks blip\..* and \d+ more; it looks like a transform"):
        ImageRewardReward(str(folder))
    with pytest.raises(ValueError, match="holds none of"):
        ImageRewardReward(str(folder.parent))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"source": "random:x"}, "needs a whole number, as in random:0"),
        ({"source": 3}, "give its name as text"),
        ({"source": "random:0", "scale": "oficial"}, "did you mean 'official' of"),
        ({"source": "random:0", "batch_size": 0}, "must be a whole number, at least 1"),
        ({"source": "/nowhere/at/all"}, "neither a file, a folder that exists nor a hub id"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageRewardReward(**arguments)
