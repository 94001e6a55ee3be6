"""A run of many prompts in a folder, which contains manifest.json, the request, and the results.

Results are written atomically, so an interrupted run is resumed by repeating the same request:
finished results are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import shlex
import unicodedata
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from finetune.files import atomic, disk_errors, write
from finetune.folder import ELSEWHERE, begun, refuse_changes
from steering.manifest import fingerprint
from tilt.prompts import Prompt
from tilt.report import pictures, steered
from tilt.report.saved import read_json

if TYPE_CHECKING:
    from steering.result import Steered

__all__ = [
    "Share",
    "among",
    "check_calls",
    "check_weights",
    "divide",
    "draw",
    "drawn",
    "folder_name",
    "keep",
    "new_folder",
    "open_run",
    "pending",
    "steer_pending",
]

_ROWS_PER_GRID = 30


def new_folder(parent: Path) -> Path:
    """Create a folder named by the date and time, and by a number if that name is taken.

    Raises ValueError if it cannot be created.
    """
    name, number = datetime.now().strftime("%Y-%m-%d-%H%M%S"), 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with disk_errors(parent, ELSEWHERE), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # fails if another run has just created it
            return folder
        number += 1


def open_run(out: Path, manifest: Mapping[str, Any], *, resume: bool) -> None:
    """Create the folder and its manifest.json, or check that an existing run has the same request.

    `manifest["settings"]` and `manifest["prompts"]` must be equal; other entries may differ. Raises
    ValueError if they are not, if the folder contains other files or, without `resume`, a run with
    finished results, and if it is not writable.
    """
    path = out / "manifest.json"
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    old = _read_manifest(path) if path.exists() else {}
    goes_on = begun(out, path.name, "[0-9]*-*/", resume=resume)
    if goes_on:
        asked = json.loads(text)
        refuse_changes(out, old["settings"], asked["settings"])
        if old["prompts"] != asked["prompts"]:
            raise ValueError(
                f"{out} was begun with other prompts; continue it with those, or {ELSEWHERE}"
            )
    with disk_errors(out, ELSEWHERE):
        if goes_on:  # find out now whether the folder is writable
            (out / ".writable.part").write_text(text, encoding="utf-8")
            (out / ".writable.part").unlink()
        else:
            write(path, text)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "results" in manifest:  # of one Steered, not of a run
            raise ValueError
        shlex.join(manifest["command"])  # needed by the report, which is written last
        if not isinstance(manifest["machine"], dict) or not isinstance(manifest["versions"], dict):
            raise ValueError
        return {"settings": dict(manifest["settings"]), "prompts": list(manifest["prompts"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is not the manifest of a run, so {path.parent} is not the folder of one; "
            "give another out="
        ) from None


def folder_name(index: int, prompt: str) -> str:
    """Return a name that is valid on any file system for any prompt: "0007-a-red-circle"."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_only.lower())[:40].strip("-")
    return f"{index:04d}-{words or 'prompt'}"


@dataclass(frozen=True)
class Share:
    """The prompts of one seed, in batches, each of which has one pipeline call and one folder.

    image: path of the image that all of them edit, or None.
    """

    seed: int
    prompts: list[Prompt]
    batches: dict[Path, Sequence[int]]  # folder -> indices in `prompts`
    image: str | None = None

    def pending(self) -> dict[Path, Sequence[int]]:
        """Return the batches that are not finished."""
        return {folder: which for folder, which in self.batches.items() if not folder.exists()}


def divide(out: Path, prompts: Sequence[Prompt], size: int) -> list[Share]:
    """Divide the prompts by seed and edited image, into batches of at most `size`."""
    alike: dict[tuple[int, str | None], list[int]] = {}
    for index, prompt in enumerate(prompts):
        alike.setdefault((prompt.seed or 0, prompt.image), []).append(index)
    shares = []
    for (seed, image), indices in alike.items():
        batches = {}
        for start in range(0, len(indices), size):
            first = indices[start]
            folder = out / folder_name(first, prompts[first].text)
            batches[folder] = range(start, min(start + size, len(indices)))
        shares.append(Share(seed, [prompts[i] for i in indices], batches, image))
    return shares


def pending(shares: Sequence[Share]) -> list[Path]:
    """Return the folders of all unfinished batches."""
    return [folder for share in shares for folder in share.pending()]


def among(shares: Sequence[Share], folders: Sequence[Path]) -> list[Share]:
    """Return the shares with only the batches in `folders`, without empty shares.

    Shares keep the texts of all their prompts, so the noise of each prompt does not change.
    """
    cut, wanted = [], set(folders)
    for share in shares:
        batches = {folder: which for folder, which in share.batches.items() if folder in wanted}
        if batches:
            cut.append(replace(share, batches=batches))
    return cut


def check_weights(folders: Sequence[Path], pipe: Any, preview: Any = None) -> None:
    """Raise ValueError if `keep` saved results of other weights than those of the pipeline.

    A model may be retrained under the same name, and one run must not mix both.
    """
    if not folders:
        return
    parts = pipe.components | {"preview": preview}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    now = {name: fingerprint(module) for name, module in modules.items()}
    for folder in folders:
        with _resumable(folder.parent):
            if not (folder / "steered" / "manifest.json").is_file():
                raise ValueError(
                    f"{folder} is incomplete (it has no steered/manifest.json): delete it, then "
                    f"repeat the command with --out {folder.parent} --resume"
                )
            found = read_json(folder / "steered" / "manifest.json").get("weights")
        drawn = found if isinstance(found, dict) else {}
        if drawn != now:
            other = [n for n in sorted(drawn.keys() | now.keys()) if drawn.get(n) != now.get(n)]
            raise ValueError(
                f"{folder} was generated with other weights than the model has now "
                f"({', '.join(other)}): delete {folder.parent}, or choose another --out"
            )


