"""GenEval's rules on hand-made boxes, its metadata, and its prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from rewards.geneval import prompts, rules
from rewards.geneval.rules import (
    Detection,
    Entry,
    Expected,
    exactly,
    relations,
    select,
    share,
    strict,
)

FILE = Path(__file__).parents[2] / "shared/data/prompts/geneval_metadata.jsonl"
needs_file = pytest.mark.skipif(not FILE.is_file(), reason="GenEval's metadata is not shared here")


def dog(x: float = 50, y: float = 50, colour: str = "", score: float = 0.9, name: str = "dog"):
    return Detection(name, colour, (x - 10, y - 10, x + 10, y + 10), score)


def cat(*args, **kwargs):
    return dog(*args, name="cat", **kwargs)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),  # both shares are 0.64 after the slack of 4 pixels
        (50, 20, {"right of"}),
        (3, 0, set()),  # within a tenth of the sizes, 0.1 · (20 + 20)
        (4, 4, set()),
        (4.1, 0, set()),  # 0.1 of 4.1 is left of it
        (9, 0, {"right of"}),  # 5/9
        # the share is of the whole distance: 6/12.2, not 6/6.7 of what exceeds the slack
        (10, 7, set()),
    ],
)
def test_a_relation_is_the_direction_beyond_a_tenth_of_the_sizes(x, y, expected):
    assert relations(dog(100 + x, 100 + y).box, dog(100, 100).box) == expected


def test_of_two_sizes_both_count_towards_the_slack():
    wide, thin = (0.0, 0.0, 100.0, 10.0), (60.0, 0.0, 70.0, 10.0)
    assert relations(wide, thin) == set()  # centres 15 apart, slack 0.1 · (100 + 10) = 11
    assert relations(wide, (80.0, 0.0, 90.0, 10.0)) == {"left of"}  # 35 apart


ONE = Entry("single_object", (Expected("dog", "", 1),))
TWO = Entry("counting", (Expected("dog", "", 2),), (Expected("dog", "", 3),))
RED = Entry("colors", (Expected("dog", "red", 1),))
PAIR = Entry("two_object", (Expected("dog", "", 1), Expected("cat", "", 1)))
LEFT = Entry("position", (Expected("cat", "", 1), Expected("dog", "", 1, "left of", 0)))
HUES = Entry("color_attr", (Expected("dog", "red", 1), Expected("cat", "blue", 1)))


@pytest.mark.parametrize(
    ("entry", "found", "is_strict", "is_exact", "soft"),
    [
        (ONE, [], 0, 0, 0),
        (ONE, [dog()], 1, 1, 1),
        (ONE, [dog(), cat()], 1, 1, 1),
        (ONE, [dog(), dog()], 1, 0, 0),  # at least one is correct, but not exactly one
        (ONE, [dog()] * 5, 1, 0, 0),  # the published dense reward is -3
        (TWO, [dog()], 0, 0, 1 / 2),
        (TWO, [dog()] * 2, 1, 1, 1),
        (TWO, [dog()] * 3, 0, 0, 1 / 2),  # excluded
        (TWO, [dog()] * 9, 0, 0, 0),
        (RED, [dog(colour="red")], 1, 1, 1),
        (RED, [dog(colour="blue")], 0, 0, 1 / 2),
        (RED, [dog(colour="red"), dog(colour="blue", score=0.5)], 1, 0, 0),
        (RED, [dog(colour="red", score=0.5), dog(colour="blue")], 0, 0, 0),  # not the surest one
        (PAIR, [dog()], 0, 0, 1 / 2),
        (PAIR, [dog(), cat(), cat()], 1, 0, 1 / 2),
        (LEFT, [dog(20), cat(80)], 1, 1, 1),
        (LEFT, [dog(80), cat(20)], 0, 0, 2 / 3),  # the published dense reward is 3/4
        (LEFT, [dog(20)], 0, 0, 1 / 3),  # the dog, no cat, so no place either
        (LEFT, [dog(20), dog(90, score=0.5), cat(80)], 1, 0, 1 / 3),
        (HUES, [dog(colour="red"), cat(colour="blue")], 1, 1, 1),
        (HUES, [dog(colour="blue"), cat(colour="red")], 0, 0, 1 / 2),
    ],
)
def test_scores_of_hand_made_detections(entry, found, is_strict, is_exact, soft):
    assert strict(entry, found) == is_strict
    assert exactly(entry, found) == is_exact
    assert share(entry, found) == pytest.approx(soft)


def test_every_one_must_lie_so_to_every_one():
    entry = Entry("position", (Expected("cat", "", 2), Expected("dog", "", 1, "left of", 0)))
    assert strict(entry, [dog(20), cat(60), cat(90)]) == 1
    assert strict(entry, [dog(70), cat(40), cat(90)]) == 0


def test_a_place_beside_a_thing_of_the_wrong_colour_is_worth_nothing():
    include = (Expected("cat", "blue", 1), Expected("dog", "", 1, "left of", 0))
    found = [dog(20), cat(80, colour="red")]
    assert rules.terms(Entry("position", include), found) == [1, 0, 1, 0]


def test_what_is_excluded_besides_the_things_counted_is_one_term():
    entry = Entry("single_object", (Expected("dog", "", 1),), (Expected("cat", "", 1),))
    assert rules.terms(entry, [dog()]) == [1, 1]
    assert rules.terms(entry, [dog(), cat()]) == [1, 0]
    assert strict(entry, [dog(), cat()]) == exactly(entry, [dog(), cat()]) == 0


def test_one_class_in_two_colours_is_told_apart():
    entry = Entry("color_attr", (Expected("dog", "red", 1), Expected("dog", "blue", 1)))
    for colours, right in (("red blue", 1), ("blue red", 1), ("red red", 0), ("red", 0)):
        found = [
            dog(colour=colour, score=1 - i / 10) for i, colour in enumerate(colours.split(" "))
        ]
        assert strict(entry, found) == exactly(entry, found) == right


def scenes(entry: Entry, n: int, seed: int) -> list[list[Detection]]:
    """Random detections near what an entry asks for."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(n):
        found = []
        for wanted in entry.include:
            for _ in range(max(0, wanted.count + int(rng.choice([-1, 0, 0, 0, 1, 2])))):
                colour = wanted.colour if rng.random() < 0.8 else "green"
                x, y = rng.uniform(0, 300, 2)
                found.append(dog(x, y, colour, float(rng.random()), wanted.name))
        pictures.append(found)
    return pictures


