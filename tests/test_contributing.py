"""CONTRIBUTING's diffs apply, and what they add keeps the promises of its kind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"```diff\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)


def copy(folder: Path, *names: str) -> Path:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return folder


def run(folder: Path, *words: str, given: str | None = None) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, input=given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def apply(diff: str, folder: Path) -> None:
    """Apply a diff whose hunks need not know their line numbers, as in a text that is read."""
    run(folder, "git", "apply", "--unidiff-zero", "--recount", "-", given=diff)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.splitlines()[0].split()[-1])
def test_a_diff_of_the_text_applies(diff, tmp_path):
    apply(diff, copy(tmp_path, *re.findall(r"^--- a/(.+)", diff, re.MULTILINE)))


@pytest.mark.slow
def test_the_reward_of_the_text_keeps_every_promise(tmp_path):
    (diff,) = (diff for diff in DIFFS if "rewards/models" in diff)
    copy(tmp_path, "rewards", "pyproject.toml", "tests/test_every_reward.py")
    copy(tmp_path, "tests/conftest.py", "tests/processors.py")
    apply(diff, tmp_path)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "saturation or has_a_case"]
    said = run(tmp_path, sys.executable, *words, "tests/test_every_reward.py")
    assert re.search(r"\d\d passed", said)
