"""Headless Chromium, driven by selenium; TILT_SCREENSHOTS=FOLDER has pictures written there."""

# pyright: reportMissingImports=false

import base64
import json
import os
import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

PATIENCE = 120  # s, for anything; two slow cores
SHOTS = os.environ.get("TILT_SCREENSHOTS")


class Tab:
    """A headless Chromium of its own, at an address."""

    def __init__(self, url, width=1200, height=900, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        self.driver.get(url)

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.driver.quit()

    def cdp(self, command, **parameters):
        return self.driver.execute_cdp_cmd(command, parameters)

    def wait(self, until):
        return WebDriverWait(self.driver, PATIENCE, 0.2, [Exception]).until(lambda _: until())

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        # at once: elements are replaced while the run goes on
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return self.driver.execute_script(script, selector)

    def shoot(self, name, selector=None):
        """Keep a picture of the page, or of the first such element."""
        if SHOTS:
            page = "{x: 0, y: 0, width: document.documentElement.scrollWidth, height: "
            page += "document.body.scrollHeight}"
            box = "document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
            found = self.driver.execute_script(f"return {box if selector else page}", selector)
            if selector:
                found["y"] += self.driver.execute_script("return window.scrollY")
            clip = {key: found[key] for key in ("x", "y", "width", "height")} | {"scale": 1}
            shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
            (Path(SHOTS) / name).write_bytes(base64.b64decode(shot["data"]))

    def addresses(self):
        """Every address that the page has asked for."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]

    def drawn(self, selector):
        """Of each picture whether it is there."""
        script = "return [...document.querySelectorAll(arguments[0])].map(i => i.naturalWidth > 0)"
        return self.driver.execute_script(script, selector) or [False]

    def overflow(self):
        """How many pixels the page is wider than the window."""
        size = "return document.documentElement.scrollWidth - window.innerWidth"
        return self.driver.execute_script(size)
