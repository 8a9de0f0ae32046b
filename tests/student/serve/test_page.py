from __future__ import annotations

import re

import httpx


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"(?:src|href)=\"(?!data:|/)", page.text)
    assert "http" not in page.text
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", " style=", "onclick"):
        assert dangerous not in page.text


def test_a_browser_runs_what_is_in_the_page_and_nothing_else(client: httpx.Client):
    policy = dict(part.split(" ", 1) for part in client.get("/").headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])


def test_the_page_says_what_each_part_is(client: httpx.Client):
    page = client.get("/").text
    for part in ('lang="en"', '<label for="text">', 'aria-live="polite"', 'name="viewport"', "prefers-color-scheme"):
        assert part in page
