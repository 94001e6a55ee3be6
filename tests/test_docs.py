"""The README and docs/ say what is there: links, files, commands, options, and code that runs."""

from __future__ import annotations

import importlib
import re
import unicodedata
from pathlib import Path

import pytest
import yaml
from command_line import OPTIONS
from pages import PAGES, ROOT, SPAN, blocks, code, prose, words

from rewards.spec import parse as parse_spec
from scripts import bench

LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)")
FILE = re.compile(
    r"(?<![\w./-])((?:scripts|tests|steering|rewards|finetune|tilt|docs)/[\w./-]+\.(?:py|ya?ml|md|png|json|txt))"
)


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(page, arguments) of each call of a command, or of its script, that has arguments."""
    found, script = [], f"scripts/{name.replace(' ', '_')}.py"
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            line = words(line)
            if line[: 1 + len(name.split())] == ["tilt", *name.split()]:
                arguments = line[1 + len(name.split()) :]
            elif script in line:
                arguments = line[line.index(script) + 1 :]
            else:
                continue
            if arguments and "--help" not in arguments:
                found.append((page.name, arguments))
    return found


def slugs(page: Path) -> set[str]:
    """The anchors of a page: its headings, as Python-Markdown and as GitHub name them."""
    text, found = prose(page.read_text(encoding="utf-8")), set()
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        plain = heading.replace("`", "").strip().lower()
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip()))
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_there_are_commands_to_check():
    assert len(commands("steer")) > 10
    named = {name for name in OPTIONS if commands(name)}
    trainers = {"train gdro", "train adversarial", "train critic"}
    assert named >= {"score", "rollout", "evaluate"} | trainers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_pictures_and_anchors_exist(page):
    for target in LINK.findall(SPAN.sub("", prose(page.read_text(encoding="utf-8")))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        inside = page.name == "README.md" or file.is_relative_to(ROOT / "docs")
        assert inside, f"{page.name} links out of docs/, which the built pages cannot: {target}"
        assert not anchor or anchor in slugs(file), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_make_targets_exist():
    made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            if re.match(r"make [a-z]", line):
                targets = [word for word in words(line)[1:] if "=" not in word]
                assert set(targets) <= set(made), f"{page.name}: {line}"


def test_benchmarks_and_their_options_exist(capsys):
    named: dict[str, set[str]] = {}
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            for name, rest in re.findall(r"-m scripts\.bench ([\w-]+)([^|&;]*)", line):
                assert name in bench.COMMANDS, f"{page.name}: {line}"
                named.setdefault(name, set()).update(re.findall(r"(?<![\w-])--[a-z-]+", rest))
    assert len(named) > 10
    for name, options in named.items():
        with pytest.raises(SystemExit):
            bench.main([name, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert options <= known, f"{name} has no {options - known}"


@pytest.mark.parametrize("name", sorted(name for name in OPTIONS if commands(name)))
def test_options_in_commands_are_known(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for page, line in commands(name):
        settings = OPTIONS[name].read(line)
        if name == "score":
            assert settings.list or settings.source, (page, line)
        elif name != "steer" and hasattr(settings, "out"):
            assert settings.out, (page, line)
        if getattr(settings, "reward", None):
            parse_spec(settings.reward)


def test_the_readme_counts_the_classes_of_the_table_of_trainable_pipelines():
    readme, table = (ROOT / name for name in ("README.md", "docs/trainable.md"))
    counted = re.findall(r"\[(\d+) classes of diffusers\]", readme.read_text(encoding="utf-8"))
    assert counted == re.findall(r"^(\d+) classes were trained", table.read_text("utf-8"), re.M)


def test_every_page_is_in_the_navigation_and_what_it_includes_exists():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(nav) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        inner = nav.values() if isinstance(nav, dict) else nav
        return [name for part in inner for name in files(part)]

    listed = files(config["nav"])
    assert sorted(listed) == [page.name for page in PAGES[1:]]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r'--8<-- "(.+?)"', text):
            assert (ROOT / name).is_file(), f"{page.name} includes {name}"
        for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
            found, parts, i = None, name.split("."), 0
            for i in range(len(parts), 0, -1):
                try:
                    found = importlib.import_module(".".join(parts[:i]))
                except ModuleNotFoundError:
                    continue
                break
            for part in parts[i:]:
                found = getattr(found, part)
            assert found.__doc__, name


@pytest.mark.parametrize("name", ["quickstart.md", "in-your-app.md"])
def test_python_on_the_embedded_models_runs(name, tmp_path, monkeypatch):
    from steering import tiny

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = [
        body for language, body in blocks(text) if language == "python" and "--8<--" not in body
    ]
    assert found
    for body in found:  # as it stands, but of fewer steps
        monkeypatch.setitem(tiny._DEFAULTS["tiny-sd3"], "num_inference_steps", 5)
        monkeypatch.setitem(tiny._DEFAULTS["tiny-sd"], "num_inference_steps", 5)
        exec(compile(body, name, "exec"), {})
    if name == "quickstart.md":
        assert (tmp_path / "rose.png").exists()
        assert (tmp_path / "rose" / "report.html").exists()
