"""Pictures on disk with their prompts: folders, metadata, runs of steer.py, broken files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rewards.samples import batches, load_batch, open_picture, read_samples


def picture(path, size=(8, 6), seed=0, prompt=None):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    info = PngInfo()
    if prompt is not None:
        info.add_itxt("parameters", json.dumps({"prompt": prompt}))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)
    return np.array(image)


def test_one_prompt_for_a_folder_in_the_order_of_names(tmp_path):
    for name in ("b.png", "a.png", "deep/c.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    samples = read_samples(tmp_path, "a star")
    assert [s.image.relative_to(tmp_path).as_posix() for s in samples] == [
        "a.png",
        "b.png",
        "deep/c.png",
    ]
    assert {s.prompt for s in samples} == {"a star"}
    assert samples[0].size == (6, 8)


def test_a_run_knows_its_prompts_and_its_grid_is_no_sample(tmp_path):
    picture(tmp_path / "0.png", prompt='the word "CAT"')
    picture(tmp_path / "grid.png")
    samples = read_samples(tmp_path)
    assert [(s.image.name, s.prompt) for s in samples] == [("0.png", 'the word "CAT"')]


def test_another_programs_parameters_are_no_prompt(tmp_path):
    info = PngInfo()
    info.add_itxt("parameters", "masterpiece, Steps: 20")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_samples(tmp_path, "a star")[0].prompt == "a star"
    with pytest.raises(ValueError, match="give prompt"):
        read_samples(tmp_path)


def test_metadata_as_hugging_face_writes_it(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a star"}\n\n')
    assert read_samples(tmp_path)[0].prompt == "a star"


def test_lines_with_references_become_tensors_and_pictures(tmp_path):
    bytes_of = {name: picture(tmp_path / name, seed=i) for i, name in enumerate(["a.png", "r.png"])}
    lines = [
        {"image": "a.png", "prompt": "one", "references": ["r.png"]},
        {"image": "a.png", "prompt": "two"},
    ]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    images, prompts, references = load_batch(read_samples(file))
    assert prompts == ["one", "two"]
    assert torch.equal(
        (images[0] * 255).round().byte().permute(1, 2, 0), torch.tensor(bytes_of["a.png"])
    )
    assert references is not None
    assert np.array_equal(np.array(references[0][0]), bytes_of["r.png"])
    assert references[1] == []


def test_batches_hold_neighbours_of_one_size(tmp_path):
    for i, size in enumerate([(8, 8), (8, 8), (8, 8), (9, 8), (8, 8)]):
        picture(tmp_path / f"{i}.png", size)
    names = [[s.image.stem for s in b] for b in batches(read_samples(tmp_path, "x"), 2)]
    assert names == [["0", "1"], ["2"], ["3"], ["4"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "is not an object"),
        ('{"image": "a.png"}', "needs both"),
        ('{"prompt": "x"}', "needs both"),
        ('{"image": "none.png", "prompt": "x"}', "none.png is no readable image"),
        ('{"image": "a.png", "prompt": "x", "references": "a.png"}', "write a list"),
        ("", "holds no image"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, message):
    picture(tmp_path / "a.png")
    file = tmp_path / "list.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_samples(file)


def test_what_is_no_folder_and_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        read_samples(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png is no readable image"):
        read_samples(tmp_path, "x")


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_more_than_8_bits_a_channel_are_refused_not_clipped(tmp_path, kind):
    Image.fromarray(np.full((8, 8), 40000, dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif has more than 8 bits per channel"):
        read_samples(tmp_path, "x")


def test_a_picture_that_ends_too_soon_is_named(tmp_path):
    picture(tmp_path / "a.png", (64, 64))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png cannot be read to its end"):
        open_picture(tmp_path / "a.png")
