"""HPSv3 against numbers of its authors' code, and against transformers' own Qwen2-VL."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_folders import pictures
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import rewards
from rewards.evaluation_cache import sharing
from rewards.images import normalize, resize, to_images
from rewards.models import hpsv3
from rewards.models.hpsv3 import BEFORE, CONFIG, QUESTION, Hpsv3Reward, Network
from rewards.towers.dual_encoder import OPENAI_MEAN, OPENAI_STD
from rewards.towers.qwen2_vl import area_size, patches

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL += ["<|image_pad|>"]
PROMPTS = ["a red circle", "two dogs on a wall, in the rain {0} %s", "", "a star"]
SIZES = [(61, 84), (300, 513), (900, 640), (20, 700)]
DIGEST = "d2bd49bb6c77a870071f49e8dce38ce6bfc71dd2060de9a1f7a03711f3e67e45"
AFTER = "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"


def words() -> Tokenizer:
    """A small tokenizer with Qwen2-VL's control tokens but without HPSv3's own."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {word for word, _ in split.pre_tokenize_str(BEFORE + QUESTION)}
    pieces |= set(split.alphabet())
    core = Tokenizer(models.Unigram([(piece, -1.0) for piece in sorted(pieces)]))
    core.pre_tokenizer = split
    core.add_special_tokens(CONTROL)
    return core


def small_config() -> dict[str, Any]:
    text = {**hpsv3.RANDOM_CONFIG["text_config"], "vocab_size": words().get_vocab_size() + 1}
    return {
        "text_config": text,
        "vision_config": {**hpsv3.RANDOM_CONFIG["vision_config"], "patch_size": 14},
    }


