"""The report's plots, whatever names and figures they are given."""

from __future__ import annotations

from typing import Any

import pytest

from student.data.answers import REFERENCES
from student.evaluate import plots
from tests.names import NAMES, drawn

TEACHER, GIVEN = REFERENCES["teacher"], REFERENCES["given"]


def figures(*fields: str) -> dict[str, Any]:
    agreed = {"whole": 0.5, "fields": dict.fromkeys(fields, 0.6)}
    return {"student": agreed, "floors": {"linear_svm": agreed, "majority": agreed}}


def curves(*losses: float) -> str:
    names = [f"{split}_{name}" for split in ("train", "validation") for name in ("loss", "choice_accuracy")]
    return drawn(plots.learning_curves([dict.fromkeys(names, loss) | {"epoch": i} for i, loss in enumerate(losses, 1)]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_a_field_may_have_any_name(name: str) -> None:
    drawn(plots.agreement_bars(figures(name, "tone"), TEACHER))


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are_written() -> None:
    svg = drawn(plots.agreement_bars(figures("price_$5_to_$9", "_hidden", "日本語", "<b>"), TEACHER))
    for name in ("price_$5_to_$9", "_hidden", "日本語", "&lt;b&gt;", "whole answer"):
        assert f">{name}<" in svg
    drawn(plots.agreement_bars(figures(*map(str, range(60))), TEACHER))


def test_a_long_name_takes_two_lines() -> None:
    assert plots.fitted("a name of many words", 10) == "a name of\nmany words"
    assert plots.fitted("x" * 50, 10) == "x" * 10 + "\n…"
    assert plots.fitted("bell\x07", 10) == "bell"


@pytest.mark.parametrize("losses", [(5.0, 0.5, 0.002), (0.61, 0.63), (0.4,), (1e5, 1e-5)])
def test_losses_have_plain_numbers(losses: tuple[float, ...]) -> None:
    assert "$" not in curves(*losses)


def test_plots_say_whom_the_student_is_held_against() -> None:
    confidence = {"bins": [{"confidence": 0.5, "accuracy": 0.5, "count": 2}], "ece": 0.1}
    thresholds = [{"confidence": 0.5, "share": 1.0, "whole": 0.5}, {"confidence": 0.9, "share": 0.0, "whole": None}]
    for reference, other in ((TEACHER, GIVEN), (GIVEN, TEACHER)):
        svg = drawn(plots.agreement_bars(figures("tone"), reference))
        svg += drawn(plots.reliability(confidence, reference))
        svg += drawn(plots.trust(confidence | {"thresholds": thresholds}, reference))
        assert f"Agreement with {reference.name}" in svg
        assert svg.count(f"equal to {reference.own}") == 3
        assert other.name not in svg
