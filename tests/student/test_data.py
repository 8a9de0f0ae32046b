from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.manifest import Shards
from student.data import TEST, TRAIN, VALIDATION, Order, load_answers, load_examples, split_of


def test_splits_share_nothing_and_cover_everything(shards: Shards) -> None:
    splits = [load_examples(shards, split).texts for split in (TRAIN, VALIDATION, TEST)]
    assert sum(map(len, splits)) == shards.manifest["rows"]
    assert len(set().union(*splits)) == sum(len(set(texts)) for texts in splits)
    assert len(splits[0]) > 0.7 * shards.manifest["rows"]


@given(st.text())
def test_case_and_spacing_do_not_move_a_comment_to_another_split(text: str) -> None:
    assert split_of(f"  {text} \n") == split_of(text)
    assert split_of("Hello  THERE") == split_of("hello there")


def test_a_batch_lines_up_inputs_targets_and_teacher(shards: Shards) -> None:
    examples, compiled = load_examples(shards, TRAIN), shards.compiled
    indices = np.array([3, 0, 7])
    batch = examples.batch(indices)
    at = 0
    separator = compiled.tokenizer.encode([compiled.task.separator])[0]
    for row, i in enumerate(indices):
        answer = examples.answers[i].tolist()
        prefix = [*compiled.tokenizer.encode([examples.texts[i]])[0], *separator]
        sequence = [*prefix, *answer[:-1]]
        assert batch.tokens[row, : len(sequence)].tolist() == sequence
        assert not batch.tokens[row, len(sequence) :].any()
        span = slice(at, at + len(answer))
        expected = row * batch.tokens.shape[1] + len(prefix) - 1 + np.arange(len(answer))
        assert batch.predict[span].tolist() == expected.tolist()
        assert compiled.watched.tokens[batch.targets[span]].tolist() == answer
        forced = compiled.automaton.forced[compiled.automaton.walk(answer)[:-1]]
        assert (batch.choice[span].numpy() == ~forced).all()
        # the made-up teacher is nearly sure of its own token: a row shifted by one would not be
        assert (batch.teacher[span].argmax(1) == batch.targets[span]).float().mean() > 0.95
        at += len(answer)
    assert at == len(batch.targets)


def test_answers_alone_equal_the_examples(shards: Shards) -> None:
    texts, answers = load_answers(shards, TEST)
    examples = load_examples(shards, TEST)
    assert texts == examples.texts
    assert answers == [answer.tolist() for answer in examples.answers]


def test_limit_takes_the_first(shards: Shards) -> None:
    assert load_examples(shards, TRAIN, limit=5).texts == load_examples(shards, TRAIN).texts[:5]


@given(examples=st.integers(8, 200), batch=st.integers(2, 8), workers=st.integers(1, 2), epoch=st.integers(1, 5))
def test_workers_share_out_one_permutation(examples: int, batch: int, workers: int, epoch: int) -> None:
    order = Order(examples, batch, 0, 0, 1)
    whole = [step.tolist() for step in order.epoch(epoch)]
    parts = [[s.tolist() for s in dataclasses.replace(order, rank=r, workers=workers).epoch(epoch)] for r in range(workers)]
    for step, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert sorted(step) == sorted(i for share in shares for i in share)
    seen = [i for step in whole for i in step]
    assert len(seen) == len(set(seen)) == examples // batch * batch


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order(100, 10, 1, 0, 1)
    first, again, second = ([s.tolist() for s in order.epoch(e)] for e in (1, 1, 2))
    other = [s.tolist() for s in Order(100, 10, 2, 0, 1).epoch(1)]
    assert first == again
    assert first not in (second, other)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UserError, match="5 training examples, batches of 8"):
        _ = Order(5, 8, 0, 0, 1).steps
