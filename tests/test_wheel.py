"""What a wheel contains: the packages and the embedded weights, nothing else of the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("steering", "finetune", "rewards", "tilt")


@pytest.mark.slow
def test_wheel_holds_the_packages_and_the_embedded_weights_only(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tilt_diffusion-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} <= set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    )
    # README.md, say, is a model card: what is in the packages' folders goes in.
    assert set(tracked.stdout.split()) <= set(names)
    assert any(name.endswith(".safetensors") for name in names), "no embedded weights"
    assert wheel.stat().st_size < 40e6


@pytest.mark.slow
def test_an_installed_wheel_has_a_command_that_draws(tmp_path):
    """In a new environment that sees this one's libraries, and nothing of the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tilt_diffusion-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python, here = tmp_path / "env/bin/python", sysconfig.get_paths()["purelib"]
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # a plain line of a .pth file adds a folder, and does not read that folder's own .pth files
    (own,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text(f"{here}\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [
        str(python.parent / "tilt"),
        "steer",
        'the word "CRAB"',
        "--steps",
        "8",
        "--reward",
        "ocr",
    ]
    done = subprocess.run(line, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "out").glob("*/report.html")
    assert "CRAB" in page.read_text(encoding="utf-8")
    where = [str(python), "-c", "import tilt, steering; print(tilt.__file__, steering.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True).stdout
    assert found.count(str(own)) == 2