def check_calls(
    pipe: Any, reward: Any, shares: Sequence[Share], kinds: dict[str, dict[str, Any]]
) -> None:
    """Raise ValueError for errors that would otherwise occur only at a later seed."""
    from steering.pipeline import steer_each

    for edits in (False, True):
        some = [share for share in shares if (share.image is not None) == edits]
        prompts = [prompt for share in some for prompt in share.prompts]
        if not prompts:
            continue
        references = _references(prompts, reward, kinds, lambda name: name)  # not opened here
        image = _edited(some[0])  # any of them
        for kind, call in kinds.items():  # steer_each() checks its arguments when called
            texts = [prompt.text for prompt in prompts]
            steer_each(pipe, texts, reward, references=references[kind], **call, **image)


def steer_pending(
    pipe: Any, reward: Any, shares: Sequence[Share], kinds: dict[str, dict[str, Any]]
) -> Generator[tuple[Path, dict[str, Steered]], None, None]:
    """Yield the folder and results of each pending batch, with one progress bar per share."""
    from steering.pipeline import steer_each

    with _said_once():
        for share in shares:
            pending = share.pending()
            texts = [prompt.text for prompt in share.prompts]
            given = {
                "seed": share.seed,
                "only": [i for which in pending.values() for i in which],
                **_edited(share),
            }
            references = _references(share.prompts, reward, kinds, _picture)
            streams = [
                steer_each(pipe, texts, reward, references=references[kind], **given, **call)
                for kind, call in kinds.items()
            ]
            # strict=True also exhausts each stream, which closes its progress bar
            for folder, *results in zip(pending, *streams, strict=True):
                yield folder, dict(zip(kinds, results, strict=True))


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Drop log messages that steer_each() repeats for each seed."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    logger = logging.getLogger("steering.pipeline")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _references(
    prompts: Sequence[Prompt],
    reward: Any,
    kinds: Mapping[str, Mapping[str, Any]],
    opened: Callable[[str], Any],
) -> dict[str, list[list[Any]] | None]:
    """Return, for each kind of call, the prompts' references, by default the image that they edit.

    A call whose rewards take none gets them only if no other takes any, and then refuses them.
    """
    takes = {
        kind: any(getattr(r, "wants_references", False) for r in (reward, call.get("on_the_way")))
        for kind, call in kinds.items()
    }
    wanted = any(takes.values())
    names = [p.references or ((p.image,) if p.image and wanted else ()) for p in prompts]
    found = [[opened(name) for name in some] for some in names] if any(names) else None
    return {kind: found if own or not wanted else None for kind, own in takes.items()}


def _edited(share: Share) -> dict[str, Any]:
    """Return the keyword of the pipeline's call, if the prompts edit an image."""
    return {} if share.image is None else {"image": _picture(share.image)}


def _picture(name: str) -> Image.Image:
    return Image.open(name).convert("RGB")


def keep(folder: Path, results: Mapping[str, Steered]) -> None:
    """Save each result under its name in `folder`, atomically.

    Raises ValueError if that fails, and then leaves nothing behind.
    """
    with _resumable(folder.parent), atomic(folder) as scratch:
        for name, result in results.items():
            result.save(scratch / name)


def drawn(out: Path, folders: Sequence[Path]) -> list[Path]:
    """Return the files that `draw` wrote, if no result is newer; else []."""
    report = out / "report.html"  # written last
    with contextlib.suppress(OSError):
        last = report.stat().st_mtime_ns
        if all(folder.stat().st_mtime_ns <= last for folder in folders):
            return sorted([*out.glob("grid*.png"), out / "history.png", report])
    return []


def draw(out: Path, folders: Sequence[Path]) -> list[Path]:
    """Write report.html, grid.png (grid-2.png, ... for many prompts) and history.png of a run.

    Each folder contains a result "steered", and with a comparison "plain" (min_ess=0). Raises
    ValueError if that fails.
    """
    with _resumable(out):
        traces = [trace for folder in folders for trace in pictures.traces(folder / "steered")]
        paths = [_write(pictures.history(traces), out / "history.png")]
        # one grid's images at a time, since those of a run may not fit in memory
        rows = (
            row for folder in folders for row in pictures.rows(folder / "steered", folder / "plain")
        )
        while part := list(itertools.islice(rows, _ROWS_PER_GRID)):
            name = f"grid-{len(paths)}.png" if len(paths) > 1 else "grid.png"
            paths.append(_write(pictures.comparison(part), out / name))
        paths.append(steered.write_run(out))
    return sorted(paths)


def _resumable(out: Path) -> AbstractContextManager[None]:
    """Return a context in which a failing disk becomes a ValueError that says how to resume."""
    advice = f"finished results are kept: fix the cause, then repeat with --out {out} --resume"
    return disk_errors(f"the files of the run {out}", advice)


def _write(picture: Image.Image, path: Path) -> Path:
    with atomic(path) as scratch:
        picture.save(scratch, "png")
    return path
