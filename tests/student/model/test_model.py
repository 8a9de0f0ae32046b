from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.task.compiled import CompiledTask
from student.config import THESIS, StudentConfig
from student.model.cache import KeyValueCache
from student.model.model import Student, embedding_rows, rotate, rotations
from student.model.shape import Shape
from tests.student.conftest import DEBUG
from tests.student.prune.students import FAMILIES, make


def true_size(embeddings: int = 262_144) -> Shape:
    return Shape(262_144, embeddings, 310, 75, **THESIS.sizes())


def test_true_size_has_the_thesis_parameters() -> None:
    with torch.device("meta"):
        student = Student(true_size())
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 1024  # attention, feed-forward, two norms
    assert student.parameter_counts() == {"embedding": 262_144 * 1024, "rest": 16 * layer + 1024 + 310 * 1024}
    counts = student.parameter_counts()
    assert counts == {"embedding": 268_435_456, "rest": 201_677_824}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_knows_every_tensor_of_its_weights(compiled: CompiledTask, family: str) -> None:
    student = make(compiled, family)
    assert dict(student.shape.tensors()) == {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}


@pytest.mark.slow
def test_true_size_takes_a_training_step() -> None:
    student = Student(true_size(), np.arange(262_144, dtype=np.int32))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    tokens, predict = torch.randint(0, 262_144, (2, 75)), torch.arange(20, 70)
    targets = torch.randint(0, 310, (50,))
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(student(tokens, predict), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(310), rel=0.1)
    assert losses[1] < losses[0]


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=40), data=st.data())
def test_ids_seen_twice_and_those_of_answers_have_rows_of_their_own(counts: list[int], data: st.DataObject) -> None:
    always = data.draw(st.lists(st.integers(0, len(counts) - 1), unique=True))
    rows = embedding_rows(np.array(counts), np.array(always, np.int32))
    own = [i for i, count in enumerate(counts) if count >= 2 or i in always]
    assert rows.dtype == np.int32
    assert rows[own].tolist() == list(range(1, len(own) + 1))
    assert {int(row) for i, row in enumerate(rows) if i not in own} <= {0}


def test_ids_that_share_a_row_are_read_alike(compiled: CompiledTask) -> None:
    ids = compiled.tokenizer.size
    counts = np.zeros(ids, np.int64)
    counts[[5, 9]] = 2
    counts[7] = 1
    rows = embedding_rows(counts, compiled.automaton.tokens)
    shape = Shape(ids, int(rows.max()) + 1, compiled.watched.size, 90, **DEBUG.sizes())
    student = Student(shape, rows).eval()
    assert student.parameter_counts()["embedding"] == len({5, 9, *compiled.automaton.tokens.tolist(), -1}) * DEBUG.width
    unknown = [i for i in range(ids) if rows[i] == 0]
    assert 7 in unknown
    base, alike, other = (student(torch.tensor([[5, i, 9]])) for i in (7, unknown[-1], 5))
    torch.testing.assert_close(base, alike)
    assert not torch.allclose(base[:, 1:], other[:, 1:])


def test_rows_are_kept_with_the_weights(model: Student) -> None:
    rows = model.rows.flip(0)
    student = Student(model.shape, rows.numpy())
    loaded = Student(model.shape)
    loaded.load_state_dict(student.state_dict())
    assert torch.equal(loaded.rows, rows)


def test_dropout_is_for_training_alone(compiled: CompiledTask) -> None:
    ids = compiled.tokenizer.size
    shape = Shape(ids, ids, compiled.watched.size, 90, **DEBUG.sizes() | {"dropout": 0.5})
    student, tokens = Student(shape, np.arange(ids, dtype=np.int32)), torch.randint(0, 300, (2, 20))
    assert torch.equal(student.eval()(tokens), student(tokens))
    assert not torch.equal(student.train()(tokens), student(tokens))


def test_padding_and_later_tokens_change_nothing_before_them(model: Student) -> None:
    tokens = torch.randint(0, 300, (2, 20))
    other = tokens.clone()
    other[:, 12:] = torch.randint(0, 300, (2, 8))
    torch.testing.assert_close(model(tokens)[:, :12], model(other)[:, :12])
    assert not torch.allclose(model(tokens)[:, 12:], model(other)[:, 12:])


def test_predicting_at_positions_equals_slicing(model: Student) -> None:
    tokens = torch.randint(0, 300, (3, 10))
    torch.testing.assert_close(model(tokens, torch.tensor([3, 17, 29])), model(tokens).flatten(0, 1)[[3, 17, 29]])


def test_reading_in_ragged_chunks_equals_reading_at_once(model: Student) -> None:
    tokens = torch.randint(0, 300, (3, 30))
    whole = model(tokens)
    cache = KeyValueCache(model.shape, 3, 40, like=model.head.weight)
    done = [0, 0, 0]
    for lengths in ([5, 1, 9], [0, 7, 2], [6, 3, 1], [1, 1, 1]):
        chunk = torch.zeros(3, max(lengths), dtype=torch.int64)
        for row, length in enumerate(lengths):
            chunk[row, :length] = tokens[row, done[row] : done[row] + length]
            done[row] += length
        logits = model.read(chunk, torch.tensor(lengths), cache)
        for row, length in enumerate(lengths):
            if length:
                torch.testing.assert_close(logits[row], whole[row, done[row] - 1], atol=1e-5, rtol=1e-5)


def test_rotation_keeps_norms_and_depends_on_distance_alone() -> None:
    table = rotations(16, 8)
    query, key = torch.randn(2, 1, 1, 1, 8).unbind(0)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotate(query, table[i][None, None, None]) * rotate(key, table[j][None, None, None])).sum()

    torch.testing.assert_close(rotate(query, table[9][None, None, None]).norm(), query.norm())
    torch.testing.assert_close(score(5, 2), score(12, 9))
    assert not torch.isclose(score(5, 2), score(5, 4))


def test_width_must_split_into_even_heads() -> None:
    with pytest.raises(ValueError, match="multiple of 2 × heads"):
        StudentConfig(width=100, heads=16)
