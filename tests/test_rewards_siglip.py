"""SigLIP against transformers' SiglipModel and open_clip's, on random weights."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_folders import pictures
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import rewards
from rewards.images import resize, to_images
from rewards.models.clip import ClipReward
from rewards.models.siglip import SiglipReward
from rewards.towers import dual_encoder as towers_module
from rewards.towers import transformers_clip
from rewards.towers.openclip import build
from rewards.towers.sources import RANDOM_CONFIG, open_source, randomise

WORDS = ["<pad>", "<unk>", "<eos>", "a", "red", "blue", "circle", "star", ".", ","]
PROMPTS = ["a red circle", "a blue star", "a circle, a star.", "star " * 12]


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Any]:
    """A SiglipModel of random weights and the folder it is stored in, without preprocessing."""
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": len(WORDS), "max_position_embeddings": 8}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    vision = shared | {"image_size": 32, "patch_size": 8}
    model: Any = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 5)
    model.logit_scale.fill_(1.2)
    model.logit_bias.fill_(-0.7)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, model


def expected(model: Any, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    rows = tokenizer()(
        prompts,
        padding="max_length",
        padding_side="right",
        max_length=8,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(rows.input_ids, pixels).logits_per_image.diagonal()


def test_scores_are_those_of_transformers(made):
    folder, model = made
    shown = to_images(pictures(4, 32, 32))
    prompts = [prompt.replace(",", "").replace(".", "") for prompt in PROMPTS]
    logits = expected(model, (shown - 0.5) / 0.5, prompts)
    scores = {scale: SiglipReward(str(folder), scale) for scale in SiglipReward.scales}
    cosine = (logits - model.logit_bias) / model.logit_scale.exp()
    wanted = {"cosine": cosine, "logit": logits, "probability": logits.sigmoid()}
    assert cosine.std() > 0.02
    for scale, reward in scores.items():
        found = reward(shown, PROMPTS)
        torch.testing.assert_close(found, wanted[scale], atol=1e-5, rtol=0)
        low, high = reward.range
        assert low is not None
        assert high is not None
        assert ((found >= low) & (found <= high)).all()
    assert scores["probability"].range[1] == pytest.approx(
        torch.tensor(1.2).exp().sub(0.7).sigmoid().item()
    )


@pytest.mark.parametrize(("resample", "size"), [(3, (40, 60)), (2, (20, 90))])
def test_pictures_are_squashed_as_transformers_does(made, resample, size, monkeypatch, tmp_path):
    from transformers import SiglipImageProcessorPil

    folder, model = made
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=resample)
    processor.save_pretrained(tmp_path)
    shown = pictures(4, *size)
    pixels = processor(shown, return_tensors="pt").pixel_values
    monkeypatch.setattr(towers_module, "resize", partial(resize, exact=True))
    found = SiglipReward(str(tmp_path), "logit")(to_images(shown), ["star"] * 4)
    torch.testing.assert_close(
        found, expected(model, pixels, ["star"] * 4), atol=1e-5, rtol=0, msg=str
    )


def test_each_family_has_its_own_resampling_and_words(made, monkeypatch):
    folder, _ = made
    first = open_source(str(folder))
    assert (first.filter, first.mode, tuple(first.mean)) == ("bicubic", "squash", (0.5,) * 3)
    monkeypatch.setattr(transformers_clip, "GEMMA_WORDS", len(WORDS))  # as if it were SigLIP 2
    second = open_source(str(folder))
    assert (second.filter, second.mode, tuple(second.std)) == ("bilinear", "squash", (0.5,) * 3)
    plain, shouted, stopped = (p for p in ["a red star", "A RED Star", "a red star."])
    for pair, punctuation_counts in ((first, False), (second, True)):
        features = pair.text_features([plain, shouted, stopped])
        # rows of one batch, whose last digits may depend on their place in it
        same = [torch.allclose(features[0], other, atol=1e-5) for other in features[1:]]
        assert same == [True, not punctuation_counts]


def test_lower_case_is_what_the_tokenizer_of_siglip_2_does():
    from transformers import Siglip2Tokenizer

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"adr▁."])}
    theirs = Siglip2Tokenizer(vocab=vocabulary, merges=[])
    backend: Any = theirs._tokenizer
    assert backend.normalizer.normalize_str("A Rad.") == transformers_clip.lower("A Rad.").replace(
        " ", "▁"
    )


TEXTS = ("A Cat,  on\n a mat!", "it's  50% off.", "", "Ünïcode – dash", '"quoted" (twice)')


def test_canonical_text_is_what_big_vision_made_of_it():
    from open_clip.tokenizer import canonicalize_text

    for text in TEXTS:
        assert transformers_clip.canonical(text) == canonicalize_text(text)


def test_canonical_text_is_what_the_tokenizer_of_siglip_does():
    pytest.importorskip("sentencepiece", reason="transformers' SiglipTokenizer needs it")
    from transformers import SiglipTokenizer

    class Bare:
        do_lower_case = True
        remove_punctuation = SiglipTokenizer.remove_punctuation

    for text in (*TEXTS, "under_score"):
        wanted = SiglipTokenizer.canonicalize_text(Bare(), text)  # pyright: ignore
        assert transformers_clip.canonical(text) == wanted


def test_open_clips_siglip_scores_as_open_clip_does(tmp_path):
    text = RANDOM_CONFIG["text_cfg"] | {"context_length": 16, "no_causal_mask": True}
    text |= {"pool_type": "last", "proj_bias": True}
    settings = RANDOM_CONFIG | {"text_cfg": text, "custom_text": True, "init_logit_bias": -10}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = randomise(build(config), 2)
    model.logit_bias.fill_(-3)
    state = {k: v.reshape(1) if k.startswith("logit") else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    shown = to_images(pictures(4, 32, 32))
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    image, words, scale, bias = model((shown - 0.5) / 0.5, ids)
    wanted = scale * (image * words).sum(-1) + bias
    found = SiglipReward(str(tmp_path), "logit")(shown, PROMPTS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert found.std() > 0.2


def test_the_default_architecture_has_the_published_number_of_parameters():
    from transformers import SiglipConfig, SiglipModel

    with torch.device("meta"):
        model: Any = SiglipModel(SiglipConfig())
    assert sum(p.numel() for p in model.parameters()) == 203_155_970


def test_training_starts_where_the_paper_says():
    reward = SiglipReward("random:0", "logit")
    assert (reward.logit_scale.item(), reward.logit_bias.item()) == (pytest.approx(10), -10)
    assert reward.range == (pytest.approx(-20), pytest.approx(0, abs=1e-5))
    assert SiglipReward("random:0").towers is reward.towers
    images = to_images(pictures(2, 32, 32))
    other = SiglipReward("random:1", "logit")
    assert (other(images, PROMPTS[:2]) - reward(images, PROMPTS[:2])).abs().min() > 1e-3


def test_a_clip_is_no_siglip_and_unknown_scales_are_refused(tmp_path, made):
    with pytest.raises(ValueError, match=r"no logit_bias.*use clip\("):
        SiglipReward("tiny")
    with pytest.raises(ValueError, match="did you mean 'probability'"):
        SiglipReward("random:0", "probabilty")
    with pytest.raises(ValueError, match="batch_size is 0"):
        rewards.load("siglip(random:0, batch_size=0)")
    with pytest.raises(ValueError, match=r"use siglip\("):
        ClipReward(str(made[0]))


def test_wrong_keys_are_named(made, tmp_path):
    folder, _ = made
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["lora_A.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has unknown lora_A\.weight; it looks like a LoRA"):
        SiglipReward(str(tmp_path))


def test_a_tokenizer_that_needs_sentencepiece_says_so(made, monkeypatch):
    def refuse(place):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        transformers_clip.load_tokenizer(str(made[0]))
