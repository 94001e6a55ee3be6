"""A script says at once that it has started, before it imports what takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tilt.main import COMMANDS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(f for f in (ROOT / "scripts").glob("*.py") if "tilt.main" in f.read_text("utf-8"))
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "matplotlib", "PIL", "numpy", "gradio")
# Run instead of a script's imports: whether anything heavy was there when it spoke.
EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
class Stop:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {heavy!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = [{file!r}]
import runpy
runpy.run_path({file!r}, run_name="__main__")
"""


def test_there_are_scripts():
    assert {"rollout", "score", "train_gdro", "evaluate"} <= {f.stem for f in SCRIPTS}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_is_its_command_and_nothing_else(file):
    name = file.stem.replace("_", " ")
    assert name in COMMANDS
    text = file.read_text(encoding="utf-8")
    assert text.endswith(f'if __name__ == "__main__":\n    sys.exit(run("{name}"))\n')
    assert len(text.splitlines()) < 12


def ran(file: Path) -> subprocess.CompletedProcess[str]:
    """A script that Ctrl-C meets at the first heavy import."""
    code = EARLY.format(heavy=HEAVY, file=str(file))
    line = [sys.executable, "-c", code]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("file", "name"), [("steer", "tilt steer"), ("train_gdro", "tilt train gdro")]
)
def test_it_speaks_before_anything_heavy_is_imported_and_takes_an_interrupt_there(file, name):
    done = ran(ROOT / "scripts" / f"{file}.py")
    first, last = done.stderr.splitlines()
    assert first == f"{name}: loading PyTorch and other packages"
    assert last == f"{name}: interrupted before it began"
    assert done.returncode == 130


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    from tilt import started

    started.say("nothing")  # to who calls a script's functions
    assert not capsys.readouterr().err
    monkeypatch.setattr(started, "_name", "tilt steer")
    monkeypatch.setenv("RANK", "1")
    started.say("nothing")
    assert not capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    started.say("loading")
    assert capsys.readouterr().err.endswith(": loading\n")
