"""The page as a person uses it, in a real browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page, expect

from pipeline.task.compiled import CompiledTask
from student.decode.answerer import FAMILIARITY
from tests.browser import WIDTHS, opened
from tests.student.serve.conftest import FakeAnswerer, Serve
from tests.student.serve.test_teacher import FakeTeacher


def asked(page: Page, text: str) -> str:
    """What the page says once it has an answer."""
    page.get_by_label("Text").fill(text)
    page.get_by_label("Text").press("Control+Enter")
    expect(page.locator("#submit")).to_be_enabled()
    expect(page.locator("#status")).not_to_have_text("…")
    return page.locator("#status").inner_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_it_answers(browser: Browser, serve: Serve, fake: FakeAnswerer, width: int) -> None:
    with serve(fake) as client, opened(browser, str(client.base_url), width) as page:
        expect(page).to_have_title(fake.compiled.task.name)
        assert asked(page, "bad luck <b>again</b>").startswith("Confidence 90.0 %, in ")
        chosen = page.locator("li.chosen").all_inner_texts()
        assert [text.split()[0] for text in chosen] == ["bad", "true"]
        assert "too_short" in asked(page, " ")
        assert page.locator("li").count() == 0


def test_it_says_who_answered_and_why(browser: Browser, serve: Serve, compiled: CompiledTask) -> None:
    with (
        serve(FakeAnswerer(compiled, confidence=0.4), FakeTeacher(), fallback=0.6) as client,
        opened(browser, str(client.base_url), 1280) as page,
    ):
        assert asked(page, "fine").endswith("too unsure, so the answer is the teacher's.")
        assert page.locator(".teacher").all_inner_texts() == ["teacher: mixed (differs)", "teacher: false (differs)"]
    strange = FakeAnswerer(compiled, familiarity=0.01)
    strange.thresholds = {FAMILIARITY: 0.05}
    with serve(strange, FakeTeacher()) as client, opened(browser, str(client.base_url), 1280) as page:
        assert asked(page, "fine").endswith("unlike what the student was trained on, so the answer is the teacher's.")


def test_it_says_what_is_wrong(browser: Browser, serve: Serve, fake: FakeAnswerer) -> None:
    with serve(fake) as client, opened(browser, str(client.base_url), 1280) as page:
        page.route("**/classify", lambda route: route.fulfill(status=200, json={"error": {}}))
        assert asked(page, "fine").startswith("No answer: ")
