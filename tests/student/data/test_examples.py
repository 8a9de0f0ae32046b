from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Batch, columns_of, open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION, split_of
from tests.student.extraction import Said, make_up, write_extraction

EVERY = (("full", False), ("choices", False), ("choices", True))  # a sequence, of shards with choice steps alone


@pytest.fixture(scope="module")
def said(compiled: CompiledTask) -> list[Said]:
    return make_up(compiled, [f"comment {'very ' * (i % 5)}{i} é" for i in range(80)], 5)


@pytest.fixture(scope="module")
def every_step(compiled: CompiledTask, said: list[Said], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_extraction(tmp_path_factory.mktemp("all"), compiled, [said[:33], [], said[33:]])


@pytest.fixture(scope="module")
def choices_alone(compiled: CompiledTask, said: list[Said], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_extraction(tmp_path_factory.mktemp("choices"), compiled, [said[:33], said[33:]], choices_alone=True)


def slow_batch(compiled: CompiledTask, examples: list[Said], sequence: str) -> dict[str, Any]:
    """One token at a time, in Python lists."""
    rows, predict, targets, teacher, lse, choice = [], [], [], [], [], []
    for one in examples:
        row = compiled.tokenizer.encode([one.text])[0] + compiled.tokenizer.encode([compiled.task.separator])[0]
        row_predict, state = [], 0
        for step, token in enumerate(one.answer):
            column = compiled.automaton.tokens.tolist().index(token)
            chosen = int(compiled.automaton.allowed[state].sum()) > 1
            if chosen or sequence == "full":
                row_predict.append(len(row) - 1)
                targets.append(column)
                teacher.append((one.logits[step] - one.lse[step, 0]).astype(np.float16))
                lse.append(one.lse[step])
                choice.append(chosen)
                row = [*row, token]
            state = int(compiled.automaton.next_state[state, column])
        rows.append(row[:-1])  # nothing is predicted from the last
        predict.append(row_predict)
    longest = max(map(len, rows))
    return {
        "tokens": [row + [0] * (longest - len(row)) for row in rows],
        "predict": [i * longest + at for i, row_predict in enumerate(predict) for at in row_predict],
        "targets": targets,
        "teacher": np.stack(teacher),
        "lse": np.stack(lse),
        "choice": choice,
    }


def of_split(said: list[Said], split: str) -> list[Said]:
    return [one for one in said if split_of(one.text) == split]


@pytest.mark.parametrize(("sequence", "alone"), EVERY)
@settings(max_examples=25)
@given(data=st.data())
def test_a_batch_is_what_a_slow_reference_makes(
    compiled: CompiledTask,
    said: list[Said],
    every_step: Shards,
    choices_alone: Shards,
    sequence: str,
    alone: bool,
    data: st.DataObject,
) -> None:
    mine = of_split(said, TRAIN)
    examples = open_examples(choices_alone if alone else every_step, TRAIN, sequence)
    indices = np.array(data.draw(st.lists(st.integers(0, len(mine) - 1), min_size=1, max_size=6)))
    batch = examples.batch(indices)
    expected = slow_batch(compiled, [mine[i] for i in indices], sequence)
    for name in ("tokens", "predict", "targets", "choice"):
        assert getattr(batch, name).tolist() == expected[name], name
    np.testing.assert_array_equal(batch.teacher, expected["teacher"])
    np.testing.assert_array_equal(batch.lse, expected["lse"])
    assert examples.lengths[indices].tolist() == [len(row) for row in unpadded(batch, examples.lengths[indices])]
    assert [batch.tokens.dtype, batch.predict.dtype, batch.targets.dtype] == [torch.int64] * 3
    assert [batch.teacher.dtype, batch.lse.dtype, batch.choice.dtype] == [torch.float16, torch.float32, torch.bool]


def unpadded(batch: Batch, lengths: np.ndarray) -> list[list[int]]:
    """Each row up to its last prediction, which is also its last token."""
    width, rows = batch.tokens.shape[1], []
    for row, tokens in enumerate(batch.tokens.tolist()):
        last = max(at for at in batch.predict.tolist() if at // width == row) % width
        assert not any(tokens[lengths[row] :])
        rows.append(tokens[: last + 1])
    return rows


@pytest.mark.parametrize(("sequence", "alone"), EVERY)
@pytest.mark.parametrize("forced_weight", [0.0, 0.25, 1.0])
def test_examples_weigh_what_their_positions_do(
    every_step: Shards, choices_alone: Shards, sequence: str, alone: bool, forced_weight: float
) -> None:
    examples = open_examples(choices_alone if alone else every_step, TRAIN, sequence)
    indices = np.array([4, 0, 9, 4])
    choice = examples.batch(indices).choice
    expected = int(choice.sum()) + forced_weight * int((~choice).sum())
    assert examples.weight(indices, forced_weight) == pytest.approx(expected)


@pytest.mark.parametrize("split", [TRAIN, VALIDATION, TEST])
def test_an_example_can_be_read_alone(compiled: CompiledTask, said: list[Said], every_step: Shards, split: str) -> None:
    examples, expected = open_examples(every_step, split, "full"), of_split(said, split)
    separator = compiled.tokenizer.encode([compiled.task.separator])[0]
    assert len(examples) == len(expected)
    for i, one in enumerate(expected):
        assert examples.text(i) == one.text
        assert examples.answer(i).tolist() == one.answer
        assert examples.prefix(i).tolist() == compiled.tokenizer.encode([one.text])[0] + separator


def test_the_first_are_the_first(every_step: Shards) -> None:
    examples = open_examples(every_step, TRAIN, "full")
    few = examples.first(5)
    assert [few.text(i) for i in range(len(few))] == [examples.text(i) for i in range(5)]
    assert few.lengths.tolist() == examples.lengths[:5].tolist()
    assert torch.equal(few.batch(np.arange(5)).teacher, examples.batch(np.arange(5)).teacher)
    assert len(examples.first(10_000)) == len(examples.first(None)) == len(examples)


def test_compact_shards_give_what_their_codec_decodes(compiled: CompiledTask, tmp_path: Path) -> None:
    said = make_up(compiled, [f"comment {i}" for i in range(80)], 1, scale=0.01)
    shards = write_extraction(tmp_path, compiled, [said[:40], said[40:]], compact=True)
    assert shards.manifest.codec.shards == {"compact": 2}
    mine = of_split(said, TRAIN)
    tables = list(shards.tables())
    trained = np.concatenate([np.repeat([split_of(text) == TRAIN for text in t.texts], t.lengths) for t in tables])
    decoded = np.concatenate([table.logprobs for table in tables])[trained]
    for sequence in ("full", "choices"):
        batch = open_examples(shards, TRAIN, sequence).batch(np.arange(len(mine)))
        expected = slow_batch(compiled, mine, sequence)
        assert (batch.targets.tolist(), batch.predict.tolist()) == (expected["targets"], expected["predict"])
        at = slice(None) if sequence == "full" else np.array(slow_batch(compiled, mine, "full")["choice"])
        np.testing.assert_allclose(batch.teacher, decoded[at], rtol=2e-3, atol=1e-3)  # a float16 or two apart
        np.testing.assert_allclose(batch.lse, expected["lse"], rtol=1e-2)


def test_whole_answers_are_refused_of_shards_with_choice_steps_alone(choices_alone: Shards) -> None:
    with pytest.raises(UserError, match=r"logits of choice steps alone: train with student.sequence=choices, or extract with"):
        open_examples(choices_alone, TRAIN, "full")


@pytest.mark.parametrize("sequence", ["full", "choices"])
def test_an_empty_split_is_refused(compiled: CompiledTask, tmp_path: Path, sequence: str) -> None:
    text = next(f"comment {i}" for i in range(100) if split_of(f"comment {i}") == TRAIN)
    shards = write_extraction(tmp_path, compiled, [make_up(compiled, [text], 0)])
    assert len(open_examples(shards, TRAIN, sequence)) == 1
    with pytest.raises(UserError, match="no example falls in the validation split: 1 examples are too few"):
        open_examples(shards, VALIDATION, sequence)


def test_an_extraction_without_examples_is_refused(compiled: CompiledTask, tmp_path: Path) -> None:
    shards = write_extraction(tmp_path, compiled, [[], []])
    with pytest.raises(UserError, match="no example falls in the train split: 0 examples are too few"):
        open_examples(shards, TRAIN, "full")


def test_columns_are_where_required_tokens_stand_in_w(compiled: CompiledTask) -> None:
    tokens = compiled.automaton.tokens[[3, 0, 7]]
    assert compiled.watched.tokens[columns_of(compiled, tokens)].tolist() == tokens.tolist()
