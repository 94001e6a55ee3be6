"""The report of a run as one page: the pictures, the genealogy that led to them, the settings.

Written from saved folders alone, without the model. Pictures are inlined small, with links to the
files beside the page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from tilt.report import explained, genealogy, markup, recipe
from tilt.report.markup import escape, link, number, text
from tilt.report.saved import read, read_json
from tilt.report.thumbnails import Budget, sprite

__all__ = ["write", "write_run"]

# Bytes, a third less than they take in the page, which stays below 15 MB.
_TREES, _PICTURES, _MOST = 4_500_000, 2_700_000, 14_500_000
_OPEN = 12  # prompts whose genealogy is unfolded from the start
_TITLED = 3  # prompts that the title names
_KEYS = """<p class="keys"><span class="key best">lineage of the best image</span>
<span class="key alive">of the others returned</span> <span class="key dead">died out</span></p>"""


@dataclass(frozen=True)
class _Saved:
    """A folder that `Steered.save` wrote."""

    folder: Path
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
    """One prompt. base: the folder's address as the page sees it, "" or "some/folder/"."""

    saved: _Saved
    plain: _Saved | None
    index: int
    base: str
    plain_base: str

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
class _Room:
    """What the pictures of a page may take."""

    trees: Budget
    pictures: Budget


def write(folder: Path, plain: Path | None = None) -> Path:
    """Write report.html into a folder that `Steered.save` wrote; returns its path.

    plain: the folder of the same prompts at the same seeds with min_ess=0, for the baselines; left
    out where it does not exist. Raises ValueError for a folder of something else.
    """
    folder = Path(folder)
    entries = list(_entries(folder, folder, plain))
    saved = entries[0].saved
    head = [_about(saved, len(entries)), explained.what(saved.settings)]
    call = f"<h2>Repeat it</h2>\n<pre><code>{escape(recipe.call(saved.manifest))}</code></pre>"
    tail = [call, _facts(saved.manifest), _files(["manifest.json", "lineage.json"])]
    return _compose(folder, saved.results["prompts"], head, entries, tail)


def write_run(out: Path) -> Path:
    """Write report.html into the folder of a run of `tilt steer`; returns its path.

    What is finished is in it. Raises ValueError where nothing is.
    """
    out = Path(out)
    known = ("command", "prompts", "settings", "machine", "versions")
    with _there():
        manifest = read_json(out / "manifest.json", *known)
    folders = sorted(path.parent for path in out.glob("[0-9]*-*/steered/manifest.json"))
    if not folders:
        raise ValueError(
            f"{out} holds no finished prompt: pass the folder of a run of `tilt steer`"
        )
    entries = [e for folder in folders for e in _entries(out, folder, folder.with_name("plain"))]
    head = [_about(entries[0].saved, len(entries)), explained.what(entries[0].saved.settings)]
    missing = len(manifest["prompts"]) - len(entries)
    if missing > 0:
        head.append(f'<p class="warn">{missing} of the run’s prompts are not finished.</p>')
    facts = {name: manifest[name] for name in ("settings", "machine", "versions")}
    tail = [
        f"<h2>Repeat it</h2>\n<pre><code>{escape(recipe.command(manifest))}</code></pre>",
        _facts(facts | {"weights": entries[0].saved.manifest.get("weights")}),
        _files(["manifest.json"]),
    ]
    return _compose(out, [entry.prompt for entry in entries], head, entries, tail)


@contextlib.contextmanager
def _there() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"there is no {error.filename}: pass the folder of a saved run") from None


def _read(folder: Path) -> _Saved:
    with _there():
        return _Saved(folder, *read(folder))


def _entries(page: Path, folder: Path, plain: Path | None) -> Iterator[_Entry]:
    saved = _read(folder)
    other = _read(Path(plain)) if plain is not None and Path(plain).is_dir() else None
    prompts = saved.results["prompts"]
    if other and other.results["prompts"] != prompts:
        raise ValueError(f"{plain} has other prompts than {folder}: pass the run's own baseline")
    base, plain_base = _base(page, folder), _base(page, Path(plain)) if other and plain else ""
    for index in range(len(prompts)):
        yield _Entry(saved, other, index, base, plain_base)


def _base(page: Path, folder: Path) -> str:
    relative = Path(os.path.relpath(folder.resolve(), page.resolve())).as_posix()
    return "" if relative == "." else relative + "/"


