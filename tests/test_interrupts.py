"""Ctrl-C at any time of any script: one line, exit status 130, no traceback."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilt import started

SCRIPTS = Path(__file__).parent.parent / "scripts"
NAMES = sorted(p.stem for p in SCRIPTS.glob("*.py") if "tilt.main" in p.read_text("utf-8"))
CRITIC = ["--no-paired", "--held-out=0", "--steps=9999", "--save-every=1"]
# What keeps each of them busy for a while after its imports.
BUSY = {
    "steer": ["a red star", "--model", "tiny-sd", "--reward", "jpeg", "--steps", "400"],
    "score": ["pictures", "--prompt", 'the word "CAT"', "--reward", "ocr", "--batch-size", "1"],
    "rollout": ["--prompts=prompts.txt", "--out=runs", "--model=tiny-sd", "--images=64"],
    "evaluate": [
        "--prompts=prompts.txt",
        "--out=eval",
        "--model=tiny-sd",
        "--reward=jpeg",
        "--images=32",
    ],
    "train_gdro": [
        "--rollouts=rolled",
        "--out=gdro",
        "--gdro.steps=1000",
        "--gdro.k=2",
        "--save-every=1",
    ],
    "train_adversarial": [
        "--prompts=prompts.txt",
        "--out=online",
        "--reward=jpeg",
        "--model=tiny-sd3",
    ],
    "train_critic": ["--rollouts=rolled", "--out=critic", "--references=pictures", *CRITIC],
    "app": ["--port", "17863"],
    "bench": ["soak"],
}


def interrupted(folder: Path, name: str, seconds: float) -> tuple[int, str]:
    """Exit status and stderr of a script that gets SIGINT after so many seconds."""
    command = [sys.executable, SCRIPTS / f"{name}.py", *BUSY.get(name, ["--out=runs"])]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores interrupts, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def rolled(tmp_path_factory) -> Path:
    """Scored rollouts, for the trainers."""
    from tilt.commands import rollout, score

    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "one.txt").write_text("a red star\n", encoding="utf-8")
    words = [f"--prompts={folder / 'one.txt'}", f"--out={folder / 'rolled'}", "--images=2"]
    assert rollout.main([*words, "--call.num-inference-steps=4"]) == 0
    assert score.main([str(folder / "rolled"), "--reward", "jpeg", "--device", "cpu"]) == 0
    return folder / "rolled"


def files(folder: Path) -> None:
    from PIL import Image

    (folder / "prompts.txt").write_text("a red star\ntwo blue circles\n" * 20, encoding="utf-8")
    (folder / "pictures").mkdir()
    for i in range(200):
        Image.effect_noise((256, 256), 50).save(folder / "pictures" / f"{i}.png")


def check(status: int, said: str, name: str, may_end: bool) -> None:
    if status == -signal.SIGINT and "tilt" not in said:
        return  # Python itself had not started yet, or had begun to end
    if status == 1 and said.startswith("Fatal Python error: init_import_site"):
        return  # nor had it here
    assert "Traceback" not in said, said
    if status == 130:
        lines = [line for line in said.splitlines() if "interrupted" in line]
        assert len(lines) == 1, said
        assert f"tilt {name.replace('_', ' ')}: " in lines[0]
    else:  # it was over before
        assert may_end, said
        assert status in (0, 2), (status, said)


@pytest.fixture
def handlers():
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    signal.signal(signal.SIGINT, before[0])
    sys.unraisablehook = before[1]


def test_what_breaks_after_an_interrupt_that_was_lost_is_the_interrupt(handlers):
    """As numpy's lazy import does, which calls itself without end once it was cut off."""

    def breaks():
        raise RecursionError

    def loses():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        breaks()

    assert started.run(loses) == 130
    with pytest.raises(RecursionError):
        started.run(breaks)


def test_an_interrupt_in_the_middle_of_the_imports(tmp_path):
    files(tmp_path)
    check(*interrupted(tmp_path, "steer", 0.7), "steer", may_end=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 4, 7, 12, 20])
def test_an_interrupt_at_any_time(name, seconds, rolled, tmp_path):
    files(tmp_path)
    shutil.copytree(rolled, tmp_path / "rolled")
    check(*interrupted(tmp_path, name, seconds), name, may_end=True)
