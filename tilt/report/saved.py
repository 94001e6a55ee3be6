"""Reading of the files that reports show; damage is an error of one sentence naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

__all__ = ["read", "read_evaluation", "read_held_out", "read_json", "read_settings"]


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read the object of a JSON file, which must have these keys; ValueError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8
        raise _damaged(path, str(error)) from None
    if not isinstance(found, dict):
        raise _damaged(path, f"it contains a {type(found).__name__}, not an object")
    for key in keys:
        if key not in found:
            raise _damaged(path, f"it has no {key!r}")
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read manifest.json and lineage.json of a folder, and check the types that a report needs."""
    place = folder / "manifest.json"
    manifest = read_json(place)
    if "results" not in manifest:
        raise ValueError(f"{folder} was not written by Steered.save; use write_run for a whole run")
    lineage = read_json(folder / "lineage.json", "num_steps", "scores")
    wrong = _wrong_manifest(manifest)
    if wrong:
        raise _damaged(place, f"its entry {wrong} is invalid")
    wrong = _wrong_lineage(lineage, len(manifest["results"]["prompts"]))
    if wrong:
        raise _damaged(folder / "lineage.json", f"its entry {wrong} is invalid")
    return manifest, lineage


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the evaluation.json of `tilt evaluate`, and check the types that a report needs."""
    content = read_json(path, "sections")
    if not isinstance(content["sections"], dict):
        raise _damaged(path, "its entry sections is invalid")
    for title, measures in content["sections"].items():
        if not _is_list_of(measures, dict) or not all(map(_is_measure, measures)):
            raise _damaged(path, f"its section {title!r} is invalid")
    return content


def read_held_out(path: Path) -> list[str]:
    """Read the held-out prompts from the checks.json of a training."""
    prompts = read_json(path, "held_out")["held_out"]
    if not _is_list_of(prompts, str):
        raise _damaged(path, "its entry held_out is invalid")
    return prompts


def read_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """Read the settings.yaml of a training, as text and as values; both are empty without it."""
    try:
        text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        settings: Any = OmegaConf.to_container(OmegaConf.create(text)) if text else {}
    except (YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("check") or {}, dict):
        raise _damaged(path, "it has no mapping of settings")
    return text, settings


def _damaged(path: Path, why: str) -> ValueError:
    remedy = "delete it and create it again"
    if path.name in ("manifest.json", "lineage.json"):
        remedy = "delete its folder and create it again"
    if path.name in ("settings.yaml", "checks.json"):  # nothing else makes these
        remedy = "delete it: the report is then written without it"
    return ValueError(f"{path} is damaged ({why:.200}): restore it, or {remedy}")


def _is_measure(measure: dict[str, Any]) -> bool:
    kinds = {"name": str, "less_is_better": bool, "prompts": list, "variants": dict}
    return all(isinstance(measure.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(one, dict)
        and _is_interval(one.get("mean"))
        and _is_interval(one.get("difference", one["mean"]))
        for one in measure["variants"].values()
    )


def _is_interval(value: Any) -> bool:
    if not isinstance(value, dict) or not {"mean", "low", "high"} <= value.keys():
        return False
    ends = value["low"], value["high"]
    return _is_number(value["mean"]) and (ends == (None, None) or all(map(_is_number, ends)))


def _wrong_manifest(manifest: dict[str, Any]) -> str:
    """Return the name of an entry of the wrong type or shape, or ""."""
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
    if any(any(map(_differ, files, rows)) for rows in components.values()):
        return "components"
    return "" if _are_numbers(results.get("log_z"), b) else "log_z"


def _wrong_lineage(lineage: dict[str, Any], b: int) -> str:
    """Return the same for lineage.json, with b prompts."""
    if not _is_number(lineage["num_steps"]):
        return "num_steps"
    if not _is_list_of(lineage["scores"], dict):
        return "scores"
    for score in lineage["scores"]:
        if "resampled" not in score:
            return "'resampled' of the scores, which older versions did not write,"
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
