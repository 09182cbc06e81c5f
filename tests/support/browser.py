"""Debian's Chromium for tests of pages: opens one, watches it, changes its width and colours.

A page fails its test when it logs an error or asks for anything but itself. With
`GLASSTUNE_SCREENSHOTS=DIR` the pictures that tests take are kept there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import missing

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root has no sandbox; the pages are our own files
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def found(*names: str) -> str:
    """Returns the first of some programs that this machine has, or calls `missing`."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    missing(" or ".join(names))
    raise AssertionError("missing() does not return")


@contextmanager
def started(profile: Path) -> Iterator[Any]:
    """Starts Chromium with an empty profile and yields its driver; nothing is downloaded."""
    chromium = found("chromium", "chromium-browser")
    driver_path = found("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium")
        raise
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=driver_path))
    try:
        driver.set_page_load_timeout(30)
        yield driver
    finally:
        driver.quit()


class Page:
    """One page in the browser.

    Args:
        driver: Of Selenium.
        folder: Where pages are written.
    """

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder
        self.opened: list[str] = []

    def open(self, html: str | Path, *, width: int = 1280, dark: bool = False) -> None:
        """Opens a page, given as its text or as a file, and forgets what was logged before."""
        path = html if isinstance(html, Path) else self.folder / f"page{len(self.opened)}.html"
        if not isinstance(html, Path):
            path.write_text(html, encoding="utf-8")
        self.colours(dark)
        self.resize(width)
        self.opened.append(path.as_uri())
        self.driver.get(path.as_uri())

    def resize(self, width: int, height: int = 900) -> None:
        """Sets the size of the view in CSS pixels; narrower than a window may be."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def colours(self, dark: bool) -> None:
        """Sets what the page sees as the reader's preference."""
        value = "dark" if dark else "light"
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": value}]},
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript and returns its value."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """Returns the elements of a CSS selector that can be seen."""
        found_here = self.driver.find_elements("css selector", selector)
        return [element for element in found_here if element.is_displayed()]

    def one(self, selector: str) -> Any:
        """Returns the only visible element of a selector."""
        elements = self.all(selector)
        assert len(elements) == 1, f"{selector}: {len(elements)} elements"
        return elements[0]

    def texts(self, selector: str) -> list[str]:
        """Returns the visible texts of a selector."""
        return [element.text for element in self.all(selector)]

    def keys(self, *keys: str) -> None:
        """Types into what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def until(self, script: str, seconds: float = 5.0) -> None:
        """Waits until JavaScript gives something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, 0.03).until(lambda _: self.run(f"return {script}"))

    def overflow(self) -> int:
        """Returns by how many pixels the document is wider than the view; 0 or less is right."""
        root = "document.documentElement"
        return int(self.run(f"return {root}.scrollWidth - {root}.clientWidth"))

    def contrast(self, selector: str) -> float:
        """Returns the lowest contrast (WCAG 2) of text to what is behind it, over a selector."""
        return float(self.run(_CONTRAST, selector))

    def screenshot(self, name: str) -> Path | None:
        """Keeps a picture of the whole page where `GLASSTUNE_SCREENSHOTS` says; else nothing."""
        folder = os.environ.get("GLASSTUNE_SCREENSHOTS")
        if not folder:
            return None
        import base64

        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
        )
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def problems(self) -> list[str]:
        """Returns what the page logged as an error and every request that is not the page."""
        found_here = [
            f"{entry['level']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]
        asked: dict[str, str] = {}
        refused = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            values = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                asked[values["requestId"]] = values["request"]["url"]
            elif message["method"] == "Network.loadingFailed" and values.get("blockedReason"):
                refused.add(values["requestId"])
        for number, url in asked.items():
            if url.startswith(("data:", "chrome:")) or url.split("#")[0] in self.opened:
                continue
            found_here.append(f"{'refused' if number in refused else 'request'}: {url}")
        return found_here


_CONTRAST = """
const channel = (value) =>
  (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
// `rgb(1 2 3)` and, where colours were mixed, `color(srgb 0.1 0.2 0.3)`.
const numbers = (colour) => {
  const scale = colour.startsWith("color") ? 255 : 1;
  return colour.match(/[\\d.]+/g).map((text, at) => Number(text) * (at < 3 ? scale : 1));
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
let lowest = 21;
for (const element of document.querySelectorAll(arguments[0])) {
  if (!element.textContent.trim() || !element.getClientRects().length) continue;
  const pair = [light(numbers(getComputedStyle(element).color)), light(behind(element))];
  lowest = Math.min(lowest, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
}
return lowest;
"""
