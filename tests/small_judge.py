"""Folders with small untrained judges, whose tokenizers have the words of one-word answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["save_llava", "save_qwen"]

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["yes", "no"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Save a Qwen2.5-VL and return the folder."""
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Qwen2_5_VLForConditionalGeneration(_qwen_config(tokenizer))
        model = model.to(dtype)
    model.save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def _qwen_tokenizer() -> Any:
    """Digits are tokens of their own, as in Qwen's vocabulary."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    merges = []
    for word in (form for w in WORDS for form in (w, w.title(), w.upper())):
        merges += [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), *SPECIAL]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        merges=list(dict.fromkeys(merges)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )


def _qwen_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            "initializer_range": 0.3,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **sizes,
        },
        vision_config={"depth": 2, "num_heads": 4, "out_hidden_size": 32, **sizes}
        | {"fullatt_block_indexes": [1], "window_size": 56, "initializer_range": 0.3},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def save_llava(folder: Path) -> str:
    """Save a LLaVA whose tokenizer spells bytes, and knows Yes and No; return the folder."""
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = _llava_tokenizer()
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(_llava_config(tokenizer.get_vocab()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _llava_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes", "No"]
    vocabulary = {word: i for i, word in enumerate([*words, "<image>", "<s>", "</s>", "<pad>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Y", "e"), ("Ye", "s"), ("N", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], **special
    )


def _llava_config(vocabulary: dict[str, int]) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **sizes),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            max_position_embeddings=2048,
            bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"],
            pad_token_id=vocabulary["<pad>"],
            initializer_range=0.5,
            **sizes,
        ),
        image_token_index=vocabulary["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
    )
