"""What a wheel contains: the packages and the embedded weights, nothing else of the checkout."""

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from importlib import metadata
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of a new environment: the wheel, and this environment's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("tilt_diffusion-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    programs, here = folder / "env/bin", sysconfig.get_paths()["purelib"]
    install = ["-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([programs / "python", *install], check=True, capture_output=True)
    # a plain line of a .pth file adds a folder, and does not read that folder's own .pth files
    (own,) = (folder / "env/lib").glob("python*/site-packages")
    (own / "libraries.pth").write_text(f"{here}\n")
    return programs


def outside() -> dict[str, str]:
    """The environment variables, without the one that names the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_an_installed_wheel_has_a_command_that_draws(installed, tmp_path):
    line = [installed / "tilt", "steer", 'the word "CRAB"', "--steps", "8", "--reward", "ocr"]
    done = subprocess.run(line, cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "out").glob("*/report.html")
    assert "CRAB" in page.read_text(encoding="utf-8")
    where = [installed / "python", "-c", "import tilt, steering; print(tilt, steering)"]
    found = subprocess.run(where, cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert found.stdout.count(str(installed.parent)) == 2


@pytest.mark.browser  # which has the extra "app"
def test_an_installed_wheel_has_the_app(installed, tmp_path):
    (about,) = (installed.parent / "lib").glob("python*/site-packages/tilt*.dist-info")
    needs = metadata.Distribution.at(about).requires or []
    assert any(n.startswith("gradio") and "extra" in n for n in needs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, log = [installed / "tilt", "app", "--port", str(port)], tmp_path / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(line, cwd=tmp_path, env=outside(), stderr=said) as app,
    ):
        try:
            assert '"title":"Tilt"' in _page(f"http://127.0.0.1:{port}/", app)
        finally:
            app.terminate()


def _page(address: str, app: subprocess.Popen) -> str:
    """What the address shows once the app listens there."""
    for _ in range(600):
        assert app.poll() is None, "the app has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=60) as page:
            return page.read().decode()
        time.sleep(0.2)
    raise AssertionError("the app does not answer")
