"""Who descends from whom in a report, and the thumbnails that stand for them."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from saved_runs import noise, read, save

from steering import FeynmanKac
from tilt.report import genealogy, markup, thumbnails
from tilt.report import steered as page


def test_every_particle_of_every_score_is_in_the_genealogy(tmp_path):
    sizes = [8, 8, 5, 2]
    folder = save(tmp_path / "a", ["one"], sizes)
    found = read(page.write(folder))
    nodes = [(attrs, text) for attrs, text in found.all("span", "n")]
    places = [re.findall(r"--c:(\d+);--r:(\d+)", attrs["style"] or "")[0] for attrs, _ in nodes]
    assert places == [(str(c), str(r)) for c, k in enumerate(sizes) for r in range(k)]
    rewards = json.loads((folder / "lineage.json").read_text())["scores"][1]["rewards"][0]
    second = [node for (c, _), node in zip(places, nodes, strict=True) if c == "1"]
    for reward, (attrs, text) in zip(rewards, second, strict=True):
        assert f"reward {markup.short(reward)}\n" in (attrs["aria-label"] or "")
        assert text == markup.short(reward)
    assert all(attrs["tabindex"] == "0" for attrs, _ in nodes)


def brute_fates(parents: list[list[int]], best: int) -> list[list[str]]:
    """Walks up from every final particle."""
    columns = [set() for _ in range(len(parents) + 1)]
    marked = [set() for _ in range(len(parents) + 1)]
    for j in range(len(parents[-1])):
        place = j
        for c in range(len(parents), -1, -1):
            columns[c].add(place)
            if j == best:
                marked[c].add(place)
            place = parents[c - 1][place] if c else place
    sizes = [max(max(line) for line in parents) + 1] * len(parents) + [len(parents[-1])]
    return [
        ["best" if i in m else "alive" if i in c else "dead" for i in range(k)]
        for c, m, k in zip(columns, marked, sizes, strict=True)
    ]


def test_fates_are_those_of_the_lines_walked_back():
    parents = [[0, 0, 3, 3], [2, 2, 0, 3], [1, 0, 0, 2]]
    rewards = [[0.0] * 4] * 3 + [[0.1, 0.2, 0.9, 0.3]]
    tree = genealogy.Genealogy([0, 1, 2, 9], rewards, rewards, [4.0] * 4, [0.0] * 4, parents, [])
    assert genealogy.fates(tree) == brute_fates(parents, best=2)
    assert genealogy.fates(tree)[0] == ["alive", "dead", "dead", "best"]


@pytest.mark.parametrize("min_ess", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sizes", [[6, 6, 6, 6, 6], [8, 6, 3, 3]])
@pytest.mark.parametrize("reward_scale", [0.0, 0.01, 4.0])  # 0.01: resampled to one child each
def test_the_running_estimate_is_the_filter_s(tmp_path, min_ess, sizes, reward_scale):
    """log Ẑ of each score, which is not saved, from weights and ancestors."""
    settings = FeynmanKac(reward_scale=reward_scale, min_ess=min_ess)
    folder = save(tmp_path / "a", ["one", "two", "three"], sizes, settings=settings, previews=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    lineage = json.loads((folder / "lineage.json").read_text())
    for i, truth in enumerate(manifest["results"]["log_z"]):
        tree = genealogy.read(manifest, lineage, i)
        folds = [z for z, fold in zip(tree.log_z, [*tree.resampled, False], strict=True) if fold]
        weights = torch.tensor(manifest["results"]["log_weights"][i])
        mean = torch.logsumexp(weights, 0).item() - math.log(len(weights))
        assert (folds[-1] if folds else 0) + mean == pytest.approx(truth, abs=1e-5)


def test_edges_lead_to_each_child_once(tmp_path):
    folder = save(tmp_path / "a", ["one"], [5, 5, 5])
    html = page.write(folder).read_text("utf-8")
    paths = re.findall(r'<path class="(dead|alive|best)" d="([^"]*)"', html)
    assert sum(path.count("M") for _, path in paths) == 10
    (best,) = [path for fate, path in paths if fate == "best"]
    assert best.count("M") == 2  # one line through all columns


@pytest.mark.parametrize("sizes", [[3], [1], [1, 1, 1], [8, 4, 2, 1]])
def test_any_shape_of_a_run_is_written(tmp_path, sizes):
    folder = save(tmp_path / "a", ["one"], sizes)
    found = read(page.write(folder))
    assert len(found.all("img")) == sizes[-1]
    assert ("Nothing was scored" in page.write(folder).read_text("utf-8")) == (len(sizes) == 1)


def test_a_folder_without_previews_has_the_numbers_and_the_final_images(tmp_path):
    found = read(page.write(save(tmp_path / "a", ["one"], [4, 4, 4], previews=False)))
    assert len(found.all("span", "bare")) == 8
    assert len(found.all("span", "n")) == 12
    assert len(found.all("i")) == 4  # tiles, of the final images alone
    assert all("--s:0" in (attrs["style"] or "") for attrs, _ in found.all("span", "last"))


def test_without_resampling_every_line_is_straight_and_none_dies(tmp_path):
    settings = FeynmanKac(reward_scale=4.0, min_ess=0.0)
    found = read(page.write(save(tmp_path / "a", ["one"], [3, 3, 3], settings=settings)))
    fates = [attrs["class"] or "" for attrs, _ in found.all("span", "n")]
    assert not any("dead" in fate for fate in fates)
    assert sum("best" in fate for fate in fates) == 3
    heads = [text for _, text in found.all("span", "head")]
    assert ["kept" in text for text in heads] == [True, True, False]


def test_the_tiles_of_a_sprite_are_the_previews_and_then_the_final_images():
    g = torch.Generator().manual_seed(0)
    previews = Image.new("RGB", (2 * 40, 3 * 20), "red")
    finals = [Image.new("RGB", (400, 200), (10 * i, 0, 255)) for i in range(2)]
    found = thumbnails.sprite(finals, previews, (40, 20))
    assert (found.columns, found.rows, found.tile) == (3, 3, (40, 20))
    pixels = np.asarray(found.image)
    assert (pixels[:60, :80] == (255, 0, 0)).all()
    for i in range(2):
        assert (pixels[20 * i : 20 * i + 20, 80:] == (10 * i, 0, 255)).all()
    with pytest.raises(ValueError, match="not a whole number of tiles"):
        thumbnails.sprite(finals, noise(g, 81, 60), (40, 20))


def test_shrinking_a_sprite_mixes_no_neighbours():
    checks = np.indices((3, 4)).sum(0) % 2 * 255
    sheet = Image.fromarray(np.kron(checks, np.ones((64, 64))).astype(np.uint8)).convert("RGB")
    for side in (48, 40, 24, 12):
        small = np.asarray(thumbnails._shrunk(sheet, (4, 3), side))
        assert small.shape == (3 * side, 4 * side, 3)
        assert (small[..., 0] == np.kron(checks, np.ones((side, side)))).all()


def test_pictures_share_the_room_that_there_is():
    g = torch.Generator().manual_seed(0)
    images = [noise(g, 256, 256) for _ in range(40)]
    budget = thumbnails.Budget(40_000, len(images))
    encoded = [budget.encode(image) for image in images]
    assert budget.spent <= 40_000
    sides = [small.width for _, small in encoded]
    assert sides == sorted(sides, reverse=True)
    plenty = thumbnails.Budget(10**9, 1).encode(images[0])[1]
    assert plenty.width == 128
