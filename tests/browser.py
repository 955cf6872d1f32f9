"""A real browser for tests: Chromium from the system's packages, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
VARIABLE = "HIPA_CHROMIUM"  # the path of another one
PATIENCE = 20_000  # milliseconds, on a busy machine


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a window; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: install the package chromium, or set {VARIABLE} to its path")
    with api.sync_playwright() as playwright:
        # In a container its sandbox needs privileges; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Browser, url: str, *, script: str = "", ready: bool = True, **options: Any
) -> Iterator[Page]:
    """The page at a URL, if wanted once the service is ready; a script may run before its own.

    At the end it has written nothing to the console, raised nothing, and asked no other host.
    """
    complaints: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(script)
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"raised: {error}"))
    own = (url, f"blob:{url}", "data:")

    def check_host(request: Any) -> None:
        if not request.url.startswith(own):
            complaints.append(f"asked for {request.url}")

    page.on("request", check_host)
    try:
        page.goto(f"{url}/")
        if ready:
            page.wait_for_selector("#service[data-state=ready]")
        yield page
        # An answer with an error status is a line of the browser's own in its console.
        assert [text for text in complaints if "Failed to load resource" not in text] == []
    finally:
        context.close()
