"""What tells a reward from what the same spec once meant: code, files, folders, modules."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rewards import catalogue as names
from rewards import identity


def test_equal_specs_are_alike_and_others_are_not_their_business():
    assert identity("jpeg") == identity("0.5*jpeg + ocr")
    assert len(identity("jpeg")) == 12
    with pytest.raises(ValueError, match="there is no reward 'jpegg'"):
        identity("jpegg")


def test_the_code_of_this_package_counts_but_not_what_python_makes_of_it(tmp_path):
    own = shutil.copytree(Path(names.__file__).parent, tmp_path / "rewards")
    for folder in own.rglob("__pycache__"):
        shutil.rmtree(folder)
    assert names._content(own, own.rglob("*")) == names._own()
    (own / "__pycache__").mkdir()
    (own / "__pycache__" / "jpeg.pyc").touch()
    assert names._content(own, own.rglob("*")) == names._own()
    with (own / "jpeg.py").open("a") as file:
        file.write("# another\n")
    assert names._content(own, own.rglob("*")) != names._own()


def test_files_and_folders_and_modules_that_a_spec_names_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder, scale, module = tmp_path / "critic", tmp_path / "scale.json", tmp_path / "mine_own.py"
    folder.mkdir()
    weights = folder / "critic.safetensors"
    for file in (weights, scale, module):
        file.write_bytes(b"one")
    specs = {
        f"ocr + 0.5*critic({folder})": weights,
        f"min(ocr, calibrated(jpeg, file={scale}))": scale,
        "mine_own:reward": module,
    }
    for spec, file in specs.items():
        before = identity(spec)
        assert identity(spec) == before
        file.write_bytes(b"two")
        assert identity(spec) != before, spec


def test_no_more_than_the_folder_itself_is_read_and_nothing_that_does_not_end(tmp_path):
    (tmp_path / "deep").mkdir()
    before = identity(f"clip({tmp_path})")
    (tmp_path / "deep" / "file").touch()
    assert identity(f"clip({tmp_path})") == before
    assert identity("clip(/dev/zero)") == identity("clip(nowhere)")
    assert identity("clip(/)")


def test_of_large_files_both_ends_and_the_size_are_looked_at(tmp_path):
    file, seen = tmp_path / "weights", set()
    size = 5 * names.MEGABYTE
    for place in (0, 1000, size - 1):
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        seen.add(names._content(file, [file]))
    file.write_bytes(bytes(size + 1))
    seen.add(names._content(file, [file]))
    assert len(seen) == 4
