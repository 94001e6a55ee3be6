"""What a wheel contains: the packages and the embedded weights, nothing else of the checkout."""

import subprocess
import sys
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
