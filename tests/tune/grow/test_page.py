"""The page of a loop."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from student.decode.answerer import WHOLE
from tests.browser import shown
from tune.grow import page
from tune.grow.grow import Round

ROUNDS = [Round(200, 0.61, 0.2, None, 3.5), Round(300, 0.74, 0.52, 0.41, 4.5)]


def test_a_browser_shows_it_at_every_width(browser: Browser, tmp_path: Path) -> None:
    text = page.render("<b>triage</b>", {WHOLE: 0.95, "urgent": 0.9}, ROUNDS)
    assert "<b>triage" not in text
    assert "95 % of answers, 90 % of urgent" in text
    shown(browser, text, tmp_path)
