"""ImageReward (Xu et al. 2023): human preference, learned on BLIP, built from transformers.

    a folder          ImageReward.pt (or .safetensors) and BERT's vocab.txt
    a file            ImageReward.pt, with vocab.txt beside it
    org/name          a hub repository, THUDM/ImageReward; vocab.txt is bert-base-uncased's
    random:<seed>     a small untrained model, for tests

Legend: n images, p their patches and CLS token, l tokens of a prompt, d features of BERT.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..evaluation_cache import shared
from ..images import normalize
from ..towers.checkpoints import fetch, fit, local, moved, read_state
from ..towers.dual_encoder import OPENAI_MEAN, OPENAI_STD, prepare
from ..towers.model_cache import loaded_once
from ..towers.sources import randomise, seed_of
from .base import Card, NetworkReward

__all__ = ["ImageRewardReward", "Network", "Sizes", "WordPieces", "renamed"]

FILES = ("ImageReward.pt", "ImageReward.safetensors", "model.safetensors")
VOCABULARY = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens; longer prompts are truncated, as in training
HEAD = 64  # features of an attention head, in both towers
# published constants, by which scores of the authors' images have mean 0 and standard deviation 1
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# keys that the score does not need: heads of the contrastive loss, and a buffer of 0, 1, 2, ...
IGNORED = (r"blip\.(vision|text)_proj\.", r"blip\.text_encoder\.embeddings\.position_ids$")
# names of the published vision tower, which are timm's -> names of BlipVisionModel
RENAMES = {
    r"cls_token$": "embeddings.class_embedding",
    r"pos_embed$": "embeddings.position_embedding",
    r"patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"blocks\.(\d+)\.norm(\d)\.": r"encoder.layers.\1.layer_norm\2.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"norm\.": "post_layernorm.",
}
VISION = "blip.visual_encoder."


@dataclass(frozen=True)
class Sizes:
    """Sizes of BLIP; the defaults are the published ones (ViT-L/16 at 224 pixels, BERT-base)."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_depth: int = 24
    text_width: int = 768
    text_depth: int = 12
    vocabulary: int = 30524  # bert-base-uncased's 30522, [DEC] and [ENC]


PUBLISHED = Sizes()