@pytest.mark.parametrize("entry", [ONE, TWO, RED, PAIR, LEFT, HUES])
def test_scores_agree_with_each_other_and_with_any_order(entry):
    lengths, correct = set(), 0
    for found in scenes(entry, 200, seed=3):
        values = rules.terms(entry, found)
        lengths.add(len(values))
        assert all(0 <= value <= 1 for value in values)
        assert exactly(entry, found) == (share(entry, found) == 1)
        assert exactly(entry, found) <= strict(entry, found)
        correct += strict(entry, found)
        for judge in (strict, exactly, share):
            assert judge(entry, found[::-1]) == judge(entry, found)
    assert len(lengths) == 1  # so that no picture is weighed differently from another
    assert 20 < correct < 180


def test_the_surest_sixteen_of_a_class_above_the_threshold_are_kept():
    things = [dog(20 * i, score=0.2 + i / 40) for i in range(24)] + [cat(score=0.31)]
    kept = select(things, 0.3)
    assert [d.name for d in kept] == ["dog"] * 16 + ["cat"]
    assert kept[:16] == things[23:7:-1]
    assert select(things, 0.9) == []
    assert select([dog(score=0.3)], 0.3) == []  # exceeds, not reaches
    assert len(select([dog(), dog(), cat()], 0.3)) == 3  # doubles stay, as in GenEval
    assert len(select([dog(), dog(), cat()], 0.3, overlap=0.9)) == 2


