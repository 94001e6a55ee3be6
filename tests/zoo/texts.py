"""Tiny text encoders and towers, all texts 32 wide, and the tokenizers that go with them."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false

import functools
import io
import string
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["TEXTS", "TOKENIZERS"]

_LETTERS = string.ascii_lowercase + string.digits + ".,'-"
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>"),
)
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
_TOWER = {"image_size": 32, "patch_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 4]}
_SEEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
}
_VL = {
    "text_config": _TEXT | {"rope_parameters": _ROPE},
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "vision_token_id": 5,
    "image_token_id": 5,
    "video_token_id": 6,
}
_QWEN2 = _VL | {"vision_config": _SEEN | {"fullatt_block_indexes": [0]}}
_QWEN3 = _VL | {"vision_config": _SEEN | {"deepstack_visual_indexes": [1]}}

# of Kolors, whose published text encoder has 28 layers, 4096 wide, with 32 heads in 2 groups
_CHATGLM = {
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "original_rope": True,
    "seq_length": 512,
    "padded_vocab_size": 300,
    "use_cache": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

TEXTS: dict[str, dict[str, Any]] = {
    "CLIPTextModel": _TEXT | {"max_position_embeddings": 77},
    "CLIPTextModelWithProjection": _TEXT | {"max_position_embeddings": 77},
    "CLIPVisionModel": _TEXT | _TOWER,
    "CLIPVisionModelWithProjection": _TEXT | _TOWER,
    "SiglipVisionModel": _TEXT | _TOWER,
    "Siglip2VisionModel": _TEXT | {"num_patches": 16, "patch_size": 8},
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "BertModel": _TEXT,
    "Gemma2Model": _TEXT,
    "GemmaModel": _TEXT,
    "GlmModel": _TEXT | {"pad_token_id": 0},
    "LlamaModel": _TEXT,
    "LlamaForCausalLM": _TEXT,
    "Qwen3Model": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "SmolLM3ForCausalLM": _TEXT,
    "T5GemmaEncoder": _TEXT,
    "Qwen2_5_VLTextModel": _TEXT | {"rope_parameters": _ROPE},
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "Qwen3VLModel": _QWEN3,
    "Qwen2VLForConditionalGeneration": _VL
    | {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}},
    "T5Gemma2Encoder": {
        "text_config": _TEXT | {"dropout_rate": 0.0},
        "vision_config": _TEXT | _TOWER,
        "image_token_index": 5,
    },
    "Mistral3Model": {"text_config": _TEXT, "vision_config": _TEXT | _TOWER},
    "Mistral3ForConditionalGeneration": {"text_config": _TEXT, "vision_config": _TEXT | _TOWER},
    "LlavaForConditionalGeneration": {
        "text_config": _TEXT,
        "vision_config": _TEXT | _TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
    "ChatGLMModel": _CHATGLM,
    "MultilingualCLIP": _TEXT | {"transformerDimensions": 32, "numDims": 32},
}


def _clip() -> Any:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(c + "</w>" for c in _LETTERS)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


def _qwen() -> Any:
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *sorted(ByteLevel.alphabet())])}
    made = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], model_max_length=512, additional_special_tokens=list(_SPECIAL)
    )
    made.chat_template = _TEMPLATE
    return made


def _gemma() -> Any:
    vocab = {
        p: i for i, p in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS])
    }
    return transformers.GemmaTokenizer(vocab=vocab, merges=[])


def _llama() -> Any:
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", "▁", *_LETTERS])}
    made = transformers.LlamaTokenizer(vocab=vocab, merges=[])
    made.pad_token = "</s>"
    return made


def _bert() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {p: i for i, p in enumerate([*special, *_LETTERS, *("##" + c for c in _LETTERS)])}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=77)


def _xlmr() -> Any:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *_LETTERS, "<mask>"]
    return transformers.XLMRobertaTokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)])


def _roberta() -> Any:
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *_LETTERS])}
    return transformers.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=16)


def _chatglm() -> Any:
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    return ChatGLMTokenizer(str(Path(_letters_model().name) / "tokenizer.model"))


@functools.cache
def _letters_model() -> tempfile.TemporaryDirectory[str]:
    """A folder with a sentencepiece model of letters, which its tokenizers read when saved too."""
    import sentencepiece

    made, folder = io.BytesIO(), tempfile.TemporaryDirectory()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(_LETTERS),
        model_writer=made,
        model_type="char",
        vocab_size=len(_LETTERS) + 4,  # and <unk>, <s>, </s> and a blank
        minloglevel=2,
    )
    (Path(folder.name) / "tokenizer.model").write_bytes(made.getvalue())
    return folder


def _sees(processor: str, patch: int) -> Any:
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2
    )
    videos = getattr(transformers, processor.replace("Processor", "VideoProcessor"))()
    cls = getattr(transformers, processor)
    return cls(images, _qwen(), video_processor=videos, chat_template=_TEMPLATE)


TOKENIZERS = {
    "CLIPTokenizer": _clip,
    "T5Tokenizer": _t5,
    "Qwen2Tokenizer": _qwen,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _llama,
    "BertTokenizer": _bert,
    "XLMRobertaTokenizer": _xlmr,
    "RobertaTokenizer": _roberta,
    "ChatGLMTokenizer": _chatglm,
    "ClapFeatureExtractor": transformers.ClapFeatureExtractor,
    "CLIPImageProcessor": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=32
    ),
    "SiglipImageProcessor": lambda: transformers.SiglipImageProcessor(
        size={"height": 32, "width": 32}
    ),
    "ByT5Tokenizer": lambda: transformers.ByT5Tokenizer(),
    "Qwen2VLProcessor": lambda: _sees("Qwen2VLProcessor", 14),
    "Qwen3VLProcessor": lambda: _sees("Qwen3VLProcessor", 16),
}