def _compose(
    folder: Path,
    prompts: Sequence[str],
    head: list[str],
    entries: Sequence[_Entry],
    tail: list[str],
) -> Path:
    """The sections of as many prompts as there is room for, and the summary of all."""
    tiles = sum(_tiles(entry) for entry in entries)
    pictures = sum(len(e.rewards) + 2 * bool(e.plain) for e in entries)
    room = _Room(Budget(_TREES, tiles, longest=64), Budget(_PICTURES, pictures))
    sections: list[str] = []
    left = _MOST - len(_summary(entries, len(entries)).encode("utf-8", "xmlcharrefreplace"))
    for place, entry in enumerate(entries):
        section = _section(entry, place, room, unfolded=len(entries) <= _OPEN)
        left -= len(section.encode("utf-8", "xmlcharrefreplace"))
        if left < 0 and sections:
            rest = len(entries) - place
            sections.append(
                f'<p class="warn">The last {rest} prompts have no room here; their folders hold '
                "what there is to see.</p>"
            )
            break
        sections.append(section)
    shown = sum(section.startswith("<section") for section in sections)
    # titled by the prompts, not by the folder, whose name may be one for the time of writing alone
    more = len(prompts) - _TITLED
    named = [markup.clipped(prompt) for prompt in prompts[:_TITLED]]
    rest = f" and {more} more" if more > 0 else ""
    title = f"<h1>{', '.join(map(text, named))}{rest}</h1>"
    body = [title, *head, _summary(entries, shown), *sections, *tail]
    page = markup.document(", ".join(named) + rest, "\n".join(body))
    return markup.keep(folder / "report.html", page)


def _tiles(entry: _Entry) -> int:
    scores = entry.saved.lineage["scores"]
    columns = len(scores) + 1 if entry.saved.lineage.get("previews") else 1
    return columns * max([len(entry.rewards), *(len(s["rewards"][entry.index]) for s in scores)])


def _about(saved: _Saved, count: int) -> str:
    manifest, settings = saved.manifest, saved.settings
    particles = manifest.get("particles", len(saved.results["rewards"][0]))
    said = [f"{count} prompt{'s' * (count != 1)}", f"{particles} particle{'s' * (particles != 1)}"]
    if manifest.get("reward"):
        said.append(f"reward {manifest['reward']}")
    said += [f"λ = {settings['reward_scale']:g}", f"potential {settings['potential']}"]
    if manifest.get("model"):
        said.append(f"model {Path(str(manifest['model'])).name}")
    return f'<p class="lead">{escape(", ".join(said))}</p>'


def _summary(entries: Sequence[_Entry], shown: int) -> str:
    """A line a prompt: the rewards of the plain sample, of the best of k, of the best steered."""
    compared = all(entry.plain for entry in entries)
    heads, rows, columns = ["prompt", "steered, best", "mean", "log Ẑ"], [], []
    if compared:
        k = len(entries[0].plain_rewards)
        heads[1:1] = ["plain", f"best of {k}"]
    for place, entry in enumerate(entries):
        values = [max(entry.rewards), fmean(entry.rewards)]
        if compared:
            values = [entry.plain_rewards[0], max(entry.plain_rewards), *values]
        columns.append(values)
        log_z = number(entry.saved.results["log_z"][entry.index])
        name = text(entry.prompt)
        linked = f'<a href="#p{place}">{name}</a>' if place < shown else name
        rows.append([linked, *map(number, values), log_z])
    foot = []
    if len(entries) > 1:
        means = [number(fmean(column)) for column in zip(*columns, strict=True)]
        foot = ["mean over prompts", *means, ""]
    rewards = markup.table(heads, rows, foot)
    said = explained.table(len(entries[0].plain_rewards) if compared else 0)
    return f'<h2>Rewards</h2>\n<div class="summary">{rewards}</div>\n{said}'


