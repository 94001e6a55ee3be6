"""The tokenizer of tiny-clip, and the embedded networks with new weights.

Configurations come from the folders of the embedded models, as do the pipelines' tokenizers.
"""

from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steering import tiny

from .cards import FOLDERS
from .world import COLOURS, NUMBERS, SHAPES

TRAINED = ("transformer", "unet", "text_encoder", "text_encoder_2")  # of a pipeline, if it has them
_SPECIAL = ("<pad>", "<unk>", "<start>")
_ENTITIES = (*COLOURS, "black", "white", *SHAPES, *(f"{s}s" for s in SHAPES), "crosses", *NUMBERS)
_GLUE = ("the", "word", "and", "in", "an", "left", "right", "above", "below", "of")
_WORDS = (*_ENTITIES, *_GLUE)


def tokenizer() -> Any:
    """Known words are tokens; everything else is spelled, one token a character.

    `<end>` has the highest id, which is how CLIP text towers find the end of the prompt.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789\"'.,!?-"
    names = (*_SPECIAL, *letters, *_WORDS, "<end>")
    vocabulary = {name: i for i, name in enumerate(names)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex("[“”]"), '"')]
    )
    words = "|".join(sorted(_WORDS, key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\b(?:{words})\b|\S"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=16,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    )


def token_ids(tok: Any, prompts: list[str]) -> Tensor:
    """Prompts as token ids (n, 16)."""
    padding: dict[str, Any] = {"padding": "max_length", "truncation": True}
    return tok(prompts, return_tensors="pt", **padding).input_ids


def vae() -> Any:
    """An AutoencoderKL, 64x64x3 <-> 16x16x8."""
    kind: Any = AutoencoderKL
    return kind.from_config(kind.load_config(FOLDERS["tiny-sd3"] / "vae"))


def preview() -> Any:
    """An AutoencoderTiny: a cheaper decoder of the same latents, for intermediate scores."""
    kind: Any = AutoencoderTiny
    return kind.from_config(kind.load_config(FOLDERS["tiny-sd3"].parent / "preview"))


def pipeline(name: str, autoencoder: Any) -> Any:
    """The embedded pipeline `name` with this autoencoder, and new weights in the parts of TRAINED.

    The third text encoder of tiny-sd3 stays: its last norm is 0, so that it gives zeros, which the
    stock pipeline puts in the place of a missing T5. `from_pretrained` requires the component.
    """
    pipe = tiny.load(name)
    for attribute in TRAINED:
        if (part := getattr(pipe, attribute, None)) is not None:
            build = getattr(part, "from_config", type(part))  # diffusers' and transformers' way
            pipe.register_modules(**{attribute: build(part.config)})
    pipe.register_modules(vae=autoencoder)
    return pipe