class Network(nn.Module):
    """BLIP's vision tower, its text tower with cross-attention to the image, and the scoring MLP.

    The parts have the names of the published file; `renamed` converts the others.
    """

    def __init__(self, sizes: Sizes) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_depth,
            num_attention_heads=sizes.vision_width // HEAD,
            image_size=sizes.image,
            patch_size=sizes.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,  # BLIP's, not the default of transformers
        )
        text = BlipTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_depth,
            num_attention_heads=sizes.text_width // HEAD,
            max_position_embeddings=512,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            bos_token_id=None,  # these are for generation only
            eos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # for cross-attention; the mask remains that of an encoder
        )
        text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.sizes = sizes
        self.blip = nn.ModuleDict(
            {"visual_encoder": BlipVisionModel(vision), "text_encoder": text_encoder}
        )
        layers = nn.Sequential(
            nn.Linear(sizes.text_width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        self.mlp = nn.ModuleDict({"layers": layers})

    def look(self, images: Tensor) -> Tensor:
        """Features (n, p, vision width) of images (n, 3, h, w) in [0, 1] of any size."""
        side = self.sizes.image
        pixels = prepare(images, (side, side), "bicubic", "shortest")
        pixels = normalize(pixels, OPENAI_MEAN, OPENAI_STD)
        return self.blip["visual_encoder"](pixels).last_hidden_state

    def rate(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (n,), float32, of features from `look` and tokens (n, l) with their mask."""
        output = self.blip["text_encoder"](ids, attention_mask=mask, encoder_hidden_states=seen)
        with torch.autocast(seen.device.type, enabled=False):
            h = output.last_hidden_state[:, 0].float()  # [CLS]; BLIP's [ENC] is not used
            return self.mlp["layers"](h)[:, 0]


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published state dict with the names of `Network`; unknown names are kept."""
    return {_renamed(key): value for key, value in state.items()}


def _renamed(key: str) -> str:
    name = key.removeprefix(VISION)
    for pattern, replacement in RENAMES.items() if name != key else ():
        if re.match(pattern, name):
            return VISION + re.sub(f"^{pattern}", replacement, name)
    return key


class WordPieces:
    """BERT's uncased tokenizer with BLIP's two additional tokens, truncated and padded to 35.

    `vocabulary` is the lines of vocab.txt. It maps n prompts to (ids, mask), int64 (n, 35).
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocab = {token: i for i, token in enumerate(vocabulary)}
        missing = [token for token in special if token not in vocab]
        if missing:
            raise ValueError(
                f"the vocabulary has no {', '.join(missing)}; take vocab.txt of bert-base-uncased"
            )
        core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.add_special_tokens([*special, "[DEC]", "[ENC]"])
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
        )
        core.enable_truncation(LENGTH)
        core.enable_padding(pad_id=vocab["[PAD]"], pad_token="[PAD]", length=LENGTH)
        self.size = core.get_vocab_size()
        self._row = lru_cache(maxsize=4096)(core.encode)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [self._row(prompt) for prompt in prompts]
        ids = torch.tensor([row.ids for row in rows])
        return ids, torch.tensor([row.attention_mask for row in rows])


@dataclass(eq=False)
class Scorer:
    """A frozen network with its tokenizer."""

    network: Network
    tokens: WordPieces

    def __post_init__(self) -> None:
        self.network.requires_grad_(False).eval()


class ImageRewardReward(NetworkReward):
    """Human preference for an image, given its prompt (Xu et al. 2023, "ImageReward").

    BERT reads the prompt and, by cross-attention, the image; an MLP scores the first token. The
    scale `official` is (MLP - 0.1672)/1.0333, with mean 0 and standard deviation 1, roughly, on
    the authors' images; `raw` is the output of the MLP. Prompts are truncated to 35 tokens.

    Args:
        source: The weights, see the module docstring.
        scale: official or raw.
        batch_size: Number of images evaluated at once.
        device: Device of the model; None follows the images.
    """

    title = "ImageReward"
    scales: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = {
        "official": lambda raw: (raw - MEAN) / STD,
        "raw": lambda raw: raw,  # DAS leaves the constants out
    }
    card = Card(
        weights="THUDM/ImageReward",
        size="1.8 GB",
        licence="Apache-2.0",
        range="unbounded; official: mostly [-2, 2]",
        citation="Xu et al. 2023, ImageReward, arXiv 2304.05977",
    )

    def __init__(
        self,
        source: str = "THUDM/ImageReward",
        scale: str = "official",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            "imagereward", source=source, scale=scale, batch_size=batch_size, device=device
        )
        seed = seed_of(source)
        load = partial(_published, source) if seed is None else partial(_random, seed)
        self.scorer = loaded_once("imagereward", source, device, load)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        network = moved(self.scorer.network, device)

        def look() -> Tensor:
            chunks = images.split(self.batch_size)
            return torch.cat([network.look(chunk.to(device)) for chunk in chunks])

        # the features of a prompt depend on the image, so only its tokens are cached
        seen = shared(network, images, look)
        ids, mask = (rows.to(device) for rows in self.scorer.tokens(prompts))
        rows = zip(*(x.split(self.batch_size) for x in (seen, ids, mask)), strict=True)
        return self.scales[self.scale](torch.cat([network.rate(*row) for row in rows]))


def _published(source: str) -> Scorer:
    path = fetch(source, *FILES)
    tokens = WordPieces(_vocabulary(source))
    if tokens.size != PUBLISHED.vocabulary:
        raise ValueError(
            f"the vocabulary for {source} has {tokens.size} tokens with [DEC] and [ENC] but "
            f"ImageReward has {PUBLISHED.vocabulary}; take vocab.txt of bert-base-uncased"
        )
    network = Network(PUBLISHED)
    fit(network, renamed(read_state(path)), source, ignore=IGNORED)
    return Scorer(network, tokens)


def _vocabulary(source: str) -> list[str]:
    """Return the lines of vocab.txt beside the weights, or else of bert-base-uncased on the hub."""
    path = local(source)
    folder = path.parent if path.is_file() else path
    beside = folder / "vocab.txt"
    try:
        file = beside if beside.is_file() else fetch(VOCABULARY, "vocab.txt")
    except ValueError as error:
        raise ValueError(
            f"ImageReward needs BERT's vocabulary, which is neither at {beside} nor available from "
            f"the hub; put vocab.txt of {VOCABULARY} there"
        ) from error
    # not splitlines(): a token may be a line separator of Unicode
    return file.read_text(encoding="utf-8").rstrip("\n").split("\n")


def _random(seed: int) -> Scorer:
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    tokens = WordPieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])
    network = Network(Sizes(32, 8, 64, 2, 64, 2, tokens.size))
    return Scorer(randomise(network, seed), tokens)
