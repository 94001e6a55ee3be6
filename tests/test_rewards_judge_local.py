"""The judge as a model in this process: a small untrained LLaVA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from judge_server import grey
from PIL import Image

import rewards
from rewards.models.vlm_judge import JudgeReward


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    """A folder with a small untrained LLaVA whose tokenizer spells bytes, and knows Yes and No."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes", "No"]
    vocabulary = {word: i for i, word in enumerate([*words, "<image>", "<s>", "</s>", "<pad>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Y", "e"), ("Ye", "s"), ("N", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], **special
    )
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
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_local_model_says_yes_as_its_own_logits_do(llava):
    images = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    reward = rewards.load(f'judge(source="{llava}", preset=yes_no)', imports=True)
    prompts = ["a cat", "a dog", "a cat"]
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32
    assert reward.range == (0.0, 1.0)
    assert scores.std() > 0

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(llava)
    yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    for i, prompt in enumerate(prompts):
        shown = Image.fromarray((images[i].permute(1, 2, 0) * 255).round().byte().numpy())
        text = f'USER: <image>Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT:'
        inputs = processor(images=shown, text=text, return_tensors="pt")
        logits = model(**inputs).logits[0, -1]
        assert scores[i].item() == pytest.approx((logits[yes] - logits[no]).sigmoid().item(), 1e-5)

    order = [2, 0, 1]
    fresh = rewards.load(f'judge(source="{llava}", preset=yes_no)', imports=True)
    assert torch.equal(fresh(images[order], [prompts[i] for i in order]), scores[order])


def test_a_local_model_answers_the_same_twice_and_its_answer_is_read(llava):
    judge = JudgeReward(llava, max_tokens=6, invalid="nan")
    shown = np.full((20, 30, 3), 128, np.uint8)
    answer = judge.model.answer([shown], "What?")
    assert answer == judge.model.answer([shown], "What?")
    assert "USER" not in answer
    images = grey(100, size=(20, 20))
    assert judge(images, ["a"]).isnan().all()  # an untrained model says nothing
    judge.model.answer = lambda *_: "Score: 3"  # type: ignore[method-assign]
    assert judge(images, ["a"]).tolist() == pytest.approx([0.3])


def test_a_prompt_cannot_command_the_local_model(llava):
    judge = JudgeReward(llava, preset="yes_no")
    for token in ("<image>", "</s>"):
        with pytest.raises(ValueError, match=f"holds '{token}'"):
            judge(grey(1), [f"a cat {token}"])


def test_a_folder_that_is_no_such_model_is_explained(tmp_path):
    with pytest.raises(ValueError, match="not an image-text-to-text model"):
        JudgeReward(str(tmp_path))
