"""The command `tilt`: what it lists, finds and refuses."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from command_line import OPTIONS
from saved_runs import save

from finetune.ranges import GIVEN
from tilt import main as tilt
from tilt.commands import app, compare, report, rollout, score

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


@pytest.mark.parametrize("name", ["compare", *sorted(OPTIONS)])
def test_every_command_has_a_help_that_names_it(capsys, name, monkeypatch):
    monkeypatch.setattr(tilt.started, "run", lambda work: work())
    monkeypatch.setattr(tilt.started, "begin", lambda name: None)
    try:
        status = tilt.main([*name.split(), "--help"])
    except SystemExit as ended:
        status = ended.code
    assert status == 0
    assert capsys.readouterr().out.startswith(f"usage: tilt {name} ")


def test_a_report_is_written_of_what_lies_in_a_folder(tmp_path):
    folder = save(tmp_path / "run", ["a star"], [3, 3, 2])
    line = [sys.executable, "-m", "tilt", "report", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder / 'report.html'}\n"
    assert done.stderr == "tilt report: loading PyTorch and other packages\n"
    assert (folder / "report.html").is_file()
    done = subprocess.run([*line[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "neither log.csv nor checks.csv" in done.stderr


def test_a_file_of_settings_serves_every_command(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("source: pictures\nreward: jpeg\nbatch_size: 3\n", encoding="utf-8")
    settings = score.OPTIONS.read(["--config", str(file), "others", "--prompt", "null"])
    assert (settings.source, settings.reward, settings.prompt) == ("others", "jpeg", "null")
    assert (settings.batch_size, settings.resume, settings.list) == (3, False, False)
    file.write_text("table: a.csv\ncolumns: [clip, ocr]\n", encoding="utf-8")
    assert compare.OPTIONS["agreement"].read(["--config", str(file)]).columns == ["clip", "ocr"]
    words = ["--table", "b.csv", "--columns", "x", "y"]
    assert compare.OPTIONS["agreement"].read(words) == compare.Agreement("b.csv", ["x", "y"])


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        (report.OPTIONS, [], "FOLDER is '' but must be given"),
        (report.OPTIONS, ["a", "b"], "'b' belongs to no option: --help lists the options"),
        (report.OPTIONS, ["--folder", "a"], "there is no option --folder: "),
        (compare.OPTIONS["wins"], ["--table", "a"], "--baseline is '' but must be given"),
        (score.OPTIONS, [" "], "SOURCE is ' ' but must be text, and not empty, or null"),
        (score.OPTIONS, ["--batch-size", "0"], "--batch-size is 0 but must be a whole number, "),
        (score.OPTIONS, ["--batch-size", "010"], "--batch-size is '010'; write a number in dec"),
        (rollout.OPTIONS, ["--call.height", "1:30"], "--call.height is '1:30'; write a number "),
        (score.OPTIONS, ["--config", ""], "--config is ''; name a YAML file"),
        (app.OPTIONS, ["--port", "65536"], "--port is 65536 but must be a whole number, 1 to 655"),
        (app.OPTIONS, ["--max-particles", "10001"], "--max-particles is 10001 but must be a who"),
        (score.OPTIONS, ["--batch-size={a: 1}"], "--batch-size is {'a': 1} but must be a whole "),
        (score.OPTIONS, ["--out"], "argument --out: expected one argument (write a value that "),
    ],
)
def test_what_is_missing_or_out_of_range_is_refused_by_its_option(options, words, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        options.read(words)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_help_says_what_each_option_may_be(name):
    options = OPTIONS[name]
    said = " ".join(options.parser().format_help().split())
    hints = typing.get_type_hints(options.kind)
    for field in dataclasses.fields(options.kind):
        if not dataclasses.is_dataclass(hints[field.name]):
            allowed = field.metadata["range"]
            assert field.metadata["help"]
            default = field.default_factory
            default = default() if callable(default) else field.default
            assert allowed.allows(default) or allowed is GIVEN
            limits = allowed.said.removesuffix(", or null")
            assert "number" not in limits or limits in said
            assert all(choice in said for choice in allowed.choices)


def test_an_option_is_not_taken_for_the_value_of_a_keyword():
    with pytest.raises(
        ValueError,
        match=r"^--call\.height has no value; write one after it, or --call\.height=VALUE",
    ):
        rollout.OPTIONS.read(["--call.height", "--resume"])
