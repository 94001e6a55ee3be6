"""The app in a real browser: headless Chromium, driven against `python scripts/app.py`.

With TILT_SCREENSHOTS=FOLDER, what the browser shows is written there; docs/app.png is one of them.
"""

# pyright: reportMissingImports=false

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("gradio")
pytest.importorskip("selenium")

from browser import PATIENCE, SHOTS, Tab  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The address of a running app that has no network, and what it has logged so far."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    here = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(log.parent),  # nothing is in its cache
        "PYTHONPATH": os.pathsep.join(here),
    }
    command = [sys.executable, "scripts/app.py", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}/"
    try:
        _await_answer(url, process, log)
        yield url, log
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)


def _await_answer(url, process, log):
    until = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the app did not answer: {log.read_text()}")


class App(Tab):
    """One session of the app."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.wait(lambda: self.find("#run"))

    def open(self, *titles):
        for title in titles:
            button = f"//button[contains(., '{title}')]"
            self.wait(lambda path=button: not self.driver.find_element(By.XPATH, path).click())

    def type(self, label, value):
        # the inside of an accordion is made when it is opened
        selector = f"#{label} input, #{label} textarea"
        self.wait(lambda: self.find(selector).is_displayed())
        element = self.find(selector)
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(str(value) or Keys.DELETE)
        element.send_keys(Keys.TAB)

    def run(self):
        self.wait(lambda: self.find("#run").is_enabled())
        self.find("#run").click()


def small(tab, prompt, steps=8, particles=4):
    """Fill the form for a quick run."""
    tab.open("Model", "Filter")
    tab.type("prompt", prompt)
    tab.type("steps", steps)
    tab.type("particles", particles)


def finished(tab):
    tab.wait(lambda: "Finished" in tab.text("#status") or tab.all("#status [role=alert]"))
    assert "Finished" in tab.text("#status"), tab.text("#status")


def test_a_prompt_becomes_pictures_and_a_report(app):
    url, _ = app
    with App(url) as tab:
        small(tab, "two red <b>stars</b>")
        tab.run()
        tab.wait(lambda: tab.all("#scores figure img"))  # previews, while it runs
        finished(tab)
        first = tab.all("#scores section")[0]
        assert len(first.find_elements(By.CSS_SELECTOR, "figure")) == 4
        assert re.search(r"Step \d of 8 · ESS [\d.]+ of 4", first.text)
        tab.wait(lambda: all(tab.drawn("#scores img")))
        tab.wait(lambda: all(tab.drawn("#pictures img")))
        assert len(tab.all("#pictures figure")) == 4
        foreign = [a for a in tab.addresses() if not a.startswith((url, "data:", "blob:"))]
        assert foreign == []
        picture = tab.find("#pictures figure a").get_attribute("href") or ""
        with urllib.request.urlopen(picture) as answer:
            assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
        tab.find("#pictures .tilt-report").click()
        tab.wait(lambda: len(tab.driver.window_handles) == 2)
        tab.driver.switch_to.window(tab.driver.window_handles[-1])
        tab.wait(lambda: "two red <b>stars</b>" in tab.text("body"))
        assert tab.drawn("img") == [True] * len(tab.all("img"))


def test_a_taken_port_is_refused_in_one_sentence(app):
    port = app[0].rpartition(":")[2].strip("/")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/app.py", "--port", port]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert re.search(
        f"tilt app: cannot listen on .* port {port} .* try another --port", done.stderr
    )


def test_only_its_own_folder_is_served(app):
    url, _ = app
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml"), "/tmp"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
        refused.value.close()


def test_stop_stops_and_two_people_do_not_mix(app):
    url, _ = app
    with App(url) as first, App(url) as second:
        small(first, "a circle", steps=1000)
        small(second, "a star")
        first.run()
        first.wait(lambda: "of 1000" in first.text("#status"))
        second.run()
        second.wait(lambda: "Waiting: one run comes first" in second.text("#status"))
        second.find("#stop").click()
        second.wait(lambda: "Stopped before its first step" in second.text("#status"))
        assert "of 1000" in first.text("#status")
        second.run()
        second.wait(lambda: "Waiting" in second.text("#status"))
        first.find("#stop").click()
        first.wait(lambda: re.search(r"Stopped at step \d+ of 1000", first.text("#status")))
        finished(second)
        assert not first.all("#pictures img")
        first.wait(lambda: first.find("#run").is_enabled())
        first.type("steps", 8)
        first.run()  # and it is not broken by having been stopped
        finished(first)


def test_a_closed_tab_stops_its_run(app):
    url, log = app
    with App(url) as gone:
        small(gone, "a circle", steps=1000)
        gone.run()
        gone.wait(lambda: "of 1000" in gone.text("#status"))
        before = log.read_text().count("A run was stopped")
    with App(url) as tab:
        tab.wait(lambda: log.read_text().count("A run was stopped") == before + 1)
        small(tab, "a star")
        tab.run()
        finished(tab)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prompt", "", "A prompt is empty"),
        ("particles", 10_000, "Particles is 10000: give a whole number from 1 to 64"),
        ("model", "tiny-sd33", "did you mean tiny-sd3"),
        ("model", "nobody/has-this", "give a folder that holds it"),
        ("reward", "clip", "give a folder"),
        ("reward", "jpg", "did you mean 'jpeg'"),
        ("reward", "<img src=x>", "<img"),
        ("lora", "/nowhere/lora", "there is no /nowhere/lora"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(app, tabs, field, value, said):
    tabs.driver.refresh()  # another session, in the browser that is there
    tabs.wait(lambda: tabs.find("#run"))
    small(tabs, "a star")
    tabs.type(field, value)
    tabs.run()
    tabs.wait(lambda: tabs.all("#status [role=alert]"))
    assert said.lower() in tabs.text("#status").lower()
    assert not tabs.all("#status img")


@pytest.fixture(scope="module")
def tabs(app):
    with App(app[0]) as tab:
        yield tab


def test_the_builder_writes_the_reward(app):
    with App(app[0]) as tab:
        tab.open("Build a reward")
        for name in ("clip", "jpeg"):
            box = f"//*[@id='chosen']//label[contains(., '{name}:')]//input"
            tab.wait(lambda box=box: not tab.driver.find_element(By.XPATH, box).click())
        value = "return document.querySelector('#reward textarea, #reward input').value"
        spec = lambda: tab.driver.execute_script(value)  # noqa: E731
        tab.wait(lambda: spec() == "clip(tiny) + jpeg")
        tab.type("weight-jpeg", 0.01)
        tab.wait(lambda: spec() == "clip(tiny) + 0.01*jpeg")


@pytest.mark.skipif(not SHOTS, reason="looked at by people: TILT_SCREENSHOTS=FOLDER writes them")
@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [
        ("app", 1200, False),
        ("app-dark", 1200, True),
        ("app-phone", 390, False),
        ("app-phone-dark", 390, True),
    ],
)
def test_screenshots(app, name, width, dark):
    with App(app[0], width, 844, dark) as tab:
        tab.open("Filter")
        tab.type("num_scores", 4)
        if width < 600:
            tab.open("Filter")
        tab.run()
        tab.wait(lambda: tab.all("#scores figure img"))
        tab.shoot(f"{name}-running.png")
        finished(tab)
        assert tab.overflow() <= 0
        tab.wait(lambda: all(tab.drawn("#pictures img")))
        tab.shoot(f"{name}.png")
