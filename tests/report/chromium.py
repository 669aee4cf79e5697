"""A real browser for tests, where the machine has one."""

import contextlib
import shutil

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextlib.contextmanager
def launched():
    """Chromium as the system has it; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no Chromium on this machine: install it to run the browser tests")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page, and all that it asked for, printed and tried."""

    def __init__(self, browser, **options):
        self.page = browser.new_context(**options).new_page()
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))

    def open(self, path):
        """Open a file, and return what is wrong: requests beyond itself, errors, payloads that ran."""
        self.requests.clear()
        self.errors.clear()
        self.page.goto(path.as_uri())
        asked = [url for url in self.requests if url != path.as_uri() and not url.startswith("data:")]
        ran = ["a payload ran"] if self.page.evaluate("'hit' in window") else []
        here = [] if self.page.url == path.as_uri() else [f"went to {self.page.url}"]
        return [f"asked for {url}" for url in asked] + self.errors + ran + here
