from __future__ import annotations

import math

import pytest
import torch

from student.config import StudentConfig
from student.losses import cross_entropy
from student.model import KeyValueCache, Shape, Student, rotate, rotations


def test_true_size_has_the_thesis_parameters() -> None:
    with torch.device("meta"):
        student = Student(Shape.of(StudentConfig(), 262_144, 310, 75))
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 1024  # attention, feed-forward, two norms
    assert student.parameter_counts() == {"embedding": 262_144 * 1024, "rest": 16 * layer + 1024 + 310 * 1024}
    counts = student.parameter_counts()
    assert counts == {"embedding": 268_435_456, "rest": 201_677_824}


@pytest.mark.slow
def test_true_size_takes_a_training_step() -> None:
    student = Student(Shape.of(StudentConfig(), 262_144, 310, 75))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    tokens, predict = torch.randint(0, 262_144, (2, 75)), torch.arange(20, 70)
    targets = torch.randint(0, 310, (50,))
    losses = []
    for _ in range(2):
        loss = cross_entropy(student(tokens, predict), targets).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(310), rel=0.1)
    assert losses[1] < losses[0]


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
