from __future__ import annotations

from typing import Any

import pytest

from student.data.sample_size import FEW, few_examples
from student.evaluate.verdict import sample_size_notes, verdict


def figures(student: float, floor: float, half: float, test: int) -> dict[str, Any]:
    floors = {"majority": {"whole": 0.1}, "linear_svm": {"whole": floor}, "linear_svm_half": {"whole": half}}
    sizes = {"test": test, "train": 8 * test}
    return {"answers": "teacher", "student": {"whole": student}, "floors": floors, "examples": sizes}


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


def report(student: float, floor: float, validation_ce: tuple[float, ...] = (0.3, 0.2)) -> dict[str, Any]:
    epochs = [{"validation_ce": loss} for loss in validation_ce]
    return figures(student, floor, floor, 10_000) | {"training": {"epochs": epochs}}


def test_a_student_above_every_floor_is_said_to_be() -> None:
    told = verdict(report(0.9, 0.8))[0]
    assert told == "The student (90.0 %) is above every floor: linear SVM (80.0 %), majority answer (10.0 %)."


@pytest.mark.parametrize("student", [0.79, 0.8])
def test_a_floor_as_good_as_the_student_is_named_with_what_to_try(student: float) -> None:
    told = verdict(report(student, 0.8))[0]
    assert told.startswith(
        f"A floor is as good as this student: linear SVM agrees on 80.0 %, the student on {100 * student:.1f} %."
    )
    commands = [told.index(command) for command in ("retort prune", "retort extract", "train.epochs=4", "retort tune")]
    assert commands == sorted(commands)


def test_more_epochs_are_not_advised_to_a_student_that_overfits() -> None:
    assert "train.epochs" not in verdict(report(0.7, 0.8, (0.2, 0.3)))[0]


def test_floors_that_were_not_fitted_are_no_proof() -> None:
    told = verdict(report(0.9, 0.8) | {"floors": {}})
    assert "No floor was fitted" in told[0]
    assert "A floor" not in " ".join(told)


def test_answers_that_were_given_have_no_teacher_to_prune() -> None:
    told = " ".join(verdict(report(0.7, 0.8) | {"answers": "given"}))
    assert "--reader MODEL" in told
    assert "retort prune" not in told
    assert "retort extract" not in told


def test_lists_are_judged_by_their_labels_too() -> None:
    found = report(0.5, 0.4)
    found["student"]["labels"] = {"tags": {"micro": 0.612345, "macro": 0.5}}
    found["floors"]["linear_svm"]["labels"] = {"tags": {"micro": 0.6, "macro": 0.25}}
    assert verdict(found)[1] == (
        "F1 of tags, micro and macro: the student 0.612 and 0.500, a linear SVM for each label 0.600 and 0.250."
    )
