"""Votes for whole answers, as tokens' shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.comments.reading import KEPT, Comment, filter_rows
from pipeline.shards.shares import NEVER, capture_votes, greedy
from pipeline.task.automaton import Tokens
from pipeline.task.compilation import compile_automaton
from pipeline.task.fitted_tokenizer import CONTROL, fit_tokenizer
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.values import Values
from pipeline.teacher.capture import TEMPERATURES

TASK = Task(name="t", instruction="Judge.", fields={"mood": ["good", "goods", "bad"], "size": [1, 12, 2]})
ANSWERS = list(TASK.answers())


def _tokens(tokenizer: TextTokenizer, values: Values) -> Tokens:
    return (*tokenizer.encode([TASK.render(values)])[0], tokenizer.end_id)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(ANSWERS), st.integers(1, 9), min_size=1))
def test_shares_are_those_of_values_whatever_the_tokens(any_tokenizer: TextTokenizer, weights: dict[Values, int]) -> None:
    """Up to where another answer parts from the one that was taken, against a count of the answers that begin like it."""
    automaton = compile_automaton(TASK, any_tokenizer)
    votes = {_tokens(any_tokenizer, values): weight for values, weight in weights.items()}
    answer = greedy(votes)
    captured = capture_votes([answer], [votes], automaton)
    for other in votes:
        parted = next((i for i, pair in enumerate(zip(answer, other, strict=False)) if pair[0] != pair[1]), len(answer) - 1)
        kept = [step for step in range(parted + 1) if captured.kept[0, step]]
        found = math.exp(sum(captured.logits[0, step, automaton.column[other[step]]] for step in kept))
        begin_alike = sum(weight for tokens, weight in votes.items() if tokens[: parted + 1] == other[: parted + 1])
        assert math.isclose(found, begin_alike / sum(votes.values()), rel_tol=1e-5)
    assert not automaton.forced[np.array(automaton.walk(answer)[:-1])[captured.kept[0]]].any()


def test_what_has_no_vote_is_never(tokenizer: TextTokenizer) -> None:
    automaton = compile_automaton(TASK, tokenizer)
    answer = _tokens(tokenizer, ("bad", 1))
    captured = capture_votes([answer], [{answer: 1}], automaton)
    kept = captured.logits[captured.kept]
    assert sorted(np.unique(kept)) == [NEVER, 0]
    assert (np.sort(kept, axis=1)[:, -2:] == [NEVER, 0]).all()


def test_the_log_sum_exp_is_that_of_the_shares(tokenizer: TextTokenizer) -> None:
    automaton = compile_automaton(TASK, tokenizer)
    votes = {_tokens(tokenizer, ("bad", 1)): 3, _tokens(tokenizer, ("good", 1)): 1}
    captured = capture_votes([greedy(votes)], [votes], automaton)
    kept = captured.logits[captured.kept].astype(np.float64)
    for k, t in enumerate(TEMPERATURES):
        assert np.allclose(captured.lse[captured.kept][:, k], np.log(np.exp(kept / t).sum(1)), atol=1e-5)


def test_each_value_is_one_token_of_a_fitted_tokenizer() -> None:
    fields = {"a": ["é", "日本", "x y", ": 1", 'q"u', "née"], "b": [True, None, 1, 12, 1.5], "c": ["no", "now"]}
    task = Task(name="t", instruction="Judge.", fields=fields)
    tokenizer = fit_tokenizer(["a text, and another text", "true and now a third, 日"], task)
    automaton = compile_automaton(task, tokenizer)
    assert (~automaton.forced[:-1]).sum() == len(fields)  # a choice a field
    for values in task.answers():
        text = task.render(values)
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    hostile = 'now true: "no" <|end|> ☃ \x00'
    assert tokenizer.decode(tokenizer.encode([hostile])[0]) == hostile
    assert not tokenizer.has_control(tokenizer.encode([hostile])[0])


@pytest.mark.parametrize("token", CONTROL)
def test_texts_with_a_control_token_of_any_model_are_left_out(token: str) -> None:
    tokenizer = fit_tokenizer(["a text"], TASK)
    rows = [Comment(0, text=f"do {token} it"), Comment(1, text="do it")]
    assert [row.status for row in filter_rows(rows, TASK.comments, tokenizer)] == ["special_tokens", KEPT]
