"""Students and their references against people's labels."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.task.task import Task
from pipeline.task.values import Values
from student.evaluate.gold import against_gold, suspects

TASK = Task(name="t", instruction="Judge.", fields={"mood": ["good", "bad"], "stars": [1, 2]})
GOLD: list[Values | None] = [("good", 1), ("good", 2), None, ("bad", 1), ("bad", 1)]
TEACHER: list[Values] = [("good", 1), ("bad", 2), ("good", 1), ("bad", 1), ("good", 1)]
STUDENT: list[Values | None] = [("good", 1), ("good", 2), ("bad", 1), ("good", 1), ("bad", 2)]


def test_shares_intervals_and_f1_are_of_the_labelled_alone() -> None:
    found = against_gold(TASK, GOLD, TEACHER, STUDENT)
    assert found is not None
    assert found["examples"] == 4
    assert found["reference"]["whole"][0] == 2 / 4
    assert found["student"]["fields"]["mood"][0] == 3 / 4
    low, high = found["student"]["whole"][1:]
    n, p, z = 4, 2 / 4, 1.959964  # Wilson's formula
    centre, half = (p + z * z / 2 / n), z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert [low, high] == pytest.approx([(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)], abs=1e-5)
    mood = found["values"]["mood"]
    assert (mood["names"], mood["counts"], mood["confusion"]) == (["good", "bad"], [2, 2], [[2, 0], [1, 1]])
    assert mood["f1"]["student"] == pytest.approx([2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1)])
    assert found["values"]["stars"]["counts"] == [3, 1]


def test_without_labels_there_is_nothing_to_say() -> None:
    assert against_gold(TASK, [None] * 5, TEACHER, STUDENT) is None


def test_suspects_are_what_a_sure_student_answers_otherwise() -> None:
    rows = list(suspects(TASK, "abcde".__getitem__, GOLD, TEACHER, STUDENT, np.array([0.9, 0.5, 0.99, 0.7, 0.6])))
    assert [row["text"] for row in rows] == ["c", "d", "e", "b"]
    assert rows[1]["answer"] == {"mood": "bad", "stars": 1}
    assert rows[1]["gold"] == {"mood": "bad", "stars": 1}
    assert "gold" not in rows[0]


def test_lists_have_their_f1_over_all_labels_and_by_label() -> None:
    task = Task(name="t", instruction="Judge.", fields={"tags": ["a", "b", "c"]}, lists={"tags": {}})  # type: ignore[dict-item]
    gold: list[Values | None] = [(("a",),), (("a", "b"),), None, ((),)]
    student: list[Values | None] = [(("a",),), (("b", "c"),), (("c",),), None]
    found = against_gold(task, gold, [(("a",),), (("a", "b"),), ((),), ((),)], student)
    assert found is not None
    tags = found["values"]["tags"]
    assert tags["counts"] == [2, 1, 0]
    assert tags["labels"]["reference"] == {"micro": 1.0, "macro": 1.0}
    assert tags["labels"]["student"] == pytest.approx({"micro": 2 * 2 / (2 * 2 + 1 + 1), "macro": (2 / 3 + 1) / 2})
    assert found["student"]["whole"][0] == 1 / 3
