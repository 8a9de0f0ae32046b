from __future__ import annotations

from typing import Any

import pytest

from student.data.sample_size import FEW, few_examples, sample_size_notes


def figures(student: float, floor: float, half: float, test: int) -> dict[str, Any]:
    floors = {"majority": {"whole": 0.1}, "tfidf_regression": {"whole": floor}, "tfidf_regression_half": {"whole": half}}
    return {"student": {"whole": student}, "floors": floors, "examples": {"test": test, "train": 8 * test}}


def test_few_examples_are_told_and_many_are_not() -> None:
    told = few_examples(64)
    assert told is not None
    assert told.startswith("64 examples are few")
    assert "retort prune --from" in told
    assert few_examples(FEW) is None


@pytest.mark.parametrize(("test", "margin"), [(100, "± 7.9 points"), (10_000, "± 0.8 points")])
def test_the_margin_is_wilsons(test: int, margin: str) -> None:
    first, *_ = sample_size_notes(figures(0.79, 0.5, 0.5, test))
    assert margin in first


def test_a_student_and_a_floor_that_cannot_be_told_apart_are_named() -> None:
    assert "test on more comments" in " ".join(sample_size_notes(figures(0.80, 0.76, 0.76, 100)))
    assert len(sample_size_notes(figures(0.80, 0.76, 0.76, 10_000))) == 1


def test_more_answers_are_advised_where_the_second_half_of_them_helped_the_floor() -> None:
    notes = sample_size_notes(figures(0.9, 0.7, 0.6, 1000))
    assert notes[1:] == [
        "The second half of the 8,000 training answers was worth 10.0 points to the floor: as many again should bring more."
    ]
    assert len(sample_size_notes(figures(0.9, 0.7, 0.695, 1000))) == 1


def test_few_comments_all_answered_rightly_prove_little() -> None:
    assert "± 13.9 points" in sample_size_notes(figures(1.0, 0.5, 0.5, 10))[0]
