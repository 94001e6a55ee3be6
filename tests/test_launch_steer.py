"""scripts/steer.py in several processes: the files of one, and what is left when a process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from two_processes import run_pair

pytestmark = pytest.mark.slow  # a process takes ten seconds to import all it needs

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "20", "--particles", "3", "--num-scores", "2", "--reward", "jpeg", "--compare"]
PROMPTS = [{"prompt": f"{i % 6} red stars", "seed": int(i == 3)} for i in range(8)]  # two twice


def started(processes: int, *words: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "scripts/steer.py")]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        alone |= {"ACCELERATE_USE_CPU": "true"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*line, *words], env=alone, stdout=pipe, stderr=pipe, text=True)


def ran(processes: int, *words: str) -> tuple[str, str]:
    process = started(processes, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def told(err: str) -> list[str]:
    """What the command said, but for what every process loads."""
    lines = [
        line[line.index("tilt steer: ") :] for line in err.splitlines() if "tilt steer: " in line
    ]
    return [line for line in lines if not line.startswith("tilt steer: loading ")]


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def results(folder: Path) -> dict[str, set[str]]:
    """The result folders and the files in each, without what is cut off."""
    found = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return {path.name: {str(file.relative_to(path)) for file in path.rglob("*")} for path in found}


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    """The arguments of a run of eight prompts, and the folder that one process made of them."""
    folder = tmp_path_factory.mktemp("one")
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    words = ["--prompt-file", str(file), "--model", model, *SMALL]
    ran(1, *words, "--out", str(folder / "out"))
    return words, folder / "out"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_the_files_of_one(one, tmp_path, processes):
    words, alone = one
    out, err = ran(processes, *words, "--out", str(tmp_path / "out"))
    assert pictures(tmp_path / "out") == pictures(alone)
    assert results(tmp_path / "out") == results(alone)
    for name in results(alone):
        a, b = (f / name / "steered" / "manifest.json" for f in (alone, tmp_path / "out"))
        assert json.loads(a.read_text())["results"] == json.loads(b.read_text())["results"]
    share = len(PROMPTS) // processes
    for i in range(processes):
        said = [line for line in out.splitlines() if f"process {i}: " in line]
        assert len(said) == share
        assert f"{share}/{share}, 0 min 0 s left" in said[-1]
    assert out.count("grid.png") == 1
    assert f"prompt 1/{share}" in err


def test_a_process_without_a_prompt_waits_for_the_others(one, model, tmp_path):
    words = ["0 red stars", "--model", model, *SMALL, "--out", str(tmp_path / "out")]
    ran(2, *words)
    name = "0000-0-red-stars"
    assert results(tmp_path / "out") == {name: results(one[1])[name]}
    assert pictures(tmp_path / "out" / name) == pictures(one[1] / name)
    out, _ = ran(2, *words, "--resume")  # nobody has any
    assert out.count("grid.png") == 1


def ended(process: subprocess.Popen[str], who: str, out: Path) -> str:
    """Kill -9 a rank, or Ctrl-C to the launcher, when a result is there; what the user sees."""
    until = time.monotonic() + 200
    while not (out.exists() and results(out)) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)
    if who == "launcher":
        process.send_signal(signal.SIGINT)
    else:
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}
        ranks[who].kill()
    _, err = process.communicate(timeout=60)  # far less than a collective's own patience
    assert process.returncode != 0
    return err


@pytest.mark.parametrize(("who", "again"), [("0", 1), ("1", 3), ("launcher", 2)])
def test_a_run_that_lost_a_process_keeps_what_is_finished_and_is_resumed(one, tmp_path, who, again):
    words, alone = one
    out = tmp_path / "out"
    words = [*words, "--out", str(out)]
    err = ended(started(2, *words), who, out)
    kept = results(out)
    assert 0 < len(kept) < len(PROMPTS)
    assert all(files == results(alone)[name] for name, files in kept.items())
    (said,) = told(err)
    why = "interrupted" if who == "launcher" else "another process died"
    assert why in said
    assert f"of 8 are finished and kept: repeat the command with --out {out} --resume" in said
    drawn = {path: path.stat().st_mtime_ns for path in out.glob("0*/*/*")}
    ran(again, *words, "--resume")
    assert pictures(out) == pictures(alone)
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())


def test_what_is_refused_is_said_once(one):
    words, alone = one
    process = started(2, *words, "--out", str(alone))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1  # the launcher's
    (said,) = told(err)
    assert "holds a run; add --resume, or give another --out" in said


def test_a_spread_population_makes_the_pictures_of_one_process(one, tmp_path):
    """To a level here and there: a smaller batch rounds its sums in another order."""
    words, _ = one
    out, _ = ran(2, *words, "--particles", "4", "--out", str(tmp_path / "two"), "--spread")
    ran(1, *words, "--particles", "4", "--out", str(tmp_path / "one"))
    assert out.count(" left: ") == len(PROMPTS)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    for file in (tmp_path / "one").rglob("0000-0?.png"):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        with Image.open(file) as a, Image.open(other) as b:
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    for file in (tmp_path / "one").rglob("lineage.json"):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        a, b = (json.loads(f.read_text())["scores"] for f in (file, other))
        assert [score["ancestors"] for score in a] == [score["ancestors"] for score in b]


def test_a_spread_population_that_lost_a_process_says_what_is_kept(one, tmp_path):
    words, _ = one
    out = tmp_path / "out"
    err = ended(started(2, *words, "--particles", "4", "--spread", "--out", str(out)), "1", out)
    (said,) = told(err)
    assert "another process died" in said
    assert f"repeat the command with --out {out} --resume" in said
    assert "rank      : 1" in err.partition("Root Cause")[2]
    assert "Error: [" not in err  # of the collective that broke


@pytest.mark.parametrize(
    ("processes", "particles", "why"),
    [(1, "4", "--spread divides the particles"), (2, "3", "--particles 3 cannot be spread over 2")],
)
def test_a_spread_that_cannot_be_is_refused_before_a_folder_is_made(
    one, tmp_path, processes, particles, why
):
    out = tmp_path / "out"
    words = [*one[0], "--particles", particles, "--spread", "--out", str(out)]
    process = started(processes, *words)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    (said,) = told(err)
    assert why in said
    assert not out.exists()


def test_a_process_that_waits_hears_that_another_died():
    program = (
        "import os, time\n"
        "from tilt import processes as launched\n"
        "processes = launched.join('cpu')\n"
        "assert processes.count == 2\n"
        "if processes.index == 1:\n"
        "    time.sleep(1)\n"
        "    os._exit(0)\n"
        "try:\n"
        "    processes.finish()\n"
        "except launched.Stopped:\n"
        "    os._exit(0)\n"
        "os._exit(1)\n"
    )
    run_pair(program, port=41)
