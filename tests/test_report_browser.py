"""The reports in a real browser: no page is wider than its window, light or dark, and all is drawn.

With TILT_SCREENSHOTS=FOLDER each is written there; docs/report.png is genealogy-1200.png.
"""

# pyright: reportMissingImports=false

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("selenium")

from browser import SHOTS, Tab  # noqa: E402

from tilt.commands import evaluate, rollout, score, steer, train_gdro  # noqa: E402

# what is far below comes late, else
AT_ONCE = """
document.querySelectorAll('img').forEach(i => i.loading = 'eager')
document.querySelectorAll('.prompt').forEach(p => p.style.contentVisibility = 'visible')
"""
WORDS = ['the word "CAT"', 'the word "SUN"', 'the word "DOG"', 'the word "OWL"']


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Of a steered run beside best of k, and of a training with checks and an evaluation."""
    folder = tmp_path_factory.mktemp("reports")
    steps = "20" if SHOTS else "6"
    words = ['the word "ANTS"', 'the word "DUNE"', "--model", "tiny-sd3", "--compare"]
    words += ["--guidance-scale", "1", "--reward", "ocr", "--particles", "4"]
    assert steer.main([*words, "--steps", steps, "--out", str(folder / "steered")]) == 0
    prompts, unseen, tuned = folder / "prompts.txt", folder / "unseen.txt", folder / "tuned"
    prompts.write_text("\n".join(WORDS))
    unseen.write_text('the word "HAT"\nthe word "BOX"')
    call = ["--call.guidance-scale=1.0", f"--call.num-inference-steps={steps}"]
    assert (
        rollout.main([f"--prompts={prompts}", f"--out={folder / 'made'}", "--images=4", *call]) == 0
    )
    assert score.main([str(folder / "made"), "--reward", "ocr + 0*clip(tiny)"]) == 0
    words = [f"--rollouts={folder / 'made'}", f"--out={tuned}", "--gdro.steps=12", "--gdro.k=4"]
    words += ["--gdro.groups=2", "--gdro.lr=2e-3", "--gdro.warmup=1", "--log-every=1"]
    assert train_gdro.main([*words, "--check.every=3", f"--check.prompts={unseen}"]) == 0
    words = [
        f"--prompts={unseen}",
        f"--out={tuned / 'eval'}",
        f"--lora={tuned / 'lora'}",
        "--images=2",
    ]
    assert evaluate.main([*words, "--reward=ocr + 0*clip(tiny)", *call]) == 0
    return {"report": folder / "steered/report.html", "training": tuned / "report.html"}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report", "training"])
def test_it_fits_and_all_is_drawn(reports, name, width, dark):
    with Tab(reports[name].as_uri(), width, 844, dark) as tab:
        assert tab.overflow() <= 0
        assert tab.all("img, svg")
        tab.driver.execute_script(
            "document.querySelectorAll('img').forEach(i => i.loading='eager')"
        )
        tab.wait(lambda: all(tab.drawn("img")))
        assert not [a for a in tab.addresses() if not a.startswith(("file:", "data:"))]
        assert not [e for e in tab.driver.get_log("browser") if e["level"] == "SEVERE"]
        ink = "return getComputedStyle(document.body).color.match(/\\d+/g).slice(0, 3).map(Number)"
        assert (sum(tab.driver.execute_script(ink)) > 400) == dark
        tab.shoot(f"{name}{'-phone' * (width < 600)}{'-dark' * dark}.png")
        if name == "report":
            tab.shoot(f"genealogy-{width}{'-dark' * dark}.png", ".prompt")
