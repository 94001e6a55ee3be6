"""What `Steered.save` wrote, read back: whole, or refused in one sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read", "read_json"]


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object of a JSON file, which has these keys; ValueError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise _damaged(path, str(error)) from None
    if not isinstance(found, dict):
        raise _damaged(path, f"it holds a {type(found).__name__}, not an object")
    for key in keys:
        if key not in found:
            raise _damaged(path, f"it has no {key!r}")
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """manifest.json and lineage.json of a folder, their parts of the kinds that a report needs."""
    place = folder / "manifest.json"
    manifest = read_json(place)
    if "results" not in manifest:
        raise ValueError(f"{folder} is not what Steered.save writes: for a whole run, write_run")
    lineage = read_json(folder / "lineage.json", "num_steps", "scores")
    wrong = _wrong_manifest(manifest)
    if wrong:
        raise _damaged(place, f"its {wrong} is not what it should be")
    wrong = _wrong_lineage(lineage, len(manifest["results"]["prompts"]))
    if wrong:
        raise _damaged(folder / "lineage.json", f"its {wrong} is not what it should be")
    return manifest, lineage


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({why:.200}): put it back, or delete its folder and draw that again"
    )


def _wrong_manifest(manifest: dict[str, Any]) -> str:
    """The name of an entry of another kind, or ""."""
    settings, results = manifest.get("settings"), manifest["results"]
    if not isinstance(settings, dict) or not all(
        _is_number(settings.get(name)) for name in ("min_ess", "reward_scale")
    ):
        return "settings"
    if not isinstance(results, dict):
        return "results"
    if not isinstance(manifest.get("pipeline_keywords", {}), dict):
        return "pipeline_keywords"
    prompts: Any = results.get("prompts")
    if not _is_list_of(prompts, str) or not prompts:
        return "prompts"
    b, components = len(prompts), results.get("components")
    files: Any = results.get("files")
    if not _is_list_of(files, list, b) or not all(_is_list_of(row, str) and row for row in files):
        return "files"
    for name in ("rewards", "log_weights"):
        if not _is_table(results.get(name), b):
            return name
    if not isinstance(components, dict) or not all(_is_table(v, b) for v in components.values()):
        return "components"
    if any(map(_differ, files, results["rewards"])):
        return "rewards"
    return "" if _are_numbers(results.get("log_z"), b) else "log_z"


def _wrong_lineage(lineage: dict[str, Any], b: int) -> str:
    """As of the manifest; b prompts."""
    if not _is_number(lineage["num_steps"]):
        return "num_steps"
    if not _is_list_of(lineage["scores"], dict):
        return "scores"
    for score in lineage["scores"]:
        if "resampled" not in score:
            return "account of which scores resampled, which older versions did not write,"
        tables = (score.get(name) for name in ("rewards", "log_weights", "ancestors"))
        whole = _is_number(score.get("step")) and _are_numbers(score.get("ess"), b)
        whole = whole and _is_list_of(score["resampled"], bool, b)
        if not whole or not all(_is_table(table, b) for table in tables):
            return "scores"
    previews = lineage.get("previews")
    if previews:
        tile = previews.get("tile") if isinstance(previews, dict) else None
        if not _are_numbers(tile, 2) or not _is_list_of(previews.get("files"), str, b):
            return "previews"
    return ""


def _differ(files: list[Any], rewards: list[Any]) -> bool:
    return len(files) != len(rewards)


def _is_table(value: Any, b: int) -> bool:
    return _is_list_of(value, list, b) and all(_are_numbers(row) and row for row in value)


def _are_numbers(value: Any, count: int | None = None) -> bool:
    return isinstance(value, list) and count in (None, len(value)) and all(map(_is_number, value))


def _is_list_of(value: Any, kind: type, count: int | None = None) -> bool:
    whole = isinstance(value, list) and count in (None, len(value))
    return whole and all(isinstance(item, kind) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
