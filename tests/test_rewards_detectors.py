"""Zero-shot detectors, on random weights, against transformers and open_clip."""

import copy
import itertools
import json
import re
import shutil
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

import rewards
from rewards.backends import detectors
from rewards.geneval import rules
from rewards.geneval.prompts import CLASSES
from rewards.images import normalize
from rewards.towers.dino_backbone import MEAN, STD
from rewards.towers.dual_encoder import OPENAI_MEAN, OPENAI_STD
from rewards.towers.sources import randomise

NAMES = [["dog"], ["bench", "cat"], ["dog"], ["cat", "dog", "bench"]]


WORDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS |= {word: 2000 + i for i, word in enumerate(("dog", "cat", "bench", "teddy", "bear"))}


def photographs(h: int = 48, w: int = 72) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(len(NAMES), 3, 6, 9, generator=generator)
    smooth = F.interpolate(coarse, (h, w), mode="bilinear").clamp(0, 1)
    return (smooth * 255).round() / 255


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(detectors, "SHORTEST", 64)
    monkeypatch.setattr(detectors, "LONGEST", 100)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders as `save_pretrained` writes them, with the tokenizers' classes and ids of the hub."""
    root = tmp_path_factory.mktemp("detectors")
    grounding = copy.deepcopy(detectors.RANDOM_CONFIGS["grounding-dino"])
    grounding["text_config"]["vocab_size"] = 2100
    vocabulary = {f"[unused{i}]": i for i in range(2100) if i not in WORDS.values()} | WORDS
    open_clip_s = open_clip.SimpleTokenizer()
    clip_s = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    owl = copy.deepcopy(detectors.RANDOM_CONFIGS["owlv2"])
    owl["text_config"] |= {"vocab_size": 49408, "max_position_embeddings": 16}
    models = {
        "owlv2": (
            transformers.Owlv2ForObjectDetection(transformers.Owlv2Config.from_dict(owl)),
            transformers.CLIPTokenizer(
                vocab={clip_s.get(k, k): v for k, v in open_clip_s.encoder.items()},
                merges=list(open_clip_s.bpe_ranks),  # pyright: ignore[reportArgumentType]
                pad_token="!",
                model_max_length=16,
            ),
        ),
        "grounding_dino": (
            transformers.GroundingDinoForObjectDetection(
                transformers.GroundingDinoConfig.from_dict(grounding)
            ),
            transformers.BertTokenizer(vocab=vocabulary),
        ),
    }
    for i, (name, (model, tokenizer)) in enumerate(models.items()):
        randomise(model, i)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


KINDS = {"owlv2": detectors.Owlv2, "grounding_dino": detectors.GroundingDino}


BOTH = pytest.mark.parametrize("kind", KINDS)


def table(found: list[rules.Detection]) -> torch.Tensor:
    return torch.tensor([[*d.box, d.score] for d in found])


@BOTH
@pytest.mark.parametrize("where", ["random", "folder"])
def test_neither_company_nor_order_changes_what_is_detected(kind, where, folders):
    detector = KINDS[kind]("random:1" if where == "random" else str(folders[kind]))
    images = photographs()
    together = detector(images, NAMES)
    assert [len(found) for found in together] == [len(together[0])] * 4
    assert len({d.name for d in together[3]}) > 1
    order = [2, 0, 3, 1]
    mixed = detector(images[order], [NAMES[i] for i in order])
    for i, found in enumerate(together):
        (alone,) = detector(images[i : i + 1], NAMES[i : i + 1])
        for other in (alone, mixed[order.index(i)]):
            assert [d.name for d in found] == [d.name for d in other]
            torch.testing.assert_close(table(found), table(other), atol=1e-3, rtol=1e-4)
        assert all(d.name in NAMES[i] and d.colour == "" for d in found)
    assert detector(images[:1], [[]]) == [[]]
    assert not any(p.requires_grad for p in detector.model.parameters())


