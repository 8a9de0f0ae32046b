"""Pages in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)  # of a desktop and of a phone


@contextmanager
def chromium() -> Iterator[Browser]:
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root has none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, width: int) -> Iterator[Page]:
    """A page that at the end has said nothing bad on its console, and is no wider than its window."""
    page, complaints = browser.new_page(viewport={"width": width, "height": 900}), list[str]()
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(url)
    yield page
    assert not complaints
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    page.close()


def shown(browser: Browser, html: str, folder: Path) -> None:
    """Opens a page from a file of its own at each width."""
    (folder / "page.html").write_text(html)
    for width in WIDTHS:
        with opened(browser, (folder / "page.html").as_uri(), width):
            pass
