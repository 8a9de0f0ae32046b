from __future__ import annotations

from statistics import stdev
from typing import Any

import pytest

from pipeline.base.errors import UserError
from tests.tune.store import measures, params
from tune.compare.grouping import Group, group_runs, short_value
from tune.compare.runs import StudentRun
from tune.compare.verdict import count, verdict


def student(params: dict[str, Any], metrics: dict[str, float], state: str = "finished", name: str = "a run") -> StudentRun:
    return StudentRun("id", name, state, "", {key: str(value) for key, value in params.items()}, metrics, ())


def labels(*params: dict[str, Any], by: tuple[str, ...] = ()) -> list[str]:
    groups, _ = group_runs([student(each, {"test/whole": -i / 100}) for i, each in enumerate(params)], by)
    return [group.label for group in groups]


def test_seeds_are_one_student_and_the_best_comes_first() -> None:
    shares = (0.80, 0.83, 0.81)
    runs = [student(params(4, 256, seed), measures(share, 4, 256)) for seed, share in enumerate(shares)]
    worse = student(params(2, 64, 0), measures(0.7, 2, 64))
    beaten = student(params(8, 256, 0), measures(0.75, 8, 256))
    groups, unfinished = group_runs([worse, *runs, beaten, student(params(4, 256, 3), {}, "stopped")])
    assert [(group.number, len(group.runs), group.front) for group in groups] == [(1, 3, True), (2, 1, False), (3, 1, True)]
    spread = groups[0].spread("test/whole")
    assert spread is not None
    assert spread.mean == pytest.approx(sum(shares) / 3)
    assert spread.std == pytest.approx(stdev(shares))
    assert groups[1].spread("test/whole").std is None  # type: ignore[union-attr]
    assert [(each.label, each.run.state) for each in unfinished] == [("layers=4, width=256", "stopped")]


def test_a_student_that_was_not_measured_comes_last() -> None:
    groups, _ = group_runs([student(params(2, 64, 0), {}), student(params(4, 64, 0), measures(0.1, 4, 64))])
    assert [(group.label, group.front) for group in groups] == [("layers=4", True), ("layers=2", False)]


def test_labels_name_what_differs() -> None:
    assert labels(params(2, 64, 0), params(4, 128, 0)) == ["layers=2, width=64", "layers=4, width=128"]
    other_heads = params(2, 64, 0) | {"student.heads": 4}
    assert labels(params(2, 64, 0), other_heads) == ["heads=2", "heads=4"]
    rates = (params(2, 64, 0, learning_rate=0.00123456), params(2, 64, 0))
    assert labels(*rates) == ["learning_rate=0.00123", "learning_rate=default"]
    assert labels(params(2, 64, 0), params(2, 64, 0, top_k=3)) == ["a run", "top_k=3"]
    assert labels(params(2, 64, 1)) == ["a run"]
    ambiguous = (params(2, 64, 0), params(2, 64, 0) | {"train.dropout": 0.2})
    assert labels(*ambiguous) == ["a run", "train.dropout=0.2"]


def test_labels_of_other_shards_have_the_digest_alone() -> None:
    other = params(2, 64, 0) | {"shards.digest": "e" * 40, "shards.rows": 9, "student.embeddings": 3}
    assert labels(params(2, 64, 0), other)[1] == "digest=" + "e" * 23 + "…"


def test_labels_by_given_params() -> None:
    two = (params(2, 64, 0, top_k=5), params(4, 128, 0))
    assert labels(*two, by=("objective", "student.mlp")) == ["objective=curriculum, mlp=256", "objective=curriculum, mlp=512"]
    assert labels(*two, by=("top_k",)) == ["top_k=5", "top_k=–"]
    with pytest.raises(UserError, match=r"near: .*objective"):
        labels(*two, by=("objectiv",))
    with pytest.raises(UserError, match=r"shards\.rows or train\.rows"):
        labels(params(2, 64, 0) | {"train.rows": 1}, by=("rows",))


def test_short_values() -> None:
    assert [short_value(value) for value in ("4.0", "0.0008241", "None", "True", "a\nb")] == [
        "4",
        "0.000824",
        "default",
        "True",
        "a b",
    ]


def judged(*students: tuple[float | None, float | None], comments: float | None = None) -> str:
    """The verdict on students of these whole answers and parameters; student i is named by the letter."""
    groups = []
    for i, (whole, size) in enumerate(students):
        found = (("test/whole", whole), ("parameters", size), ("test/comments", comments))
        metrics = {name: value for name, value in found if value is not None}
        groups.append(Group(i + 1, "ABCDEF"[i], (student({}, metrics),)))
    return verdict(groups)


def test_verdict_names_the_smallest_student_that_is_as_faithful() -> None:
    text = judged((0.85, 4e6), (0.852, 3e6), (0.86, 1e6), (0.851, 0.5e6), (0.80, 0.1e6))
    assert "has 0.5 M parameters, 12 % of its size: D (85.1 % against 85.0 %)" in text


def test_verdict_compares_with_the_best_of_the_large_ones() -> None:
    text = judged((0.80, 4e6), (0.852, 3.7e6), (0.844, 1.85e6), (0.86, 2.5e6))
    assert text == (
        "No student at half the size or less of the best full-size one (B, 85.2 %) is as faithful; "
        "the nearest, C with 1.9 M parameters, is 0.8 points below."
    )
    assert "less than 0.1 points below" in judged((0.85, 4e6), (0.8499, 1e6))
    assert "1.0 points below, where 1,600 test comments leave a standard error of 1.0 points." in judged(
        (0.8, 4e6), (0.79, 1e6), comments=1600
    )


def test_verdict_where_there_is_little_to_compare() -> None:
    assert "nothing to compare" in judged((None, 4e6), (0.8, None))
    assert judged((0.8, 4e6)) == "There is one measured student so far: A, 80.0 %, with 4.0 M parameters."
    assert "No student of half the size or less" in judged((0.8, 4e6), (0.85, 3e6))
    assert "it is also the most faithful" in judged((0.85, 4e6), (0.8, 3e6))
    assert "the most faithful of all is B, 85.0 %" in judged((0.8, 4e6), (0.85, 3e6))


def test_counts() -> None:
    assert [count(number) for number in (950, 99_400, 99_600, 400_000, 17.2e6, 470e6, 2e9)] == [
        "950", "99 k", "0.1 M", "0.4 M", "17.2 M", "0.5 B", "2.0 B",
    ]  # fmt: skip
