"""HPSv3 (Ma et al. 2025): human preference, by a Qwen2-VL with a ranking head, from transformers.

    a folder          HPSv3.safetensors, and Qwen2-VL's tokenizer or else that of the hub
    a file            the same
    org/name          a hub repository, MizzenAI/HPSv3; the tokenizer is Qwen2-VL-7B-Instruct's
    random:<seed>     a small untrained model, for tests

Legend: n images, k image tokens, l tokens after the image, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice
from ..evaluation_cache import shared
from ..towers.checkpoints import fetch, fit, local, moved, read_state
from ..towers.model_cache import loaded_once
from ..towers.qwen2_vl import patches
from ..towers.sources import randomise, seed_of
from ..towers.transformers_clip import load_tokenizer
from .base import Card, NetworkReward

__all__ = ["BEFORE", "CONFIG", "QUESTION", "Hpsv3Reward", "Network", "Tokens"]

FILES = ("HPSv3.safetensors", "model.safetensors", "final_model.pth")
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
REWARD = "<|Reward|>"  # the only token that Qwen2-VL's tokenizer does not have
PIXELS = 256 * 28 * 28  # about 256 image tokens
IGNORED = (r"lm_head\.",)  # predicts the next token
# Qwen2-VL-7B as transformers describes it, with the vocabulary cut to the tokenizer and REWARD
CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 151658,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": None,  # these are for generation only
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "quick_gelu",
    },
}
RANDOM_CONFIG: dict[str, Any] = {
    "text_config": {
        **CONFIG["text_config"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3],
        },
    },
    "vision_config": {
        **CONFIG["vision_config"],
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 8,
    },
}
# The conversation, as Qwen2-VL's chat template writes it, up to the image, and from there to the
# token whose features are scored. Attention is causal, so what follows that token changes nothing.
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
# exactly as in training, with its spaces (data_collator_qwen.py of MizzenAI/HPSv3, MIT licence)
QUESTION = (
    "<|vision_end|>\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment "
    "and give a overall score to estimate the human preference. Please provide a rating from 0 to "
    "10, with 0 being the worst and 10 being the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The environment "
    "should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict "
    "with or distort the original description.\n"
    "Textual prompt - {text_prompt}\n\n\n\n"
    f"Please provide the overall ratings of this image: {REWARD}"
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Tokens:
    """The tokens of the conversation: those before the image, and those after it for a prompt.

    `encode` is a tokenizer that knows `REWARD`, and `reserved` its control tokens, which a prompt
    must not contain.
    """

    def __init__(self, encode: Callable[[str], list[int]], reserved: Iterable[str]) -> None:
        self.reserved = tuple(reserved)
        self.before = torch.tensor([encode(BEFORE)])
        self._row = lru_cache(maxsize=4096)(
            lambda prompt: torch.tensor(encode(QUESTION.replace("{text_prompt}", prompt)))
        )

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens after the image (n, l), padded on the right, and their number (n,)."""
        rows = [self._row(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


class Network(nn.Module):
    """Qwen2-VL without its head for text, and the ranking head, with the published names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        super().__init__()
        whole = Qwen2VLModel(Qwen2VLConfig.from_dict(dict(config)))
        self.visual: Any = whole.visual
        self.model: Any = whole.language_model
        self.rm_head = nn.Sequential(
            nn.Linear(config["text_config"]["hidden_size"], 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def look(self, images: Tensor, pixels: int) -> Tensor:
        """Image tokens (n, k, d) of images (n, 3, h, w) in [0, 1] of any size."""
        rows, grid = patches(images, self.visual.config.patch_size, pixels)
        seen = self.visual(rows.to(self.visual.dtype), grid_thw=grid).pooler_output
        return seen.view(len(images), -1, seen.shape[-1])

    def rate(self, seen: Tensor, before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
        """Mean and log standard deviation (n, 2), float32, of the score's distribution.

        Args:
            seen: Image tokens (n, k, d), from `look`.
            before: Tokens before the image (1, any).
            after, lengths: Tokens after it (n, l) and their number (n,), from `Tokens`.
        """
        embed = self.model.get_input_embeddings()
        start = embed(before).expand(len(seen), -1, -1)
        x = torch.cat([start, seen.to(start.dtype), embed(after)], dim=1)
        # The authors' code passes embeddings only, for which Qwen2-VL counts all tokens alike: the
        # image's have no positions in two dimensions. Padding is behind all that is scored.
        places = torch.arange(x.shape[1], device=x.device).expand(3, len(x), -1)
        h = self.model(inputs_embeds=x, position_ids=places, use_cache=False).last_hidden_state
        last = before.shape[1] + seen.shape[1] + lengths - 1
        with torch.autocast(x.device.type, enabled=False):
            return self.rm_head(h[torch.arange(len(h), device=h.device), last].float())


@dataclass(eq=False)
class Scorer:
    """A frozen network with its tokens; `pixels` is the number of pixels of a resized image."""

    network: Network
    tokens: Tokens
    pixels: int


class Hpsv3Reward(NetworkReward):
    """Human preference for an image, given its prompt (Ma et al. 2025, "HPSv3").

    A Qwen2-VL-7B reads the image and then a question with the prompt, and a head on the last token
    gives the mean and the standard deviation of a normal distribution. The score is the mean, as
    in the authors' code. The probability that one image of a prompt is preferred to another is the
    mean of sigmoid(z) over the difference z of their distributions. As in the authors' code, an
    image is resized to about 448 x 448 pixels, with its ratio kept, and all tokens are numbered in
    a row, not the image's in two dimensions. Pixels are rounded to bytes, and gradients pass as if
    they were not.

    Args:
        source: The weights, see the module docstring.
        dtype: bfloat16, as the authors compute, or float32. The head is always float32.
        batch_size: Number of images evaluated at once.
        device: Device of the model; None follows the images.
    """

    title = "HPSv3"
    card = Card(
        weights="MizzenAI/HPSv3",
        size="31 GB (15.5 GB in bfloat16, the default)",
        licence="unknown (the code is MIT, Qwen2-VL-7B Apache-2.0)",
        range="unbounded; averages of models: 10 (FLUX.1-dev), 8 (SDXL), 0 (SD 2)",
        citation="Ma et al. 2025, HPSv3: Towards Wide-Spectrum Human Preference Score, "
        "arXiv:2508.03789",
    )

    def __init__(
        self,
        source: str = "MizzenAI/HPSv3",
        dtype: str = "bfloat16",
        *,
        batch_size: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the HPSv3 dtype", dtype, DTYPES)
        super().__init__("hpsv3", source=source, dtype=dtype, batch_size=batch_size, device=device)
        seed = seed_of(source)
        load = partial(_published, source) if seed is None else partial(_random, seed)
        self.scorer = loaded_once(
            f"hpsv3 {dtype}", source, device, lambda: _frozen(load(), DTYPES[dtype])
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts with control tokens of the model."""
        for prompt in prompts:
            for token in self.scorer.tokens.reserved:
                if token in prompt:
                    raise ValueError(
                        f"the prompt {prompt!r:.200} holds {token!r}, a control token of HPSv3; "
                        "leave it out"
                    )

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        self.check(prompts)
        network, size = moved(self.scorer.network, device), self.batch_size

        def look() -> Tensor:
            chunks = images.split(size)
            return torch.cat([network.look(x.to(device), self.scorer.pixels) for x in chunks])

        seen = shared(network, images, look)
        before = self.scorer.tokens.before.to(device)
        scores = []
        for i in range(0, len(prompts), size):
            after, lengths = (x.to(device) for x in self.scorer.tokens(prompts[i : i + size]))
            scores.append(network.rate(seen[i : i + size], before, after, lengths)[:, 0])
        return torch.cat(scores)


def _frozen(scorer: Scorer, dtype: torch.dtype) -> Scorer:
    """Freeze a network and convert it to a dtype, except for its head.

    The authors convert the frequencies of the position embeddings too, in training as well, so
    those are rounded to bfloat16 whatever the dtype is.
    """
    network = scorer.network.requires_grad_(False).eval()
    for part in (network.visual, network.model):
        for frequencies in part.buffers():
            frequencies.copy_(frequencies.bfloat16())
        part.to(dtype)
    network.rm_head.float()
    return scorer


def _published(source: str) -> Scorer:
    from accelerate import init_empty_weights

    path = fetch(source, *FILES)
    tokens = _tokens(source, path.parent)
    with init_empty_weights():  # allocates nothing for parameters
        network = Network(CONFIG)
    fit(network, read_state(path), path, ignore=IGNORED, assign=True)
    return Scorer(network, tokens, PIXELS)


def _tokens(source: str, folder: Path) -> Tokens:
    """Return the tokens by the tokenizer beside local weights, or else by that of the hub."""
    beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    place = str(folder) if local(source).exists() and beside else TOKENIZER
    try:
        tokenizer = load_tokenizer(place)
    except ValueError as error:
        raise ValueError(
            f"HPSv3 needs Qwen2-VL's tokenizer, which could not be loaded from {place}; put "
            f"tokenizer.json and tokenizer_config.json of {TOKENIZER} beside its weights"
        ) from error
    tokenizer.add_tokens([REWARD], special_tokens=True)
    wanted = CONFIG["text_config"]["vocab_size"]
    if len(tokenizer) != wanted:
        raise ValueError(
            f"the tokenizer of {place} has {len(tokenizer)} tokens with {REWARD} but HPSv3 has "
            f"{wanted}; take that of {TOKENIZER}"
        )
    return Tokens(lambda text: tokenizer(text).input_ids, tokenizer.get_added_vocab())


def _random(seed: int) -> Scorer:
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for word, _ in split.pre_tokenize_str(BEFORE + QUESTION)}
    pieces = sorted(words | set(split.alphabet()))
    core = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces]))  # prefers few pieces
    core.pre_tokenizer = split
    reserved = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", REWARD]
    core.add_special_tokens(reserved)
    text = RANDOM_CONFIG["text_config"] | {"vocab_size": core.get_vocab_size()}
    network = randomise(Network({**RANDOM_CONFIG, "text_config": text}), seed)
    return Scorer(network, Tokens(lambda text: core.encode(text).ids, reserved), 16 * 16 * 16)
