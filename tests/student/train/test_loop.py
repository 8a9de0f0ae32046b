from __future__ import annotations

import pytest

import student.train.loop
import student.train.trainer
from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.train.loop import Loop, Training
from tests.student.conftest import DEBUG


@pytest.mark.parametrize(("workers", "batch"), [(1, 7), (2, 5), (2, 1000), (3, 2), (40, 4)])
def test_workers_measure_the_whole_validation_split_in_equally_many_batches(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, workers: int, batch: int
) -> None:
    monkeypatch.setattr(student.train.loop, "MEASURE_BATCH", batch)
    training = Training.of(DEBUG, TrainConfig(batch_size=16), shards)
    loops = [Loop(training, shards, rank, workers) for rank in range(workers)]
    sizes = [[len(part.tokens) for part in loop._held_out()] for loop in loops]
    assert len({len(share) for share in sizes}) == 1
    assert all(0 < size <= batch for share in sizes for size in share)
    assert sum(map(sum, sizes)) == max(len(loops[0].validation), workers)  # with more workers than examples, some are shared


def test_a_report_has_the_weights_and_the_rate_of_its_own_step(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student.train.trainer, "WARM_UP", 0)
    config = TrainConfig(epochs=2, batch_size=16, log_every=1, learning_rate=0.01)
    rows = [report.row for report in Loop(Training.of(DEBUG, config, shards), shards).run()]
    assert (rows[0]["kl_weight"], rows[0]["ce_weight"]) == pytest.approx((0.95, 0.05))
    assert (rows[-1]["kl_weight"], rows[-1]["ce_weight"]) == pytest.approx((0.9, 0.1))
    assert rows[0]["learning_rate"] == pytest.approx(0.01)
    assert rows[1]["learning_rate"] < 0.01
