"""The rendered world: what training sees, what it never sees, and how prompts become tokens."""

import json

import numpy as np
import pytest
import torch

from scripts.tiny import models
from scripts.tiny.train_vae import SHARES, pictures
from scripts.tiny.world import (
    FONT_SIZE,
    RELATIONS,
    SHAPES,
    TASKS,
    UNSEEN_PAIRS,
    UNSEEN_POSITIONS,
    UNSEEN_WORDS,
    WORDS,
    render,
    scene,
    seen_pairs,
)
from steering import tiny


def test_vocabulary_is_large_and_held_out_words_are_never_trained_on():
    assert len(set(WORDS)) >= 60
    assert len(set(UNSEEN_WORDS)) >= 40
    assert not set(WORDS) & set(UNSEEN_WORDS)
    assert 14 <= FONT_SIZE <= 20
    assert all(3 <= len(word) <= 4 for word in (*WORDS, *UNSEEN_WORDS))


def test_training_never_draws_what_is_held_out():
    rng = np.random.default_rng(0)
    for i in range(4000):
        drawn = scene(rng, TASKS[i % len(TASKS)])
        assert drawn.word not in UNSEEN_WORDS
        assert not {(thing.colour, thing.shape) for thing in drawn.things} & UNSEEN_PAIRS
        if drawn.task == "position":
            (relation,) = [r for r in RELATIONS if f" {r} " in drawn.prompt]
            a, b = (thing.shape for thing in drawn.things)
            assert (a, relation, b) not in UNSEEN_POSITIONS


@pytest.mark.parametrize("task", ["text", "colors", "color_attr", "position"])
def test_unseen_scenes_hold_something_held_out(task):
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawn = scene(rng, task, unseen=True)
        pairs = {(thing.colour, thing.shape) for thing in drawn.things}
        if task == "text":
            assert drawn.word in UNSEEN_WORDS
        elif task == "position":
            (relation,) = [r for r in RELATIONS if f" {r} " in drawn.prompt]
            assert (drawn.things[0].shape, relation, drawn.things[1].shape) in UNSEEN_POSITIONS
        else:
            assert pairs & UNSEEN_PAIRS


def test_every_colour_and_shape_is_seen():
    pairs = seen_pairs()
    assert {shape for _, shape in pairs} == set(SHAPES)
    assert len({colour for colour, _ in pairs}) == 6


def test_pictures_are_64_pixels_and_repeat_with_the_seed():
    images, prompts = pictures(50, seed=9)
    again, same = pictures(50, seed=9)
    assert images.shape == (50, 3, 64, 64)
    assert (images == again).all()
    assert prompts == same
    assert abs(sum(SHARES.values()) - 1) < 1e-9


def test_things_lie_where_the_prompt_says():
    rng = np.random.default_rng(2)
    for _ in range(300):
        drawn = scene(rng, "position")
        a, b = drawn.things
        if " left of " in drawn.prompt:
            assert a.x + 10 < b.x
        if " below " in drawn.prompt:
            assert a.y - 10 > b.y


def test_drawn_things_stay_inside_the_picture():
    rng = np.random.default_rng(3)
    for i in range(300):
        drawn = scene(rng, TASKS[i % 6])
        pixels = np.array(render(drawn))
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == np.array(drawn.background)).all()


def test_words_are_spelled_and_known_words_are_tokens():
    tok = models.tokenizer()

    def names(text):
        return tok.convert_ids_to_tokens(tok(text).input_ids)

    assert names("an orange star left of a blue square")[1:-1] == [
        "an",
        "orange",
        "star",
        "left",
        "of",
        "a",
        "blue",
        "square",
    ]
    assert names('the word "CRAB"')[3:-1] == ['"', "c", "r", "a", "b", '"']
    assert names("the word “crab”") == names('the word "CRAB"')
    assert max(tok.get_vocab().values()) == tok.eos_token_id


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_is_trained_has_weights_of_its_own(name):
    embedded, new = tiny.load(name), models.pipeline(name, models.vae())
    for part in (*models.TRAINED, "vae", "text_encoder_3"):
        if (old := getattr(embedded, part, None)) is None:
            continue
        weights, others = old.state_dict(), getattr(new, part).state_dict()
        same = all(torch.equal(weight, others[n]) for n, weight in weights.items())
        assert same == (part == "text_encoder_3")
    ids = models.token_ids(new.tokenizer, ["a red star", ""])
    assert (new.text_encoder(ids)[0] != 0).any()
    if name == "tiny-sd3":  # its T5 says nothing, whatever it is asked
        assert (new.text_encoder_3(torch.ones(1, 4, dtype=torch.int64))[0] == 0).all()


def test_the_list_of_held_out_things_is_a_readable_file():
    from scripts.tiny import world

    text = (world.Path(world.__file__).parent / "unseen.json").read_text(encoding="utf-8")
    assert set(json.loads(text)) == {"words", "colour_shape", "positions"}
