"""The report of a run: read back by a parser of HTML, its numbers held against the folder's."""

import itertools
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import steering
from steering import FeynmanKac
from steering.filter import close, final_log_z, resample, start, weigh
from steering.lineage import Lineage, Score
from steering.report import genealogy, markup, page, thumbnails

VOID = {"meta", "img", "br", "path", "circle", "link", "hr"}
NASTY = [
    '<script>alert("1")</script>',
    "\"'><img src=x onerror=alert(1)>",
    "مرحبا بالعالم \u202e<b>",
    "👩‍🚀 a & b &amp; {curly} {0} %s </style></main>",
    "half a pair \ud83d and a\nline",
]


class Page(HTMLParser):
    """The elements, each with its attributes and text; refuses tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        name, _ = self._open.pop()
        assert name == tag, (name, tag, self.getpos())

    def handle_data(self, data):
        for _, place in self._open:
            self.texts[place] = self.texts.get(place, "") + data

    def all(self, tag: str, kind: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, self.texts.get(i, ""))
            for i, (name, attrs) in enumerate(self.elements)
            if name == tag and (not kind or kind in (attrs.get("class") or "").split())
        ]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def noise(generator: torch.Generator, width: int, height: int, smooth: int = 1) -> Image.Image:
    size = (height // smooth, width // smooth, 3)
    values = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def save(
    folder: Path,
    prompts: list[str],
    sizes: list[int],
    *,
    settings: FeynmanKac | None = None,
    previews: bool = True,
    side: int = 64,
    seed: int = 0,
    components: bool = False,
    smooth: int = 1,
) -> Path:
    """A folder as `Steered.save` writes it. sizes: particles at each score, then of the end."""
    settings = settings or FeynmanKac(reward_scale=4.0)
    g = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    b, state, scores = len(prompts), start(len(prompts), sizes[0]), []
    for i, (k, num) in enumerate(itertools.pairwise(sizes)):
        rewards = torch.rand(b, k, generator=g)
        state = weigh(state, rewards, settings, (i + 1) / len(sizes))
        before = state.log_weights
        state, ancestors, ess = resample(state, settings, g, num)
        scores.append(Score(i + 1, rewards, before, ess, ancestors))
    final = torch.rand(b, sizes[-1], generator=g)
    state = close(state, final, settings)
    files = [[f"{i:04d}-{j:02d}.png" for j in range(sizes[-1])] for i in range(b)]
    for names in files:
        for name in names:
            noise(g, side, side, smooth).save(folder / name)
    parts = {"ocr <b>": final / 2, "clip": final / 4} if components else {"ocr": final}
    results = {
        "prompts": prompts,
        "files": files,
        "rewards": final.tolist(),
        "components": {name: part.tolist() for name, part in parts.items()},
        "log_weights": state.log_weights.tolist(),
        "log_z": final_log_z(state).tolist(),
    }
    manifest = {
        "prompts": prompts,
        "model": "tiny-sd3",
        "pipeline": "StableDiffusion3Pipeline",
        "reward": "ocr + 'x' <i>",
        "particles": sizes[0],
        "seed": 3,
        "settings": {
            "reward_scale": settings.reward_scale,
            "min_ess": settings.min_ess,
            "potential": "difference",
        },
        "pipeline_keywords": {"num_inference_steps": 20},
        "versions": {"torch": "2.14.1"},
        "weights": {"transformer": "0123456789abcdef"},
        "results": results,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    lineage = Lineage(20, tuple(scores)).to_json()
    if previews and scores:
        names = [f"previews-{i:04d}.webp" for i in range(b)]
        lineage["previews"] = {"files": names, "tile": [64, 64]}
        for name in names:
            sheet = noise(g, 64 * len(scores), 64 * sizes[0], smooth)
            sheet.save(folder / name, quality=80)
    (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    return folder


def save_run(out: Path, prompts: list[str], sizes: list[int], compare: bool = True, **more) -> Path:
    for i, prompt in enumerate(prompts):
        folder = out / f"{i:04d}-slug"
        save(folder / "steered", [prompt], sizes, seed=i, **more)
        if compare:
            plain = FeynmanKac(reward_scale=4.0, min_ess=0.0)
            few = {"side": more.get("side", 64), "smooth": more.get("smooth", 1)}
            save(folder / "plain", [prompt], [sizes[0]], settings=plain, seed=i, **few)
    manifest = {
        "settings": {"reward": "ocr", "particles": sizes[0]},
        "machine": {"device": "cpu"},
        "prompts": [{"text": prompt, "seed": 0, "references": []} for prompt in prompts],
        "command": ["steer.py", *prompts, "--reward", "ocr", "--out", "x y"],
        "versions": {"torch": "2.14.1"},
    }
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


def results_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text("utf-8"))["results"]


def values(html: str) -> list[float]:
    return [float(attrs["value"] or "") for attrs, _ in Page(html).all("data")]


def test_rewards_and_components_are_those_of_the_manifest(tmp_path):
    folder = save(tmp_path / "a", ["one", "two"], [4, 4, 4], components=True)
    found, results = read(page.write(folder)), results_of(folder)
    in_page = [float(attrs["value"] or "") for attrs, _ in found.all("data")]
    for i in range(2):
        assert max(results["rewards"][i]) in in_page
        assert results["log_z"][i] in in_page
        for values in (results["rewards"][i], *(p[i] for p in results["components"].values())):
            assert set(values) <= set(in_page)
    captions = [text for _, text in found.all("figcaption") if "ocr <b>" in text]
    assert len(captions) == 8
    assert [i for i, text in enumerate(captions) if text.startswith("best")] == [
        int(np.argmax(results["rewards"][0])),
        4 + int(np.argmax(results["rewards"][1])),
    ]


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


def test_the_baselines_are_the_first_and_the_best_plain_sample(tmp_path):
    out = save_run(tmp_path / "run", ["one", "two"], [4, 4, 4])
    found = read(page.write_run(out))
    hrefs = [attrs["href"] or "" for attrs, _ in found.all("a")]
    for i in range(2):
        rewards = results_of(out / f"{i:04d}-slug" / "plain")["rewards"][0]
        best = int(np.argmax(rewards))
        assert f"./{i:04d}-slug/plain/0000-00.png" in hrefs
        assert f"./{i:04d}-slug/plain/0000-{best:02d}.png" in hrefs
        cells = [attrs for attrs, _ in found.all("data")]
        shown = [float(attrs["value"] or "") for attrs in cells]
        assert {rewards[0], rewards[best]} <= set(shown)
    for href in hrefs:
        assert href.startswith("#") or (out / href).exists()


def test_the_summary_holds_every_prompt_and_the_means(tmp_path):
    out = save_run(tmp_path / "run", ["one", "two", "three"], [4, 4])
    table = page.write_run(out).read_text("utf-8").partition("<tfoot>")
    means = values(table[2].partition("</tfoot>")[0])
    steered = [results_of(out / f"{i:04d}-slug/steered")["rewards"][0] for i in range(3)]
    plain = [results_of(out / f"{i:04d}-slug/plain")["rewards"][0] for i in range(3)]
    expected = [
        np.mean([row[0] for row in plain]),
        np.mean([max(row) for row in plain]),
        np.mean([max(row) for row in steered]),
        np.mean(steered),
    ]
    assert means == pytest.approx(expected)


def test_the_command_is_the_one_that_was_given(tmp_path):
    out = save_run(tmp_path / "run", NASTY[:4], [2, 2], compare=False)
    (command,) = [text for _, text in read(page.write_run(out)).all("code")]
    assert shlex.split(command)[2:] == [*NASTY[:4], "--reward", "ocr", "--out", "x y"]


def test_a_folder_alone_says_the_call_that_repeats_it(tmp_path, monkeypatch):
    folder = save(tmp_path / "a", NASTY, [4, 2])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"] |= {"funnel": [2], "num_scores": 1}
    manifest |= {
        "guidance_interval": [0.0, 0.5],
        "reward": "ocr\nraise SystemExit",
        "model": "\r1/0",
    }
    prompts = manifest["prompts"] = [*NASTY, "steer( a boat"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (code,) = [text for _, text in read(page.write(folder)).all("code")]
    code = code.replace("\ufffd", "\ud83d")  # a page cannot hold half a pair
    called = {}

    def steer(*given, **named):
        called.update(named, given=given)

    # not by its attribute, which would import diffusers
    monkeypatch.setitem(vars(steering), "steer", steer)
    exec(code, {"pipe": "P", "reward": "R"})
    assert called.pop("given") == ("P", prompts, "R")
    assert called.pop("settings") == FeynmanKac(reward_scale=4.0, num_scores=1, funnel=(2,))
    more = {"num_inference_steps": 20, "guidance_interval": (0.0, 0.5)}
    assert called == {"particles": 4, "seed": 3} | more


def test_prompts_stay_text(tmp_path):
    for path in (
        page.write_run(save_run(tmp_path / "run", NASTY, [2, 2], compare=False, components=True)),
        page.write(save(tmp_path / "alone", NASTY, [2, 2], components=True)),
    ):
        found = read(path)
        tags = {tag for tag, _ in found.elements}
        assert not tags & {"script", "iframe", "object", "link", "form", "base"}
        assert len(found.all("style")) == 1
        for attrs in (attrs for _, attrs in found.elements):
            assert not [name for name in attrs if name.startswith("on")]
        heads = [text for _, text in found.all("h2")]
        for prompt in NASTY[:4]:
            assert prompt in heads
        for attrs, _ in found.all("a"):
            assert (attrs["href"] or "").startswith(("./", "#"))
        for attrs, _ in found.all("bdi"):
            assert attrs["dir"] == "auto"


def test_the_policy_forbids_scripts_and_the_network(tmp_path):
    html = page.write(save(tmp_path / "a", ["one"], [2, 2])).read_text("utf-8")
    found = Page(html)
    (policy,) = [
        attrs["content"] or ""
        for attrs, _ in found.all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'")
    for attrs, _ in found.all("img"):
        assert (attrs["src"] or "").startswith("data:image/webp;base64,")
        assert attrs["alt"]
    assert "http://" not in html
    assert "https://" not in html
    assert re.findall(r"url\((?!data:)", html) == []


def luminance(colour: str) -> float:
    """Of "#rrggbb", as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = (Path(page.__file__).parent / "page.css").read_text("utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w{6})", css.split(":root")[theme + 1]))
    for name in ("ink", "soft", "best", "warn"):
        assert contrast(colours[name], colours["back"]) >= 4.5, name
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    for name in ("alive", "dead", "c0", "c1", "c2", "c3"):
        assert contrast(colours[name], colours["back"]) >= 3, name


