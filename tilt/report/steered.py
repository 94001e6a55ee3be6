"""The report of a steered run: one page with its images, their genealogy and the settings.

It is written from the saved folder, without the model. The page contains small copies of the
images, with links to the files beside it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from PIL import Image

from tilt.report import genealogy, markup, recipe
from tilt.report.media import opened
from tilt.report.saved import read, read_json
from tilt.report.thumbnails import Budget, Picture, sprite

__all__ = ["write", "write_run"]

# Bytes. In base64 the first two take a third more; the page must stay below 15 MB.
_TREES, _PICTURES, _MOST = 4_500_000, 2_700_000, 14_500_000
_OPEN = 12  # maximum number of prompts whose genealogies are initially unfolded


@dataclass(frozen=True)
class _Saved:
    """A folder that `Steered.save` wrote. base: its path relative to the page, "" or "a/b/"."""

    folder: Path
    base: str
    manifest: dict[str, Any]
    lineage: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        return self.manifest["results"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"]


@dataclass(frozen=True)
class _Entry:
    """One prompt and its baselines."""

    saved: _Saved
    plain: _Saved | None
    index: int

    @property
    def prompt(self) -> str:
        return self.saved.results["prompts"][self.index]

    @property
    def rewards(self) -> list[float]:
        return self.saved.results["rewards"][self.index]

    @property
    def plain_rewards(self) -> list[float]:
        return self.plain.results["rewards"][self.index] if self.plain else []


@dataclass(frozen=True)
class _Figure:
    """An image with its caption. name: "plain", "best of 4", "best" or ""; parts: the components of
    the reward by name."""

    picture: Picture
    name: str
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _Room:
    """The limits on the size of a page's images."""

    trees: Budget
    pictures: Budget


def write(folder: Path, plain: Path | None = None) -> Path:
    """Write report.html into a folder that `Steered.save` wrote, and return its path.

    plain: the folder of the same prompts and seeds with min_ess=0, for the baselines; ignored if it
    does not exist. Raises ValueError for any other folder.
    """
    folder = Path(folder)
    entries = list(_entries(folder, folder, plain))
    manifest = entries[0].saved.manifest
    files = ["manifest.json", "lineage.json"]
    return _write(folder, entries, repeat=recipe.call(manifest), facts=manifest, files=files)


def write_run(out: Path) -> Path:
    """Write report.html into the folder of a run of `tilt steer`, and return its path.

    It contains the finished prompts. Raises ValueError if there are none.
    """
    out = Path(out)
    known = ("command", "prompts", "settings", "machine", "versions")
    with _there():
        manifest = read_json(out / "manifest.json", *known)
    folders = sorted(path.parent for path in out.glob("[0-9]*-*/steered/manifest.json"))
    if not folders:
        raise ValueError(f"{out} has no finished prompt: pass the folder of a run of `tilt steer`")
    entries = [e for folder in folders for e in _entries(out, folder, folder.with_name("plain"))]
    facts = {name: manifest[name] for name in ("settings", "machine", "versions")}
    return _write(
        out,
        entries,
        missing=len(manifest["prompts"]) - len(entries),
        repeat=recipe.command(manifest),
        facts=facts | {"weights": entries[0].saved.manifest.get("weights")},
        files=["manifest.json"],
    )


@contextlib.contextmanager
def _there() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"there is no {error.filename}: pass the folder of a saved run") from None


def _read(page: Path, folder: Path) -> _Saved:
    base = Path(os.path.relpath(folder.resolve(), page.resolve())).as_posix()
    with _there():
        return _Saved(folder, "" if base == "." else base + "/", *read(folder))


def _entries(page: Path, folder: Path, plain: Path | None) -> Iterator[_Entry]:
    saved = _read(page, folder)
    other = _read(page, Path(plain)) if plain is not None and Path(plain).is_dir() else None
    prompts = saved.results["prompts"]
    if other and other.results["prompts"] != prompts:
        raise ValueError(f"{plain} has other prompts than {folder}: pass the baseline of this run")
    for index in range(len(prompts)):
        yield _Entry(saved, other, index)


def _write(
    folder: Path,
    entries: Sequence[_Entry],
    repeat: str,
    facts: dict[str, Any],
    files: Sequence[str],
    missing: int = 0,
) -> Path:
    """Write the page, with the summary of all prompts and the sections of as many as there is room.

    repeat: code or command that repeats the run; facts: further entries of the manifest; files: the
    files with all numbers; missing: the number of unfinished prompts.
    """
    tiles = sum(_tiles(entry) for entry in entries)
    pictures = sum(len(e.rewards) + 2 * bool(e.plain) for e in entries)
    room = _Room(Budget(_TREES, tiles, longest=64), Budget(_PICTURES, pictures))
    values = _about(entries[0].saved) | _summary(entries) | _facts(facts)
    values |= {"count": len(entries), "repeat": repeat, "files": files, "missing": missing}
    page = functools.partial(markup.render, "steered.html", **values)
    left = _MOST - markup.size(page(sections=[], shown=len(entries)))
    sections: list[Markup] = []
    for place, entry in enumerate(entries):
        section = {"place": place, "unfolded": len(entries) <= _OPEN} | _section(entry, room)
        rendered = Markup(markup.render("prompt.html", **section))
        left -= markup.size(rendered)
        if left < 0 and sections:
            break
        sections.append(rendered)
    return markup.keep(folder / "report.html", page(sections=sections, shown=len(sections)))