def published(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of this size under the published names, the same for every library."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Network(config).state_dict().items()}
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    state = {}
    for seed, name in enumerate(sorted(shapes)):
        shape, generator = shapes[name], torch.Generator().manual_seed(seed)
        scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.2
        state[name] = torch.randn(shape, generator=generator) * scale
        if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
            state[name] += 1
    return state


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hpsv3")
    config = small_config()
    state = published(config)
    save_file(state, folder / "HPSv3.safetensors")
    PreTrainedTokenizerFast(tokenizer_object=words()).save_pretrained(folder)
    return folder, config, state


@pytest.fixture
def folder(made, monkeypatch) -> Path:
    monkeypatch.setattr(hpsv3, "CONFIG", made[1])
    return made[0]


def pictures_of(sizes: list[tuple[int, int]]) -> list[Any]:
    return [pictures(4, *size)[i] for i, size in enumerate(sizes)]


# Mean and log deviation by hpsv3 1.0.0 on transformers 4.45.2, from the same file, pictures and
# tokens: its Qwen2VLRewardModelBT loads the file with strict=True, and rounds the frequencies of
# the position embeddings by .to(bfloat16) in both runs.
AUTHORS = {
    "float32": [
        [-0.17213109, 0.69218129],
        [0.16151366, 0.27277374],
        [0.12891451, 0.73862243],
        [-0.01937293, 0.46376199],
    ],
    "bfloat16": [
        [-0.18439028, 0.67793429],
        [0.17269313, 0.27691174],
        [0.13202415, 0.73797750],
        [-0.02432341, 0.45349211],
    ],
}


# two computations in bfloat16 differ by some roundings to 2^-9, of layers whose sums are near 1
@pytest.mark.parametrize(("dtype", "far"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_scores_are_those_of_the_authors_code(folder, dtype, far):
    reward = Hpsv3Reward(str(folder), dtype)
    network, tokens = reward.scorer.network, reward.scorer.tokens
    wanted = torch.tensor(AUTHORS[dtype])
    for picture, prompt, row in zip(pictures_of(SIZES), PROMPTS, wanted, strict=True):
        images = to_images(picture)
        found = network.rate(
            network.look(images, reward.scorer.pixels), tokens.before, *tokens([prompt])
        )
        torch.testing.assert_close(found[0], row, atol=far, rtol=0)
        score = reward(images, [prompt])
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, row[:1], atol=far, rtol=0)
    assert network.visual.dtype == network.model.dtype == hpsv3.DTYPES[dtype]
    assert network.rm_head[0].weight.dtype == torch.float32


def conversation(prompt: str) -> str:
    """What Qwen2-VL's chat template makes of one message with an image and the question."""
    question = QUESTION.removeprefix("<|vision_end|>").replace("{text_prompt}", prompt)
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{question}{AFTER}"
    )


class Authors:
    """The authors' forward pass, on transformers' Qwen2VLForConditionalGeneration of today."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        self.core = words()
        self.core.add_special_tokens(["<|Reward|>"])
        ids = self.core.token_to_id
        whole = Qwen2VLConfig.from_dict({**config, "image_token_id": ids("<|image_pad|>")})
        self.whole: Any = Qwen2VLForConditionalGeneration(whole).eval()
        names = {"model.": "model.language_model.", "visual.": "model.visual."}
        renamed = {}
        for name, value in state.items():
            start = next((old for old in names if name.startswith(old)), "")
            renamed[names.get(start, "") + name.removeprefix(start)] = value
        head = {k.removeprefix("rm_head."): renamed.pop(k) for k in state if "rm_head" in k}
        self.whole.load_state_dict(renamed, strict=True)
        self.head = nn.Sequential(
            nn.Linear(64, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        ).eval()
        self.head.load_state_dict(head)
        for buffer in self.whole.buffers():
            buffer.copy_(buffer.bfloat16())

    def inputs(self, shown: list[Any], prompts: list[str]) -> tuple[Tensor, Tensor, Any]:
        from transformers import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)
        seen = processor(shown, return_tensors="pt")
        counts = (seen.image_grid_thw.prod(1) // 4).tolist()
        texts = [
            conversation(prompt).replace("<|image_pad|>", "<|image_pad|>" * count)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        rows = [torch.tensor(self.core.encode(text).ids) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # with any token
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return ids, mask, seen

    def __call__(
        self, shown: list[Any], prompts: list[str], two_dimensions: bool = False
    ) -> Tensor:
        ids, mask, seen = self.inputs(shown, prompts)
        pads, token = (ids == self.whole.config.image_token_id), self.core.token_to_id("<|Reward|>")
        grid = {"image_grid_thw": seen.image_grid_thw}
        with torch.no_grad():
            images = self.whole.model.visual(seen.pixel_values, grid_thw=seen.image_grid_thw)
            x = self.whole.get_input_embeddings()(ids)
            x = x.masked_scatter(pads.unsqueeze(-1), images.pooler_output)
            given: dict[str, Any] = {"inputs_embeds": x, "attention_mask": mask}
            if two_dimensions:
                kinds = {"mm_token_type_ids": pads.int(), "attention_mask": mask}
                given["position_ids"] = self.whole.model.get_rope_index(ids, **kinds, **grid)[0]
            hidden = self.whole.model.language_model(**given).last_hidden_state
            return self.head(hidden[ids == token])


@pytest.fixture(scope="module")
def authors(made) -> Authors:
    return Authors(made[1], made[2])


def test_a_padded_batch_scores_as_transformers_own_model(folder, authors):
    prompts = [*PROMPTS[:3], "an elephant that holds an umbrella, " * 6]
    shown = pictures(4, 75, 50)
    wanted = authors(shown, prompts)
    assert wanted[:, 0].std() > 0.01  # else closeness would say little
    reward = Hpsv3Reward(str(folder), "float32")
    found = reward(to_images(shown), prompts)
    torch.testing.assert_close(found, wanted[:, 0], atol=1e-5, rtol=1e-5)
    small = Hpsv3Reward(str(folder), "float32", batch_size=1)(to_images(shown), prompts)
    torch.testing.assert_close(small, found, atol=1e-5, rtol=1e-5)
    assert reward.scorer is Hpsv3Reward(str(folder), "float32", batch_size=3).scorer
    # positions in two dimensions, which the authors' code does not use, would be another reward
    other = authors(shown, prompts, two_dimensions=True)
    assert (other - wanted).abs().max() > 0.01


def test_the_numbers_of_the_authors_code_are_those_of_this_test_file(authors):
    pairs = zip(pictures_of(SIZES), PROMPTS, strict=True)
    found = torch.cat([authors([picture], [prompt]) for picture, prompt in pairs])
    torch.testing.assert_close(found, torch.tensor(AUTHORS["float32"]), atol=1e-4, rtol=0)


def test_the_question_is_the_published_one_to_the_letter():
    """SHA-256 of data_collator_qwen.py's INSTRUCTION and prompt, up to the scored token."""
    text = QUESTION.removeprefix("<|vision_end|>")
    assert text.startswith("\nYou are tasked")
    assert text.endswith(
        f"\n\n\n\nPlease provide the overall ratings of this image: {hpsv3.REWARD}"
    )
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_sizes_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sides = [*range(1, 40), 55, 56, 57, 199, 200, 201, 447, 448, 449]
    sides += [512, 1000, 1024, 2047, 4096, 9999]
    for height in sides:
        for width in sides:
            if max(height, width) > 200 * min(height, width):
                with pytest.raises(ValueError, match="more than 200 times as long"):
                    area_size(height, width, 28, hpsv3.PIXELS)
                continue
            found = area_size(height, width, 28, hpsv3.PIXELS)
            assert found == smart_resize(height, width, 28, hpsv3.PIXELS, hpsv3.PIXELS)
    assert area_size(1024, 1024, 28, hpsv3.PIXELS) == (448, 448)


@pytest.mark.parametrize(
    "size", [(1, 1), (5, 3), (28, 28), (61, 84), (448, 448), (447, 449), (20, 700), (1000, 1333)]
)
def test_patches_are_exactly_those_of_transformers_processor(size):
    from transformers import Qwen2VLImageProcessorPil

    shown = pictures(2, *size)
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.PIXELS, max_pixels=hpsv3.PIXELS)
    theirs = processor(shown, return_tensors="pt")
    rows, grid = patches(to_images(shown), 14, hpsv3.PIXELS)
    assert torch.equal(grid, theirs.image_grid_thw)
    torch.testing.assert_close(rows, theirs.pixel_values, atol=2e-6, rtol=0)


