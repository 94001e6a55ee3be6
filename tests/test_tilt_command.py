"""The command `tilt`: what it lists, finds and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from saved_runs import save

from tilt import main as tilt
from tilt.commands import rollout

ROOT = Path(__file__).parents[1]


def test_without_a_command_there_is_a_list_of_them(capsys):
    assert tilt.main([]) == 2
    listed = capsys.readouterr().err
    assert tilt.main(["--help"]) == 0
    assert capsys.readouterr().out == listed
    assert all(f"  {name} " in listed for name in tilt.COMMANDS)


@pytest.mark.parametrize(
    ("word", "said"),
    [("stear", "did you mean steer?"), ("x", "there are"), ("train", "there are train gdro, ")],
)
def test_an_unknown_command_is_refused_with_the_nearest_one(capsys, word, said):
    assert tilt.main([word, "--help"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tilt: there is no command {word!r}: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", tilt.COMMANDS)
def test_every_command_has_a_help_that_names_it(capsys, name, monkeypatch):
    monkeypatch.setattr(tilt.started, "run", lambda work: work())
    monkeypatch.setattr(tilt.started, "begin", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        tilt.main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: tilt {name} ")


def test_a_report_is_written_of_what_lies_in_a_folder(tmp_path):
    folder = save(tmp_path / "run", ["a star"], [3, 3, 2])
    line = [sys.executable, "-m", "tilt", "report", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder / 'report.html'}\n"
    assert done.stderr == "tilt report: loading PyTorch and what else is needed\n"
    assert (folder / "report.html").is_file()
    done = subprocess.run([*line[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "neither log.csv nor checks.csv" in done.stderr


def test_an_option_is_not_taken_for_the_value_of_a_keyword():
    with pytest.raises(ValueError, match=r"^--call\.height has no value; write one behind it$"):
        rollout.OPTIONS.read(["--call.height", "--resume"])
