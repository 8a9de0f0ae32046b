from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fleet import units_per_second
from benchmarks.scale import check_answers, rate, word
from benchmarks.stand_in import StoredAnswers, store
from benchmarks.students import Data, synthetic_data
from benchmarks.tables import _slope
from benchmarks.thesis_loop import EQUAL, gradient_error, passes
from benchmarks.training import flops
from pipeline.extract.monitor import Commit
from pipeline.shards.manifest import Shards
from pipeline.teacher.engines import Request
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


def test_the_stand_in_gives_out_a_shards_answers_in_turn_with_the_logits_of_their_choices(
    shards: Shards, tmp_path: Path
) -> None:
    store(shards, str(tmp_path / "answers.npz"))
    table, forced = next(shards.tables()), shards.compiled.automaton.forced
    found = StoredAnswers(str(tmp_path / "answers.npz")).record([Request([])] * (len(table.lengths) + 1))
    answers = [row[:length] for row, length in zip(found.tokens, found.lengths, strict=True)]
    assert np.array_equal(np.concatenate(answers[:-1]), table.answers)
    assert np.array_equal(answers[-1], answers[0])
    choice = ~forced[shards.compiled.automaton.states_before(answers[:-1])]
    kept = found.kept[:-1]
    assert np.allclose((found.logits - found.lse[..., :1])[:-1][kept], table.logprobs[choice], atol=1e-4)


@pytest.mark.parametrize(("answered", "complaint"), [([0, 1], "1 comments have no answer"), ([0, 1, 2, 1], "1 have several")])
def test_a_prediction_that_lost_or_doubled_an_answer_is_refused(tmp_path: Path, answered: list[int], complaint: str) -> None:
    for name, ids in (("comments/set_aside.jsonl", [3]), ("answers/part-000000.jsonl", answered)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps({"id": str(i)}) + "\n" for i in ids))
    with pytest.raises(SystemExit, match=complaint):
        check_answers(tmp_path, 4)


def test_the_gap_of_a_kill_does_not_count_and_words_differ() -> None:
    assert rate([0.0, 2.0, 100.0, 102.0]) == 8192 / 2
    assert len({word(i) for i in range(1000)}) == 1000


def test_a_fleets_rate_counts_units_while_all_actors_are_busy() -> None:
    late = [Commit("late", 10.0 + second) for second in range(8)]
    early = [Commit("early", 1.0 + second) for second in range(16)]
    commits = sorted([*late, *early], key=lambda commit: commit.time)
    assert units_per_second(commits, 2) == 9 / 5  # from second 10 on, and the last four left out


def test_a_slope_is_what_a_million_texts_add_and_compares_no_driver_alone_with_one_that_has_workers() -> None:
    fewer = {"comments": 500_000, "seconds": 10.0, "driver": 400.0, "worker": 100.0}
    more = {"comments": 1_500_000, "seconds": 40.0, "driver": 402.0, "worker": 103.0}
    assert _slope(fewer, more) == "30 s, 2 + 3 MiB"
    assert _slope(fewer | {"worker": 0.0}, more) == "30 s"
