"""The judge as a model in this process: a small untrained LLaVA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from judge_server import grey
from PIL import Image
from small_judge import save_llava

import rewards
from rewards.models.vlm_judge import JudgeReward


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return save_llava(tmp_path_factory.mktemp("llava"))


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
