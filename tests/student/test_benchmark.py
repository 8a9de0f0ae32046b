from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.students import Data, synthetic_data
from benchmarks.thesis_loop import EQUAL, gradient_error, passes
from benchmarks.training import flops
from pipeline.shards.manifest import Shards
from student.config import StudentConfig, TrainConfig
from student.data.examples import open_examples
from student.data.unpack import TRAIN
from student.model.model import Student
from student.model.shape import Shape
from tests.student.conftest import DEBUG


@pytest.mark.parametrize("together", [1, 3])
def test_the_thesis_loop_has_the_gradient_of_whole_answers(model: Student, shards: Shards, together: int) -> None:
    data = Data(lambda sequence: open_examples(shards, TRAIN, sequence), model.shape, model.rows.numpy())
    assert gradient_error(data, TrainConfig(), torch.device("cpu"), np.arange(7), together) < EQUAL


def test_the_loop_predicts_each_position_once_from_what_was_read_by_then(shards: Shards) -> None:
    batch = open_examples(shards, TRAIN, "full").batch(np.arange(7))
    steps = list(passes(batch))
    assert sum(len(step.predict) for step in steps) == len(batch.predict)
    assert torch.equal(torch.sort(torch.cat([step.targets for step in steps])).values, torch.sort(batch.targets).values)
    assert all(int((step.predict % step.tokens.shape[1]).max()) == step.tokens.shape[1] - 1 for step in steps)


def test_flops_are_the_formula() -> None:
    shape = Shape(9, 9, 5, 20, layers=2, width=4, heads=2, mlp=8)
    work = flops(shape, np.array([3, 5]), predicted=6)
    assert work == 6 * (2 * (4 * 16 + 2 * 32) * 8 - 2 * 32 * 2) + 6 * 4 * 5 * 6 + 12 * 2 * 4 * (9 + 25) / 2


def test_synthetic_examples_make_batches() -> None:
    data = synthetic_data(StudentConfig(**DEBUG.sizes()), "corpus")
    batch = data.examples.batch(np.arange(4))
    assert len(batch.predict) == 4 * 36
    assert int(data.rows.max()) + 1 == data.shape.embeddings < data.shape.input_vocabulary
