from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.train.average import Average
from student.train.loop import Loop, Training
from tests.student.conftest import DEBUG


@pytest.mark.parametrize("steps", [1, 7, 240, 1500, 20_000])
def test_it_is_the_exponential_mean_of_what_was_looked_at(steps: int) -> None:
    average, values = Average(steps), np.random.default_rng(steps).normal(size=steps).cumsum()
    looked = [step for step in range(1, steps + 1) if step % average.every == 0]
    for step in looked:
        average.look(step, {"w": torch.tensor([values[step - 1]])})
    expected, least = 0.0, min(1.0, average.every * 15 / steps)
    for number, step in enumerate(looked):
        share = max(least, 3 / (number + 3))
        expected += share * (values[step - 1] - expected)
    assert average.weights["w"].item() == pytest.approx(expected, abs=1e-9)
    assert len(looked) <= 16 * 15 * 1.1 or average.every == 1


def test_a_training_of_few_steps_has_no_mean() -> None:
    average = Average(15)
    for step in range(1, 16):
        average.look(step, {"w": torch.tensor([float(step)])})
    assert average.weights["w"].item() == 15


def test_a_student_has_the_mean_and_a_training_goes_on_from_its_own_weights(shards: Shards) -> None:
    loop = Loop(Training.of(DEBUG, TrainConfig(epochs=3, batch_size=4, learning_rate=0.01), shards), shards)
    for report in loop.run():
        if report.epoch_ended:
            state = loop.state()
            apart = [name for name, weight in state.weights.items() if not torch.equal(weight, state.average[name])]
            assert apart
            own = {name: weight.clone() for name, weight in state.weights.items()}
            with loop.averaged():
                assert all(torch.equal(weight, state.average[name]) for name, weight in loop.state().weights.items())
                assert loop._trainer.measure(loop._held_out())["ce"] == report.row["validation_ce"]
            assert all(torch.equal(weight, own[name]) for name, weight in loop.state().weights.items())
