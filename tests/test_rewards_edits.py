"""Edited images beside their source: the judge's questions, and the likeness to the source."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from clip_folders import pictures as smooth
from judge_server import grey, pictures, question, says
from PIL import Image

import rewards
from rewards.images import to_images
from rewards.models.clip_image import ClipImageReward
from rewards.models.vlm_judge import PRESETS, JudgeReward

ANSWER = '{"reasoning" : "the hat is \\"red\\" [1, 2]", "score" : [20, 12.5]}'


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        ("unifiedreward", "f56f919ce3bc6aab"),
        ("flow_grpo", "bb5823f33a1fda4c"),
        ("unifiedreward1.5", "88d1d1c5f0fba9dc"),
        ("unifiedreward2", "75d52d3ae771f89b"),
        ("unifiedreward_edit", "b9c27cd063664e5f"),
        ("unifiedreward_edit_quality", "ddb40baa511dbf2f"),
    ],
)
def test_the_questions_are_those_of_the_models_training_to_the_letter(preset, digest):
    """Digests of the texts of CodeGoat24/UnifiedReward (ff6f520), with {prompt} as the caption."""
    assert hashlib.sha256(PRESETS[preset].question.encode()).hexdigest()[:16] == digest


def test_unifiedreward_1_5_is_read_after_its_scores_of_words(server):
    words = 'Word-wise Scores: [["Alignment", 0.9], ["Score", 3.5], ["[No_mistakes]", 0.1]]\n\n'
    axes = "Alignment Score (1-5): 4\nCoherence Score (1-5): 2.5\nStyle Score (1-5): 1"
    server.reply = lambda *_: says(words + axes)
    values = {"": 0.375, "_alignment": 0.75, "_coherence": 0.375, "_style": 0.0}
    for name, value in values.items():
        judge = server.judge(preset=f"unifiedreward1.5{name}")
        assert judge(grey(1), ["a"]).tolist() == pytest.approx([value])
    assert server.bodies[0]["max_tokens"] == 4096  # a score for every word is long
    server.judge(preset="unifiedreward1.5", max_tokens=99)(grey(2), ["a"])
    assert server.bodies[-1]["max_tokens"] == 99
    spec = server.judge(preset="unifiedreward1.5_style").spec
    assert rewards.spelled(spec, imports=True) == spec


def test_the_source_is_shown_before_the_edited_image_with_the_instruction(server):
    server.reply = lambda *_: says(ANSWER)
    judge = server.judge(preset="unifiedreward_edit")
    assert judge.wants_references
    source = Image.fromarray(np.full((7, 5, 3), 9, np.uint8))
    scores = judge(grey(1, 2), ["make it {prompt}"] * 2, references=[source, [source]])
    assert scores.tolist() == pytest.approx([0.5, 0.5])  # min(20, 12.5) / 25
    shown = [pictures(body) for body in server.bodies]
    assert sorted(int(after[0, 0, 0]) for _, after in shown) == [1, 2]
    for before, after in shown:
        assert (before.shape, after.shape) == ((7, 5, 3), (4, 6, 3))
        assert (before == 9).all()
    assert question(server.bodies[0]).endswith("\n\nEditing instruction:make it {prompt}\n")
    following = server.judge(preset="unifiedreward_edit_following")
    assert following(grey(1), ["a"], references=[source]).tolist() == pytest.approx([0.8])
    consistency = server.judge(preset="unifiedreward_edit_consistency")
    assert consistency(grey(1), ["a"], references=[source]).tolist() == pytest.approx([0.5])
    quality = server.judge(preset="unifiedreward_edit_quality")
    assert not quality.wants_references
    assert quality(grey(1), ["a"]).tolist() == pytest.approx([0.5])
    assert len(pictures(server.bodies[-1])) == 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('```json\n{\n"reasoning" : "ok",\n"score" : [25, 25],\n}\n```', 1.0),
        ('{"score": ["10", "20"]}', 0.4),
        ("{'score': [ 5.0 , 20 ]}", 0.2),
        ("output score = [25, 5]", 0.2),
        ('"score": [25, 25] no, "score": [0, 25]', 0.0),
        ('{"score": [26, 25]}', None),
        ('{"score": [-1, 25]}', None),
        ('{"score": [25]}', None),
        ('{"score": 25}', None),
        ('{"score": [1, 2, 3]}', None),
        ('"score" : [...]', None),
        ("output score = [score1, score2]", None),
    ],
)
def test_an_edit_s_two_numbers_are_read_or_there_is_no_score(server, answer, score):
    server.reply = lambda *_: says(answer)
    judge = server.judge(preset="unifiedreward_edit", invalid="nan")
    (value,) = judge(grey(1), ["a"], references=[grey(2)]).tolist()
    assert np.isnan(value) if score is None else value == pytest.approx(score)


def test_equal_edits_are_asked_once_and_other_sources_again(server):
    server.reply = lambda *_: says(ANSWER)
    judge = server.judge(preset="unifiedreward_edit")
    images, entry = grey(1, 1, 1, 1), grey(5)
    judge(images, ["a"] * 4, references=[entry, grey(5), grey(6), grey(5, size=(6, 4))])
    assert len(server.bodies) == 3
    judge(images, ["a"] * 4, references=[entry] * 4)
    assert len(server.bodies) == 3


def test_any_question_may_compare_with_all_references(server):
    server.reply = lambda *_: says("Score: 3")
    judge = server.judge(question="Is {prompt} in all?", compares=True)
    assert judge(grey(1), ["it"], references=[[grey(7), grey(8, 9)]]) == pytest.approx(0.3)
    assert [int(x[0, 0, 0]) for x in pictures(server.bodies[0])] == [7, 8, 9, 1]
    assert rewards.load(judge.spec, imports=True).parts[0].reward.wants_references
    alone = server.judge(preset="unifiedreward_edit", question="Good?", compares=False)
    assert not alone.wants_references


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "the judge compares with references= but got none"),
        ([], "1 images need references of 1 entries but got 0"),
        ([[]], "no image for image 0"),
        ([None], "no image for image 0"),
        ([grey(1, 2)], "one source image but image 0 has 2 references"),
        ([["a.png"]], "to_images"),
    ],
)
def test_sources_that_are_missing_or_too_many_are_refused_before_a_request(
    server, references, message
):
    with pytest.raises(ValueError, match=message):
        server.judge(preset="unifiedreward_edit")(grey(1), ["a"], references=references)
    assert not server.bodies


def test_judges_of_the_same_weights_share_them(qwen):
    one = JudgeReward(qwen, preset="unifiedreward_edit", max_tokens=1)
    other = JudgeReward(qwen, preset="unifiedreward_edit_quality")
    assert one.model.model is other.model.model  # type: ignore[attr-defined]
    assert (one.model.max_tokens, other.model.max_tokens) == (1, 512)  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_compares_is_true_or_false(server, value):
    with pytest.raises(ValueError, match=f"compares is {value!r}; give true or false"):
        server.judge(compares=value)


@pytest.mark.parametrize("preset", ["unifiedreward", "unifiedreward2", "unifiedreward_edit"])
def test_a_local_qwen_gets_what_its_published_route_gives(qwen, preset):
    """The route of UnifiedReward's scripts: a templated text, the processor, greedy decoding."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    task = PRESETS[preset]
    sizes = [(84, 56), (61, 90)][: 1 + int(task.sources)]
    rng = np.random.default_rng(3)
    shown = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    asked = task.question.replace("{prompt}", "a red hat, not [a] cat")
    judge = JudgeReward(qwen, preset=preset, max_tokens=8)

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen, dtype="auto").eval()
    processor: Any = AutoProcessor.from_pretrained(qwen)
    content = [{"type": "image"} for _ in shown] + [{"type": "text", "text": asked}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text.count("<|image_pad|>") == len(shown)
    assert text.endswith(asked + "<|im_end|>\n<|im_start|>assistant\n")
    images = [Image.fromarray(x) for x in shown]
    inputs = processor(text=[text], images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        told = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        logits = model(**inputs).logits[0, -1]
    new = told[:, inputs["input_ids"].shape[1] :]
    (expected,) = processor.batch_decode(new, skip_special_tokens=True)
    assert judge.model.answer(shown, asked) == expected
    word = processor.tokenizer.convert_tokens_to_ids("four")
    (chance,), rest = judge.model.first(shown, asked, [["four"]])
    assert chance == pytest.approx(logits.float().softmax(-1)[word].item(), rel=1e-5)
    assert rest == 0
    if len(shown) == 2:
        (swapped,), _ = judge.model.first(shown[::-1], asked, [["four"]])
        assert swapped != pytest.approx(chance, rel=1e-3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A folder with a small untrained CLIPModel of transformers."""
    from clip_folders import twin_folders

    return str(twin_folders(tmp_path_factory.mktemp("clip"), quick_gelu=True)[1])


@pytest.mark.parametrize("size", [(32, 32), (47, 80), (100, 33)])
def test_likeness_in_clip_s_space_is_what_transformers_gives(clip, size, monkeypatch):
    from functools import partial

    from transformers import CLIPImageProcessorPil, CLIPModel

    from rewards.images import resize
    from rewards.towers import dual_encoder

    model: Any = CLIPModel.from_pretrained(clip).eval()
    processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    shown, sources = smooth(3, *size), smooth(5, 61, 40)[2:]

    def features(images: list[Image.Image]) -> torch.Tensor:
        with torch.no_grad():
            found = model.get_image_features(**processor(images, return_tensors="pt"))
        return torch.nn.functional.normalize(found.pooler_output, dim=-1)

    cosines = features(shown) @ features(sources).T
    monkeypatch.setattr(dual_encoder, "resize", partial(resize, exact=True))  # PIL's bytes
    images = to_images(shown)
    one = ClipImageReward(clip)(images, [""] * 3, references=sources)
    torch.testing.assert_close(one, cosines.diagonal(), atol=1e-5, rtol=0)
    for pool, expected in (("max", cosines.amax(1)), ("mean", cosines.mean(1))):
        found = ClipImageReward(clip, pool)(images, ["x"] * 3, references=[sources] * 3)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert cosines.std() > 1e-3  # or the tolerance would say nothing


def test_an_image_is_most_like_itself_and_shares_its_tower(monkeypatch):
    images = to_images(smooth(3, 61, 40))
    reward = ClipImageReward("random:0")
    itself = reward(images, [""] * 3, references=list(images))
    torch.testing.assert_close(itself, torch.ones(3), atol=1e-5, rtol=0)
    other = reward(images, [""] * 3, references=list(images.roll(1, 0)))
    assert (other < itself).all()
    assert rewards.load("clip(random:0)").parts[0].reward.towers is reward.towers
    looks: list[int] = []
    look = reward.towers.encode_image
    monkeypatch.setattr(reward.towers, "encode_image", lambda x: looks.append(len(x)) or look(x))
    entry = [images[0]]
    both = rewards.load("clip(random:0) + clip_image(random:0)")
    both(images, [""] * 3, references=[entry] * 3)
    assert looks == [3, 1]  # the images once for both, and their one source


def test_a_gradient_reaches_the_image_and_not_its_source():
    images = to_images(smooth(2, 40, 50)).requires_grad_(True)
    source = to_images(smooth(3, 40, 50))[2:].requires_grad_(True)
    ClipImageReward("random:0")(images, ["", ""], references=[source, source]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert source.grad is None


def test_clip_image_says_what_it_needs():
    with pytest.raises(ValueError, match="the CLIP image reward compares with references= but got"):
        ClipImageReward("random:0")(grey(1), [""])
    with pytest.raises(ValueError, match="the CLIP pool 'min' is unknown"):
        ClipImageReward("random:0", "min")


def of_references(images: torch.Tensor, prompts: Any, references: Any = None) -> torch.Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ("jpeg + 0*dino(random:0)", True),
        ("clip_image(random:0)", True),
        ("judge(preset=unifiedreward_edit, url=http://127.0.0.1:1/v1, model=m)", True),
        ("judge(preset=unifiedreward_edit_quality, url=http://127.0.0.1:1/v1, model=m)", False),
        ("min(jpeg, clip_image(random:0))", True),
        ("delta(jpeg)", True),
        ("par(jpeg, ref=0)", False),
        (f"{__name__}:of_references", False),  # optional, in a function
    ],
)
def test_what_needs_references_says_so(spec, needs):
    assert rewards.load(spec, imports=True).needs_references is needs