def test_file_names_are_addresses_of_the_folder_s_own_files(tmp_path):
    assert markup.link("javascript:alert(1).png") == "./javascript%3Aalert%281%29.png"
    assert markup.link('a/"b" #?.png') == "./a/%22b%22%20%23%3F.png"
    folder = save(tmp_path / "a", ["one"], [2, 2])
    noise(torch.Generator(), 8, 8).save(tmp_path / "secret.png")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["results"]["files"][0][0] = "../secret.png"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a file of its own"):
        page.write(folder)


def test_what_is_no_saved_run_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*manifest\.json"):
        page.write(tmp_path)
    run = save_run(tmp_path / "run", ["one"], [2, 2])
    (run / "lineage.json").write_text('{"num_steps": 1, "scores": []}')
    with pytest.raises(ValueError, match="write_run"):
        page.write(run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match="no finished prompt"):
        page.write_run(tmp_path / "empty")
    one, other = save(tmp_path / "a", ["one"], [3, 3]), save(tmp_path / "b", ["one"], [2, 2])
    (one / "lineage.json").write_bytes((other / "lineage.json").read_bytes())
    with pytest.raises(ValueError, match="different runs"):
        page.write(one)
    with pytest.raises(ValueError, match="other prompts"):
        page.write(other, save(tmp_path / "c", ["two"], [2]))


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    out = save_run(tmp_path / "run", ["one", "two"], [2, 2])
    (out / "0001-slug" / "steered" / "manifest.json").unlink()
    found = read(page.write_run(out))
    assert [text for _, text in found.all("p", "warn")] == [
        "1 of the run’s prompts are not finished."
    ]
    assert len(found.all("section")) == 1


