"""Values of several fields that go together: what is written, read and compiled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.base.errors import UserError
from pipeline.task.automaton import build, is_of_task
from pipeline.task.compilation import compile_automaton, compose_answers
from pipeline.task.task import Task
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import TextTokenizer
from tests.pipeline.task.test_compilation import brute_force, language_from
from tests.tiny import tiny_task

FIELDS = {"urgent": [True, False], "domain": ["bank", "travel"], "intent": ["pay", "fly", "other"], "tags": ["a", "ab"]}
PAIRS = [["bank", "pay"], ["travel", "fly"], ["bank", "other"], ["travel", "other"]]


def combined(values: list[list[Any]] = PAIRS, of: tuple[str, ...] = ("domain", "intent"), **changes: Any) -> Task:
    about = {"fields": FIELDS, "lists": {"tags": {}}, "combinations": [{"fields": list(of), "values": values}]}
    return tiny_task(**(about | {"context": None} | changes))


def test_answers_are_those_whose_values_go_together() -> None:
    task = combined()
    answers = list(task.answers())
    assert len(answers) == len(set(answers)) == task.outputs == 2 * 4 * 4
    assert {values[1:3] for values in answers} == {tuple(pair) for pair in PAIRS}
    assert all(task.parse(task.render(values)) == values for values in answers)
    assert {task.draw(random.Random(seed)) for seed in range(300)} == set(answers)
    assert {task.draw(random.Random(0), place)[1:3] for place in range(4)} == {tuple(pair) for pair in PAIRS}
    wrong = {"urgent": True, "domain": "bank", "intent": "fly", "tags": []}
    assert task.fit(wrong) is None
    assert task.misfit(wrong) == "domain and intent are 'bank', 'fly', which do not go together"
    assert task.near((True, "bank", "other", ())) == [
        (False, "bank", "other", ()),
        (True, "travel", "other", ()),
        (True, "bank", "pay", ()),
        (True, "bank", "other", ("a",)),
        (True, "bank", "other", ("ab",)),
    ]


pairs = st.lists(
    st.tuples(st.sampled_from(["a", "ab", 1, True]), st.sampled_from(["b", "bc", None])), min_size=1, unique_by=repr
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=pairs, kind=st.sampled_from(["gemma", "byte_level"]), first=st.booleans(), listed=st.booleans())
def test_their_automaton_is_that_of_all_answers(
    tokenizers: dict[str, TextTokenizer], pairs: list[tuple[Any, Any]], kind: str, first: bool, listed: bool
) -> None:
    x, y = ({repr(pair[i]): pair[i] for pair in pairs} for i in (0, 1))
    others = {"o": ["joy", "love"], "p": [1, 12]}
    both = {"x": list(x.values()), "y": list(y.values())}
    fields = both | others if first else others | both
    task = combined([list(pair) for pair in pairs], ("x", "y"), fields=fields, lists={"o": {}} if listed else {})
    language = brute_force(task, tokenizers[kind])
    automaton = compile_automaton(task, tokenizers[kind])
    assert language_from(automaton, 0) == language
    assert is_of_task(automaton, task, tokenizers[kind])
    try:
        composed = build(compose_answers(task, tokenizers[kind]))
    except UserError as error:
        assert "list fewer values" in str(error)  # noqa: PT017
    else:
        assert language_from(composed, 0) == language


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"of": ("intent", "domain")}, "domain are to follow each other among the fields"),
        ({"of": ("urgent", "intent")}, "follow each other"),
        ({"of": ("intent", "tags")}, "tags is no field, a list, or in two combinations"),
        ({"values": PAIRS[:2]}, "'other' is no value of intent, or in no combination"),
        ({"values": [*PAIRS, ["bank", "walk"]]}, "'walk' is no value of intent"),
        ({"values": [*PAIRS, PAIRS[0]]}, "2 different ones for domain and intent, once"),
        ({"values": [["bank"]]}, "2 different ones for domain and intent"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        combined(**changes)


def test_a_file_may_list_them_as_a_log_does(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("text,urgent,domain\nx,True,bank\ny,false,travel\nz,true,bank\n")
    (tmp_path / "task.yaml").write_text(
        "name: t\ninstruction: Judge.\nfields: {urgent: {type: boolean}, domain: [bank, travel]}\ncombinations: log.csv\n"
    )
    task = load_task(str(tmp_path / "task.yaml"))
    assert [values[:2] for values in task.answers()] == [(True, "bank"), (False, "travel")]
    (tmp_path / "log.csv").write_text("text,urgent\nx,true\n")
    with pytest.raises(UserError, match="columns for urgent of the fields"):
        load_task(str(tmp_path / "task.yaml"))


def test_a_task_without_them_has_the_hash_from_before_there_were_any() -> None:
    assert tiny_task().hash == tiny_task(combinations=[]).hash
    assert combined().hash != combined([*PAIRS[1:], PAIRS[0]]).hash
