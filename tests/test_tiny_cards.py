"""The embedded models' cards: metadata, a picture, code that runs, and templates that still fit."""

import json
import re
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from pictures import assert_same_picture
from PIL import Image

from rewards.towers.sources import towers
from scripts.tiny import cards, evaluate, export, grids
from steering import tiny
from tilt.report.grid import GAP

MODELS = list(cards.FOLDERS)
PIPELINES = {"tiny-sd3": "StableDiffusion3Pipeline", "tiny-sd": "StableDiffusionPipeline"}


def text_of(name):
    return (cards.FOLDERS[name] / "README.md").read_text(encoding="utf-8")


def tables(text):
    """The lines of each Markdown table."""
    return [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def one(pattern, text):
    (found,) = re.findall(pattern, text)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_metadata_is_what_the_hub_reads(name):
    text = text_of(name)
    assert text.startswith("---\n")
    data: Any = huggingface_hub.ModelCard(text).data
    assert data.license == "apache-2.0"
    assert "synthetic-data" in data.tags
    libraries = {"clip": "open_clip", "dino": "transformers", "aesthetic": None}
    assert data.library_name == libraries.get(name, "diffusers")


@pytest.mark.parametrize("name", MODELS)
def test_a_card_shows_its_grid_and_says_what_drew_it(name):
    text = text_of(name)
    alternative, file = one(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert file == cards.GRID
    assert len(alternative) > 80
    assert f"python -m scripts.tiny.grids --models {name}`" in text
    path = cards.FOLDERS[name] / file
    assert path.stat().st_size < 250_000
    with Image.open(path) as image:
        assert image.width >= 800


@pytest.mark.parametrize("name", MODELS)
def test_the_code_of_a_card_runs(name):
    names = {}
    code = re.findall(r"```python\n(.+?)```", text_of(name), re.DOTALL)
    assert len(code) == 1
    exec(code[0], names)
    if name in PIPELINES:
        assert names["image"].size == (64, 64)
        assert type(names["pipe"]).__name__ == PIPELINES[name]
    else:
        scores = names["scores"]
        assert scores[0] > scores[1]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_pipelines_card_is_its_template_with_its_figures(name):
    text, folder = text_of(name), cards.FOLDERS[name]
    again = cards.card(
        "pipeline",
        name=name,
        kind=json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"],
        parameters=evaluate.parameters(folder),
        training=one(r"Training: (.+ minutes?) of one", text),
        defaults=", ".join(f"{key}={value}" for key, value in tiny.call_defaults(name).items()),
        each=100,
        rows=tables(text)[0][2:],
    )
    assert again == text


def test_the_rewards_cards_are_their_templates_with_their_figures():
    text = text_of("clip")
    count = evaluate.parameters(cards.FOLDERS["clip"])
    training, share = one(r"Training: (.+) \(`", text), one(r"captions: (.+)\n", text)
    assert cards.card("clip", parameters=count, training=training, share=share) == text
    text = text_of("dino")
    count, (neighbours, ranks) = evaluate.parameters(cards.FOLDERS["dino"]), tables(text)
    training = one(r"Training: (.+) \(`", text)
    again = cards.card(
        "dino", parameters=count, training=training, neighbours=neighbours, ranks=ranks
    )
    assert again == text
    text = text_of("aesthetic")
    again = cards.card(
        "aesthetic",
        parameters=towers("tiny").width + 1,
        training=one(r"closed form, (.+)\n", text),
        steps=one(r"prompt and seed: (.+),\n", text),
        tables=[one(r"\n(Held-out .+)\n", text), "", *tables(text)[0]],
    )
    assert again == text


def test_export_leaves_the_card_and_its_picture(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "config.json").write_text('{"dtype": "float16"}')
    for name in ("README.md", cards.GRID, "old.json"):
        (target / name).write_text(name)
    export.export_folder(source, target)
    assert sorted(file.name for file in target.iterdir()) == [
        "README.md",
        "config.json",
        "grid.png",
    ]
    assert (target / cards.GRID).read_text() == cards.GRID


def test_neighbours_are_those_of_a_sort():
    rng = torch.Generator().manual_seed(0)
    queries, pool = (torch.randn(n, 5, generator=rng) for n in (3, 20))
    found = grids.nearest(queries, pool, 4)
    for query, row in zip(queries, found, strict=True):
        cosines = (pool @ query).numpy()
        assert [i for i, _ in row] == np.argsort(-cosines)[:4].tolist()
        assert [c for _, c in row] == pytest.approx(np.sort(cosines)[::-1][:4].tolist(), abs=1e-5)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(grids, "TASKS", ("colors", "text"))
    monkeypatch.setattr(grids, "HELD_OUT", ("colors",))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "tiny-sd" else ()) for n in MODELS]
)
def test_few_cells_are_drawn_quickly_and_twice_the_same(name, tmp_path, few_rows):
    for folder in (tmp_path / "a", tmp_path / "b"):
        grids.main(["--models", name, "--columns", "2", "--out", str(folder)])
    first, again = ((tmp_path / folder / f"{name}.png").read_bytes() for folder in "ab")
    assert first == again
    with Image.open(tmp_path / "a" / f"{name}.png") as image:
        assert image.width == GAP + 2 * (grids.SIDE + GAP)


def test_a_pipelines_column_is_the_seed_that_it_names(few_rows, monkeypatch):
    monkeypatch.setattr(grids, "SIZE", 12)  # a label of one line, over two columns
    page = grids.pipeline_grid("tiny-sd", 2)
    prompt = evaluate.prompts_of("colors", False, 1)
    (picture,) = evaluate.generate("tiny-sd", prompt, seed=1)
    left, top = GAP + grids.SIDE + GAP, 2 * 12 + 12 * 4 // 3
    cell = page.crop((left, top, left + grids.SIDE, top + grids.SIDE)).resize((64, 64), 0)
    assert_same_picture(cell, picture)


def test_one_column_is_refused(capsys):
    with pytest.raises(SystemExit):
        grids.main(["--columns", "1"])
    assert "--columns is 1" in capsys.readouterr().err
