"""Reference pictures: every way of giving them, what is drawn, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.references import digest, load_references

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NAMES = ("red", "green", "blue")
SIZE = (8, 12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, one of them in a folder of its own, and a file that is none."""
    (tmp_path / "more").mkdir()
    for name, colour in (("red.png", RED), ("green.JPG", GREEN), ("more/blue.png", BLUE)):
        Image.new("RGB", (20, 30), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def colours(drawn: Tensor) -> list[str]:
    return [NAMES[int(row.mean((1, 2)).argmax())] for row in drawn]


def png(colour: tuple[int, int, int]) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(target, "PNG")
    return target.getvalue()


def test_a_folder_is_drawn_from_without_repetition_whatever_the_prompts(folder):
    references = load_references(folder, SIZE, paired=False)
    assert len(references) == 3
    references.check(["anything"])
    drawn = references.draw(["a", "b", "c", "d"], generator())
    assert drawn.shape == (4, 3, *SIZE)
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert sorted(colours(drawn[:3])) == sorted(NAMES)
    once, again = (references.draw(list(names), generator(3)) for names in ("xy", "zx"))
    assert torch.equal(once, again)


def test_a_json_pairs_prompts_with_files_beside_it_or_is_one_style(folder):
    file = folder / "references.json"
    file.write_text(json.dumps({"warm": ["red.png"], "cold": ["green.JPG", "more/blue.png"]}))
    references = load_references(file, SIZE, paired=True)
    prompts = ["warm", "cold", "warm", "cold", "cold"]
    drawn = colours(references.draw(prompts, generator()))
    assert drawn[0] == drawn[2] == "red"
    assert sorted([drawn[1], drawn[3]]) == ["blue", "green"]
    with pytest.raises(ValueError, match=r"2 prompts have no reference image, \['mild', 'hot'\]"):
        references.draw(["mild", "warm", "hot", "mild"], generator())
    assert len(load_references(file, SIZE, paired=False)) == 3


def test_tables_of_images_are_read_as_datasets_writes_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (9, 9), colour) for colour in (RED, GREEN, BLUE)],
        "prompt": ["warm", "cold", "cold"],
    }
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    table.to_parquet(tmp_path / "train.parquet")
    for source in (tmp_path / "saved", tmp_path / "train.parquet", tmp_path):
        references = load_references(source, (9, 9), paired=True)
        assert len(references) == 3
        assert colours(references.draw(["warm", "warm"], generator())) == ["red", "red"]
        both = colours(references.draw(["cold", "cold"], generator()))
        assert sorted(both) == ["blue", "green"]


def test_bytes_and_paths_in_a_table_need_no_datasets(folder):
    cells = [png(RED), png(BLUE)]
    pq.write_table(pa.table({"image": cells}), folder / "bytes.parquet")
    assert len(load_references(folder / "bytes.parquet", SIZE, paired=False)) == 2
    cells = [{"bytes": None, "path": "red.png"}, {"bytes": png(BLUE), "path": "gone.png"}]
    pq.write_table(pa.table({"image": cells}), folder / "structs.parquet")
    drawn = load_references(folder / "structs.parquet", SIZE, paired=False).draw(
        ["", ""], generator()
    )
    assert sorted(colours(drawn)) == ["blue", "red"]
    with pytest.raises(ValueError, match=r"columns \['image'\] but \['prompt'\] are needed"):
        load_references(folder / "bytes.parquet", SIZE, paired=True)


def test_pictures_keep_their_shape_their_middle_and_their_upright(tmp_path):
    tall = np.zeros((40, 10, 3), np.uint8)
    tall[15:25] = 255  # the middle square
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(tall.transpose(1, 0, 2)).save(tmp_path / "lying.png", exif=exif)
    Image.fromarray(tall).save(tmp_path / "standing.png")
    drawn = load_references(tmp_path, (10, 10), paired=False).draw(["", ""], generator())
    assert torch.equal(drawn, torch.ones(2, 3, 10, 10))


def test_too_few_pictures_are_refused(folder):
    empty = folder / "empty"
    empty.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "more" / "blue.png")
    for source, count in ((empty, 0), (folder / "more", 1)):
        with pytest.raises(ValueError, match=f"{source.name}: .* at least two .* but got {count};"):
            load_references(source, SIZE, paired=False)


def test_pictures_that_cannot_be_read_are_named(folder):
    whole = (folder / "red.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[:60])
    (folder / "text.png").write_text("not a picture")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    with pytest.raises(ValueError, match="3 of 6 reference images cannot be read") as caught:
        load_references(folder, SIZE, paired=False)
    for name in ("torn.png", "text.png", "deep.png (more than 8 bits"):
        assert name in str(caught.value)
    file = folder / "references.json"
    file.write_text(json.dumps({"warm": ["red.png"], "cold": ["gone.png"]}))
    with pytest.raises(ValueError, match=r"1 of 2 .*gone\.png"):
        load_references(file, SIZE, paired=True)
    pq.write_table(pa.table({"image": [png(RED), b"torn"]}), folder / "torn.parquet")
    with pytest.raises(ValueError, match=r"1 of 2 .* row '' 1 \(cannot identify"):
        load_references(folder / "torn.parquet", SIZE, paired=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold"),
        ('{"a": "x.png"}', "must hold"),
        ('{"a": [1]}', "must hold"),
        ("{}", "at least two reference images but got 0"),
        ('{"a": []}', "at least two reference images but got 0"),
    ],
)
def test_a_json_of_another_form_is_refused(tmp_path, text, sentence):
    file = tmp_path / "references.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_references(file, SIZE, paired=True)


def test_sources_that_are_not_there_or_lack_prompts_are_refused(folder):
    with pytest.raises(ValueError, match=r"holds images but not their prompts; give a .json"):
        load_references(folder, SIZE, paired=True)
    for source in ("/nowhere/at/all", "/nowhere/at/all.json"):
        with pytest.raises(ValueError, match=r"neither a folder, a .json nor a .parquet file"):
            load_references(source, SIZE, paired=False)


def test_other_pictures_under_the_same_names_have_another_digest(folder):
    before = digest(folder, paired=False)
    assert digest(folder, paired=False) == before
    Image.new("RGB", (20, 30), BLUE).save(folder / "red.png")
    assert digest(folder, paired=False) != before
    table = folder / "table.parquet"
    found = set()
    for colour in (RED, BLUE):
        pq.write_table(pa.table({"image": [png(colour), png(GREEN)], "prompt": ["a", "b"]}), table)
        found |= {digest(table, paired=paired) for paired in (False, True)}
    assert len(found) == 4
    pairs = folder / "pairs.json"
    pairs.write_text(json.dumps({"a": ["red.png", "more/blue.png"]}))
    before = digest(pairs, paired=True)
    Image.new("RGB", (20, 30), GREEN).save(folder / "more/blue.png")
    assert digest(pairs, paired=True) != before


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "", '{"_data_files": 3}', '{"_data_files": [[]]}', "[" * 5000]
)
def test_a_data_set_whose_state_is_nonsense_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"state\.json (does not list tables, as|is not valid JSON)"
    ):
        load_references(tmp_path, SIZE, paired=False)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    for source, name in ((tmp_path, "gone.arrow"), (tmp_path / "bad.parquet", "bad.parquet")):
        with pytest.raises(ValueError, match=rf"{name} is no readable table .*; repair it"):
            load_references(source, SIZE, paired=False)