def test_the_page_does_not_depend_on_where_it_was_written(tmp_path):
    """runs.keep() saves under another name and renames."""
    folder = save(tmp_path / ".part" / "steered", ["one"], [3, 2])
    before = page.write(folder).read_bytes()
    moved = (tmp_path / ".part").rename(tmp_path / "0000-one") / "steered"
    assert page.write(moved).read_bytes() == before
    assert Page(before.decode()).all("title")[0][1] == "one"


def test_writing_leaves_nothing_else_and_can_be_repeated(tmp_path):
    folder = save(tmp_path / "a", ["one"], [2, 2])
    before = sorted(folder.iterdir())
    first = page.write(folder).read_bytes()
    assert page.write(folder).read_bytes() == first
    assert sorted(folder.iterdir()) == sorted([*before, folder / "report.html"])


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
    with pytest.raises(ValueError, match="no whole number of tiles"):
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


def test_a_hundred_prompts_of_sixteen_particles_stay_below_15_mb(tmp_path):
    # noise of 8 x 8 px, smoothed: more to encode than most pictures have
    out = save_run(tmp_path / "run", ["one", "two"], [16] * 9, smooth=8)
    for i in range(2, 100):
        shutil.copytree(out / f"{i % 2:04d}-slug", out / f"{i:04d}-slug")
    path = page.write_run(out)
    assert 2e6 < path.stat().st_size < 15e6
    html = path.read_text(encoding="utf-8")
    assert html.count("<section") == 100
    assert html.count('<span class="n ') == 100 * 16 * 9
    assert html.count("<img") == 100 * (16 + 2)
    assert "<details open" not in html


def test_what_has_no_room_is_left_to_its_folder(tmp_path, monkeypatch):
    out = save_run(tmp_path / "run", [f"prompt {i}" for i in range(5)], [2, 2], compare=False)
    monkeypatch.setattr(page, "_MOST", 30_000)
    found = read(page.write_run(out))
    shown = len(found.all("section"))
    assert 1 <= shown < 5
    assert f"The last {5 - shown} prompts have no room" in found.all("p", "warn")[0][1]
    linked = [attrs["href"] or "" for attrs, _ in found.all("a")]
    assert [href for href in linked if href[:2] == "#p"] == [f"#p{i}" for i in range(shown)]
    assert sum("prompt " in text for _, text in found.all("bdi")) == 5 + shown
