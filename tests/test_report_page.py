"""The report of a run: read back by a parser of HTML, its numbers held against the folder's."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_runs import NASTY, Page, noise, read, results_of, save, save_run, values

import steering
from steering import FeynmanKac
from tilt.report import markup
from tilt.report import steered as page


def test_rewards_and_components_are_those_of_the_manifest(tmp_path):
    folder = save(tmp_path / "a", ["one", "two"], [4, 4, 4], components=True)
    found, results = read(page.write(folder)), results_of(folder)
    in_page = [float(attrs["value"] or "") for attrs, _ in found.all("data")]
    for i in range(2):
        assert max(results["rewards"][i]) in in_page
        assert results["log_z"][i] in in_page
        for row in (results["rewards"][i], *(p[i] for p in results["components"].values())):
            assert set(row) <= set(in_page)
    captions = [text for _, text in found.all("figcaption") if "ocr <b>" in text]
    assert len(captions) == 8
    assert [i for i, text in enumerate(captions) if text.startswith("best")] == [
        int(np.argmax(results["rewards"][0])),
        4 + int(np.argmax(results["rewards"][1])),
    ]


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
    css = (Path(page.__file__).parent / "templates/page.css").read_text("utf-8")
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
    with pytest.raises(ValueError, match="not a file inside it"):
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
    assert [text for _, text in found.all("p", "warn")] == ["The run has 1 unfinished prompt."]
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


@pytest.mark.parametrize("compare", [False, True])
def test_what_is_shown_is_explained_where_it_stands(tmp_path, compare):
    html = page.write_run(save_run(tmp_path / "run", ["one"], [4, 4], compare=compare)).read_text()
    found = Page(html)
    notes = " ".join(text for tag in ("p", "ul", "li") for _, text in found.all(tag, "note"))
    for term in ("A column", "The bar", "λ is", "“log Ẑ” is", "ESS", "Effective sample size"):
        assert term in html, term
    assert ("best of 4" in notes) == compare
    # λ in the report's own number: 1/4 more is e times as likely
    assert "higher by 1/λ = 0.25 " in notes


def test_the_title_is_the_prompts_and_never_the_folder_s_name(tmp_path):
    out = save_run(tmp_path / "a-folder", ["one", "two"], [2, 2], compare=False)
    found = read(page.write_run(out))
    assert found.all("title")[0][1] == found.all("h1")[0][1] == "one, two"
    many = save_run(tmp_path / "many", list("abcde"), [2, 2], compare=False)
    assert read(page.write_run(many)).all("h1")[0][1] == "a, b, c and 2 more"
    assert "a-folder" not in [text for _, text in found.all("h1")]


def test_a_long_prompt_is_cut_in_a_title_between_words_or_letters():
    assert markup.clipped("a  red\ncircle") == "a red circle"
    assert markup.clipped(" ") == "(empty)"
    words = markup.clipped("a red circle " * 9)
    assert len(words) <= 60
    assert words.endswith("red…") or words.endswith("circle…") or words.endswith("a…")
    assert markup.clipped("圆" * 70) == "圆" * 59 + "…"


def test_what_has_no_room_is_left_to_its_folder(tmp_path, monkeypatch):
    out = save_run(tmp_path / "run", [f"prompt {i}" for i in range(5)], [2, 2], compare=False)
    monkeypatch.setattr(page, "_MOST", 260_000)
    path = page.write_run(out)
    assert path.stat().st_size <= 260_000
    found = read(path)
    shown = len(found.all("section"))
    assert 1 < shown < 5
    assert f"The last {5 - shown} prompts are not shown" in found.all("p", "warn")[0][1]
    linked = [attrs["href"] or "" for attrs, _ in found.all("a")]
    assert [href for href in linked if href[:2] == "#p"] == [f"#p{i}" for i in range(shown)]
    assert sum("prompt " in text for _, text in found.all("bdi")) == 3 + 5 + shown