def test_gradients_are_those_through_the_pixels_of_the_processor(folder):
    """The gradient of the score with respect to the resized bytes, pulled back by the resize."""
    reward = Hpsv3Reward(str(folder), "float32")
    network, tokens = reward.scorer.network, reward.scorer.tokens
    images = to_images(pictures(2, 75, 50)).mul(0.5).add(0.25).requires_grad_(True)
    (ours,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    size = area_size(75, 50, 28, hpsv3.PIXELS)
    resized = resize(images.detach(), size, exact=True).requires_grad_(True)
    x = normalize(resized, OPENAI_MEAN, OPENAI_STD)
    grid = torch.tensor([[1, size[0] // 14, size[1] // 14]] * 2)
    cells = nn.functional.unfold(x, 14, stride=14).unflatten(1, (3, 1, 14, 14))
    cells = cells.expand(-1, -1, 2, -1, -1, -1).flatten(1, 4).transpose(1, 2)
    cells = cells.unflatten(1, (size[0] // 28, 2, size[1] // 28, 2)).transpose(2, 3)
    seen = network.visual(cells.flatten(0, 4), grid_thw=grid).pooler_output.unflatten(0, (2, -1))
    scores = network.rate(seen, tokens.before, *tokens(PROMPTS[:2]))[:, 0]
    (at_pixels,) = torch.autograd.grad(scores.sum(), resized)
    (theirs,) = torch.autograd.grad(resize(images, size), images, at_pixels)
    assert ours.abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-3)


def test_the_published_layout():
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = Network(CONFIG)
    shapes = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == 7_748_610_610
    # as users' reports of loading MizzenAI's file name them
    assert shapes["visual.merger.mlp.2.weight"] == (3584, 5120)
    assert shapes["model.embed_tokens.weight"] == (151658, 3584)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (3584, 3584)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (512, 3584)
    assert [name for name in shapes if "rm_head" in name] == [
        f"rm_head.{i}.{part}" for i in (0, 3, 5) for part in ("weight", "bias")
    ]
    assert {name.split(".")[0] for name in shapes} == {"visual", "model", "rm_head"}
    assert network.model.config.rope_parameters["mrope_section"] == [16, 24, 24]
    frequencies = [b for b in network.buffers() if b.is_floating_point()]
    assert all(b.device.type == "cpu" for b in frequencies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head.5.bias": None}, r"lacks rm_head.5.bias; it looks like HPSv3"),
        ({"model.norm.weight": None}, "lacks model.norm.weight"),
        ({"rm_head.7.bias": (2,)}, "has unknown rm_head.7.bias"),
        ({"model.language_model.norm.weight": (64,)}, "has unknown model.language_model.norm"),
        ({"rm_head.5.weight": (1, 16)}, r"misshapen rm_head.5.weight \(1, 16\) for \(2, 16\)"),
        (
            {f"rm_head.{i}.{p}": None for i in (0, 3, 5) for p in ("weight", "bias")},
            "lacks rm_head.0.*it looks like a Qwen2-VL",
        ),
    ],
)
def test_the_loader_takes_the_published_names_only(folder, tmp_path, change, message):
    state = load_file(folder / "HPSv3.safetensors")
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=message):
        Hpsv3Reward(str(tmp_path))


def test_a_torch_file_without_the_text_head_loads_as_well(folder, made, tmp_path):
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = {k: v.bfloat16() for k, v in made[2].items() if not k.startswith("lm_head")}
    torch.save({"model": state}, tmp_path / "HPSv3.pth")
    images = to_images(pictures(2, 40, 60))
    found = Hpsv3Reward(str(tmp_path / "HPSv3.pth"), "float32")(images, PROMPTS[:2])
    wanted = Hpsv3Reward(str(folder), "float32")(images, PROMPTS[:2])
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)  # weights of 8 bits


def test_a_tokenizer_of_another_size_is_refused(folder, monkeypatch):
    text = {**hpsv3.CONFIG["text_config"], "vocab_size": 151658}
    monkeypatch.setattr(hpsv3, "CONFIG", {**hpsv3.CONFIG, "text_config": text})
    with pytest.raises(ValueError, match=r"tokens with <\|Reward\|> but HPSv3 has 151658; take"):
        Hpsv3Reward(str(folder))


def test_weights_without_a_tokenizer_say_what_is_missing(folder, tmp_path, monkeypatch):
    def unreachable(place: str) -> None:
        raise ValueError(f"{place!r} could not be loaded from the hub")

    monkeypatch.setattr(hpsv3, "load_tokenizer", unreachable)
    (tmp_path / "HPSv3.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"could not be loaded from Qwen/Qwen2-VL-7B-Instruct; put"
    ):
        Hpsv3Reward(str(tmp_path))


@pytest.mark.parametrize("token", ["<|Reward|>", "<|im_end|>", "<|image_pad|>"])
def test_control_tokens_in_a_prompt_are_refused_before_a_run(folder, token):
    reward = rewards.load(f"hpsv3({folder})", imports=True)
    with pytest.raises(ValueError, match="a control token of HPSv3; leave it out"):
        reward.check(["a cat", f"a cat {token}"])
    with pytest.raises(ValueError, match="a control token of HPSv3; leave it out"):
        reward(torch.rand(1, 3, 8, 8), [f"a cat {token}"])
    with pytest.raises(ValueError, match="200 times as long"):
        reward(torch.rand(1, 3, 1, 201), ["a cat"])


def test_prompt_and_picture_count_and_the_picture_is_looked_at_once():
    reward = Hpsv3Reward("random:0", "float32")
    images = to_images(pictures(2, 50, 40))
    first = reward(images, ["a red circle"] * 2)
    assert (first[0] - first[1]).abs() > 1e-3
    assert (first - reward(images, ["two stars"] * 2)).abs().min() > 1e-3
    calls = []
    hook = reward.scorer.network.visual.register_forward_hook(lambda *args: calls.append(1))
    with sharing():
        reward(images, ["a red circle"] * 2)
        reward(images, ["two stars"] * 2)
    hook.remove()
    assert len(calls) == 1