@BOTH
def test_only_what_exceeds_the_floor_is_given(kind):
    images = photographs()[:1]
    (every,) = KINDS[kind]("random:1")(images, [["dog"]])
    floor = sorted(d.score for d in every)[len(every) // 2]
    (some,) = KINDS[kind]("random:1", floor)(images, [["dog"]])
    assert some == [d for d in every if d.score > floor]
    assert 0 < len(some) < len(every)


def test_owlv2_is_what_transformers_makes_of_the_same_pictures(folders):
    folder = folders["owlv2"]
    model = transformers.Owlv2ForObjectDetection.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image_processor = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    processor: Any = transformers.Owlv2Processor(image_processor, tokenizer)
    image, names = photographs(40, 56)[:1], ["cat", "teddy bear"]
    texts = [[f"a photo of a {name}" for name in names]]
    picture = (image[0] * 255).round().to(torch.uint8)
    inputs = processor(text=texts, images=picture, return_tensors="pt")
    ours = normalize(detectors.padded(image, 64), OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(ours, inputs["pixel_values"], atol=1e-4, rtol=0)
    with torch.no_grad():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0.3, target_sizes=[(40, 56)], text_labels=[names]
    )
    (found,) = detectors.Owlv2(str(folder), floor=0.3)(image, [names])
    assert [d.name for d in found] == theirs["text_labels"]
    end = torch.tensor([56.0, 40, 56, 40])  # we end things where the picture ends
    boxes = theirs["boxes"].clamp(min=0).minimum(end)
    torch.testing.assert_close(table(found)[:, :4], boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(table(found)[:, 4], theirs["scores"], atol=1e-4, rtol=0)
    assert len(set(theirs["text_labels"])) == 2
    assert len(found) < 64


def test_grounding_dino_is_what_transformers_makes_of_the_same_pictures(folders):
    folder = folders["grounding_dino"]
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 100}
    processor: Any = transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size=size), tokenizer
    )
    image, names = photographs(64, 96)[:1], ["cat", "teddy bear", "dog"]  # no need to resize
    picture = (image[0] * 255).round().to(torch.uint8)
    inputs = processor(images=picture, text=[names], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], normalize(image, MEAN, STD))
    assert inputs["input_ids"].tolist() == [[101, 2001, 1012, 2003, 2004, 1012, 2000, 1012, 102]]
    with torch.no_grad():
        outputs = model(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        outputs, threshold=0, target_sizes=[(64, 96)]
    )
    (maps,) = build_label_maps(outputs.logits, inputs["input_ids"])
    # as the authors evaluate on COCO: a row of the map adds up to one
    share = maps / maps.sum(1, keepdim=True)
    scores, labels = (outputs.logits[0].sigmoid() @ share.T).max(1)
    (found,) = detectors.GroundingDino(str(folder))(image, [names])
    assert [d.name for d in found] == [names[i] for i in labels.tolist()]
    boxes = theirs["boxes"].clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
    torch.testing.assert_close(table(found)[:, :4], boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(table(found)[:, 4], scores, atol=1e-4, rtol=0)
    assert len({d.name for d in found}) > 1


def test_grounding_dino_looks_at_what_transformers_makes_of_a_picture(folders):
    seen = []
    detector = detectors.GroundingDino(str(folders["grounding_dino"]))
    detector.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    for h, w in ((40, 70), (200, 90)):
        image = photographs(h, w)[:1]
        picture = (image[0] * 255).round().to(torch.uint8)
        size = {"shortest_edge": 64, "longest_edge": 100}
        processor: Any = transformers.GroundingDinoImageProcessor(size=size)
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        detector(image, [["dog"]])
        # transformers rounds the resized picture to bytes, here it stays as it is
        torch.testing.assert_close(seen[-1], theirs, atol=1.1 / 255 / min(STD), rtol=0)


def test_grounding_dino_looks_at_the_sizes_that_transformers_takes():
    for h, w in itertools.product((37, 64, 100, 512, 768, 800, 1024, 1333), repeat=2):
        expected = get_size_with_aspect_ratio((h, w), 800, 1333)
        assert detectors.at_most(h, w, 800, 1333) == expected, (h, w)


def test_the_text_of_owlv2_is_open_clip_s(folders):
    detector = detectors.Owlv2(str(folders["owlv2"]))
    texts = [f"a photo of a {name}" for name in CLASSES]
    ids, mask = detector.tokenize(texts)
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=16)(texts))
    assert torch.equal(mask, (ids > 0).long())


@pytest.mark.parametrize("names", [["st. bernard", "dog"], ["", "dog"], [f"dog{'y' * 60}"] * 5])
def test_names_that_are_no_phrases_of_one_caption_are_refused(names):
    with pytest.raises(ValueError, match="cannot read the names"):
        detectors.GroundingDino("random:0")(photographs()[:1], [names])


@pytest.mark.parametrize(
    ("model", "config", "millions"),
    [
        # google/owlv2-base-patch16-ensemble: 155M; IDEA-Research/grounding-dino-tiny: 172M
        ("Owlv2ForObjectDetection", {"vision_config": {"image_size": 960}}, 155),
        ("GroundingDinoForObjectDetection", {}, 172),
    ],
)
def test_the_published_architectures_have_the_published_size(model, config, millions):
    cls = getattr(transformers, model)
    with torch.device("meta"):
        built = cls(cls.config_class.from_dict(config))
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == millions


@BOTH
def test_a_checkpoint_that_is_not_the_model_is_refused(kind, folders, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    key = {"owlv2": "layer_norm.weight", "grounding_dino": "model.text_projection.weight"}[kind]
    save_file({k: v for k, v in state.items() if k != key}, weights)
    with pytest.raises(ValueError, match=f"lacks {re.escape(key)}"):
        KINDS[kind](str(folder))
    save_file(state | {"extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"has unknown extra\.weight"):
        KINDS[kind](str(folder))
    save_file(state | {key: torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match="has misshapen"):
        KINDS[kind](str(folder))
    unused = {"owlv2": "box_bias", "grounding_dino": "model.text_backbone.pooler.dense.weight"}
    save_file(state | {unused[kind]: torch.zeros(1)}, weights)
    KINDS[kind](str(folder))
    weights.write_bytes((folders[kind] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        KINDS[kind](str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="is a 'clip' model"):
        KINDS[kind](str(folder))


@BOTH
def test_the_reward_of_a_zero_shot_detector_keeps_the_convention(kind):
    spec = f"objects(mode=share, detector={kind}, source=random:3, colours=random:0"
    spec += ", threshold=0.6, counting_threshold=0.7, batch_size=3)"
    reward = rewards.load(spec, imports=True)
    assert str(rewards.load(str(reward), imports=True)) == str(reward)
    images = photographs()
    prompts = [
        "a photo of a red dog",
        "a photo of two cats",
        "a photo of a bear",
        "a photo of a cow and a bus",
    ]
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32
    assert 0 <= scores.min() <= scores.max() <= 1
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores)
    assert reward(images[:0], []).shape == (0,)
    assert (
        rewards.load(spec, imports=True).parts[0].reward.detector is reward.parts[0].reward.detector
    )