def _section(entry: _Entry, place: int, room: _Room, unfolded: bool) -> str:
    saved, index = entry.saved, entry.index
    story = genealogy.read(saved.manifest, saved.lineage, index)
    finals = [_image(saved.folder, name) for name in saved.results["files"][index]]
    pictures = [
        _figure(entry, j, image, room, marked=j == story.best) for j, image in enumerate(finals)
    ]
    parts = [f'<section id="p{place}" class="prompt">', f"<h2>{text(entry.prompt)}</h2>"]
    baselines = _group("Without steering", _baselines(entry, room)) if entry.plain else ""
    parts.append(f'<div class="groups">{baselines}{_group("Steered", pictures)}</div>')
    if story.parents:
        previews, tile = _previews(saved, index)
        tiles = sprite(finals, previews, tile)
        address, _ = room.trees.encode(tiles.image, (tiles.columns, tiles.rows))
        tree = genealogy.picture(story, tiles, address, f"Genealogy of prompt {place + 1}")
        curves = genealogy.charts(story, saved.settings["min_ess"])
        parts += [
            f"<details{' open' * unfolded}><summary>How they came about</summary>",
            explained.GENEALOGY * (place == 0) + _KEYS,
            f'<a class="skip" href="#e{place}">Skip the genealogy</a>',
            tree,
            f'<div class="charts" id="e{place}">{curves}</div>',
            "</details>",
        ]
    else:
        parts.append(
            '<p class="note">Nothing was scored on the way, so nothing was resampled: every '
            "image is a sample of the plain chain.</p>"
        )
    return "\n".join([*parts, "</section>"])


def _group(name: str, figures: Sequence[str]) -> str:
    return f'<div><h3>{name}</h3>\n<div class="pictures">{"".join(figures)}</div></div>\n'


def _baselines(entry: _Entry, room: _Room) -> list[str]:
    """The plain sample and the best of k, at the same seeds."""
    assert entry.plain is not None
    rewards = entry.plain_rewards
    best = max(range(len(rewards)), key=rewards.__getitem__)
    shown = []
    for j, name in ((0, "plain"), (best, f"best of {len(rewards)}")):
        file = entry.plain.results["files"][entry.index][j]
        image = _image(entry.plain.folder, file)
        caption = f"{name}: {number(rewards[j])}{_components(entry.plain, entry.index, j)}"
        label = f"{name}, reward {markup.short(rewards[j])}"
        shown.append(_framed(image, entry.plain_base + file, label, caption, room))
    return shown


def _figure(entry: _Entry, j: int, image: Image.Image, room: _Room, marked: bool) -> str:
    file = entry.saved.results["files"][entry.index][j]
    reward = entry.rewards[j]
    caption = ("best: " * marked) + number(reward) + _components(entry.saved, entry.index, j)
    label = f"particle {j}, reward {markup.short(reward)}{', the best' * marked}"
    return _framed(image, entry.base + file, label, caption, room, marked)


def _components(saved: _Saved, index: int, j: int) -> str:
    """The parts of a reward, where it has more than one."""
    parts = saved.results["components"]
    if len(parts) < 2:
        return ""
    lines = (f"<br>{escape(name)}: {number(rows[index][j])}" for name, rows in parts.items())
    return f"<small>{''.join(lines)}</small>"


def _framed(
    image: Image.Image, path: str, label: str, caption: str, room: _Room, marked: bool = False
) -> str:
    address, small = room.pictures.encode(image)
    pixels = ' class="pixels"' if max(image.size) <= 96 else ""
    picture = (
        f'<img src="{address}" width="{small.width}" height="{small.height}" loading="lazy"'
        f'{pixels} alt="{escape(label)}">'
    )
    kind = ' class="best"' if marked else ""
    return (
        f'<figure{kind}><a href="{link(path)}">{picture}</a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _previews(saved: _Saved, index: int) -> tuple[Image.Image | None, tuple[int, int] | None]:
    known = saved.lineage.get("previews")
    if not known:  # a folder of an older version
        return None, None
    width, height = known["tile"]
    return _image(saved.folder, known["files"][index]), (width, height)


def _image(folder: Path, name: str) -> Image.Image:
    """A picture of the folder itself: a manifest from elsewhere may name any file."""
    if Path(name).name != name:
        raise ValueError(f"{folder} names the picture {name!r}, which is not a file of its own")
    with Image.open(folder / name) as image:
        return image.convert("RGB")


def _facts(manifest: dict[str, Any]) -> str:
    left_out = {"results", "prompts", "occurrences"}
    parts = []
    for name, value in manifest.items():
        if name not in left_out and isinstance(value, dict) and value:
            parts.append(f"<h3>{escape(name.replace('_', ' '))}</h3>{markup.pairs(value)}")
    plain = {n: v for n, v in manifest.items() if n not in left_out and not isinstance(v, dict)}
    others = markup.pairs(plain) if plain else ""
    inner = "\n".join([others, *parts])
    return f"<details><summary>Settings and versions</summary>\n{inner}\n</details>"


def _files(names: Sequence[str]) -> str:
    linked = ", ".join(f'<a href="{link(name)}">{escape(name)}</a>' for name in names)
    return f'<p class="note">All numbers: {linked}.</p>'