def _tiles(entry: _Entry) -> int:
    scores = entry.saved.lineage["scores"]
    columns = len(scores) + 1 if entry.saved.lineage.get("previews") else 1
    return columns * max([len(entry.rewards), *(len(s["rewards"][entry.index]) for s in scores)])


def _about(saved: _Saved) -> dict[str, Any]:
    manifest, model = saved.manifest, saved.manifest.get("model")
    return {
        "particles": manifest.get("particles", len(saved.results["rewards"][0])),
        "reward": manifest.get("reward"),
        "model": Path(str(model)).name if model else "",
        "settings": saved.settings,
    }


def _summary(entries: Sequence[_Entry]) -> dict[str, Any]:
    """Return the table of rewards, one row per prompt: plain, best of k, steered best and mean."""
    compared, rows, columns = all(entry.plain for entry in entries), [], []
    for place, entry in enumerate(entries):
        values = [max(entry.rewards), fmean(entry.rewards)]
        if compared:
            values = [entry.plain_rewards[0], max(entry.plain_rewards), *values]
        columns.append(values)
        log_z = entry.saved.results["log_z"][entry.index]
        rows.append([{"place": place, "prompt": entry.prompt}, *values, log_z])
    means = [fmean(column) for column in zip(*columns, strict=True)]
    return {
        # the title names the prompts, since the folder's name may be temporary during writing
        "prompts": [entry.prompt for entry in entries],
        "k": len(entries[0].plain_rewards) if compared else 0,
        "rows": rows,
        "foot": ["mean over prompts", *means, ""] if len(entries) > 1 else [],
    }


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    facts = {n: v for n, v in manifest.items() if n not in ("results", "prompts", "occurrences")}
    nested = {name: value for name, value in facts.items() if isinstance(value, dict)}
    plain = {name: value for name, value in facts.items() if name not in nested}
    return {"facts": plain, "more_facts": {name: value for name, value in nested.items() if value}}


def _section(entry: _Entry, room: _Room) -> dict[str, Any]:
    """Return the values of prompt.html; the order of the calls decides how images share `room`."""
    saved, index = entry.saved, entry.index
    story = genealogy.read(saved.manifest, saved.lineage, index)
    finals = [_image(saved.folder, name) for name in saved.results["files"][index]]
    steered = [
        _figure(saved, (index, j), image, room, f"particle {j}", "best" * (j == story.best))
        for j, image in enumerate(finals)
    ]
    values = {"prompt": entry.prompt, "steered": steered, "baselines": _baselines(entry, room)}
    if not story.parents:
        return values | {"tree": None}
    tiles = sprite(finals, *_previews(saved, index))
    address, _ = room.trees.encode(tiles.image, (tiles.columns, tiles.rows))
    charts = genealogy.charts(story, saved.settings["min_ess"])
    tree = genealogy.tree(story, tiles)
    return values | {"story": story, "tree": tree, "address": address, "charts": charts}


def _baselines(entry: _Entry, room: _Room) -> list[_Figure]:
    """Return the plain sample and the best of k, at the same seeds."""
    if entry.plain is None:
        return []
    rewards, shown = entry.plain_rewards, []
    best = max(range(len(rewards)), key=rewards.__getitem__)
    for j, name in ((0, "plain"), (best, f"best of {len(rewards)}")):
        image = _image(entry.plain.folder, entry.plain.results["files"][entry.index][j])
        shown.append(_figure(entry.plain, (entry.index, j), image, room, name, name))
    return shown


def _figure(
    saved: _Saved, place: tuple[int, int], image: Image.Image, room: _Room, label: str, name: str
) -> _Figure:
    index, j = place
    reward, best = saved.results["rewards"][index][j], name == "best"
    label = f"{label}, reward {markup.short(reward)}{', the best' * best}"
    file = saved.base + saved.results["files"][index][j]
    parts = {part: rows[index][j] for part, rows in saved.results["components"].items()}
    return _Figure(room.pictures.picture(image, file, label, best), name, reward, parts)


def _previews(saved: _Saved, index: int) -> tuple[Image.Image | None, tuple[int, int] | None]:
    known = saved.lineage.get("previews")
    if not known:  # a folder of an older version
        return None, None
    width, height = known["tile"]
    return _image(saved.folder, known["files"][index]), (width, height)


def _image(folder: Path, name: str) -> Image.Image:
    """Open an image inside the folder; an untrusted manifest may name any other file."""
    if Path(name).name != name:
        raise ValueError(f"{folder} names the image {name!r}, which is not a file inside it")
    return opened(folder / name)