def test_doubles_are_dropped_as_in_torchvision():
    generator = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(60, 2, generator=generator)
    boxes = torch.cat([corners, corners + 30 + 10 * torch.rand(60, 2, generator=generator)], 1)
    scores = torch.rand(60, generator=generator)
    things = [
        Detection("dog", "", (b[0], b[1], b[2], b[3]), s)
        for b, s in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    kept = nms(boxes, scores, 0.4).tolist()
    assert 4 < len(kept) <= 16
    assert select(things, 0.0, overlap=0.4) == [things[i] for i in kept]


def test_overall_is_the_mean_of_the_six_tasks_not_of_the_pictures():
    tags = list(rules.TASKS)
    assert rules.overall([1, 0, 0, 0, 0, 0], tags) == pytest.approx(1 / 6)
    more = [*tags, *["counting"] * 10]
    assert rules.overall([1, 0, 0, 0, 0, 0, *[1] * 10], more) == pytest.approx((1 + 10 / 11) / 6)
    with pytest.raises(ValueError, match="score all six tasks"):
        rules.overall([1, 1], ["counting", "colors"])
    with pytest.raises(ValueError, match="2 scores need as many tags but got 6"):
        rules.overall([1, 1], tags)


@needs_file
def test_every_prompt_of_geneval_says_what_its_metadata_says():
    entries = prompts.read_metadata(FILE)
    assert len(entries) == 553
    for prompt, entry in entries.items():
        assert prompts.parse(prompt) == entry, prompt
    assert {name for entry in entries.values() for name in entry.names} == set(prompts.CLASSES)
    # so that telling one class apart by colours changes nothing in GenEval
    assert all(len(e.names) == len(e.include) for e in entries.values())


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("a photo of a bench", Entry("single_object", (Expected("bench", "", 1),))),
        ("A photo of an orange", Entry("single_object", (Expected("orange", "", 1),))),
        ("a photo of an orange orange", Entry("colors", (Expected("orange", "orange", 1),))),
        (
            "a photo of four wine glasses",
            Entry("counting", (Expected("wine glass", "", 4),), (Expected("wine glass", "", 5),)),
        ),
        (
            "a photo of a hot dog and a dog",
            Entry("two_object", (Expected("hot dog", "", 1), Expected("dog", "", 1))),
        ),
        (
            "a photo of a red cow and a blue tv remote",
            Entry("color_attr", (Expected("cow", "red", 1), Expected("tv remote", "blue", 1))),
        ),
        (
            "a photo of a dog right of a teddy bear",
            Entry(
                "position",
                (Expected("teddy bear", "", 1), Expected("dog", "", 1, "right of", 0)),
            ),
        ),
    ],
)
def test_prompts_like_geneval_s_are_parsed(prompt, entry):
    assert prompts.parse(prompt) == entry


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dog",
        "a photo of a unicorn",
        "a photo of a dog on a bench",
        "a photo of a mauve dog",
        "a photo of a dog and a dog",
        "a photo of a dog and a red dog",
        "a photo of a dog, a cat and a cow",
    ],
)
def test_other_prompts_are_not_guessed_at(prompt):
    assert prompts.parse(prompt) is None


GOOD = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "p"}


def spoilt(**changes) -> str:
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"tag": "colors", "prompt": "p"}), "'include'"),
        (spoilt(tag="colours"), "the tag is 'colours'"),
        (spoilt(include=[]), "nothing is included"),
        (spoilt(include=[{"class": "dog", "count": 0}]), "the count of dog is 0"),
        (spoilt(include=[{"class": "dog", "count": True}]), "the count of dog is True"),
        (spoilt(include=[{"class": "", "count": 1}]), "the class is ''"),
        (spoilt(include=[{"class": "dog", "count": 1, "colour": "red"}]), "'colour'"),
        (spoilt(include=[{"class": "dog", "count": 1, "color": "mauve"}]), "'mauve'"),
        (spoilt(include=[{"class": "dog", "count": 1, "position": ["near", 0]}]), "'near'"),
        (spoilt(include=[{"class": "dog", "count": 1, "position": ["above", 0]}]), "earlier"),
        (spoilt(include=[{"class": "dog", "count": 1}] * 2), "included twice"),
        (spoilt(tag="counting", include=[{"class": "cat", "count": 1}]), "keep one of them"),
    ],
)
def test_a_line_that_is_no_entry_is_named(tmp_path, line, what):
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match="line 3 of") as error:
        prompts.read_metadata(file)
    assert what in str(error.value)


def test_a_file_that_is_absent_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no metadata file"):
        prompts.read_metadata(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        prompts.read_metadata(tmp_path / "empty.jsonl")


def test_a_prompt_may_hold_any_character_but_the_file_must_be_utf_8(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps(GOOD | {"prompt": "a\u2028b\x85"}, ensure_ascii=False), encoding="utf-8-sig"
    )
    assert list(prompts.read_metadata(tmp_path / "m.jsonl")) == ["a\u2028b"]
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"m\.jsonl is not UTF-8"):
        prompts.read_metadata(tmp_path / "m.jsonl")


def test_equal_lines_of_one_prompt_are_one_entry(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    (entry,) = prompts.read_metadata(tmp_path / "m.jsonl").values()
    assert entry == replace(RED, tag="colors")
    assert entry.names == ["dog"]
