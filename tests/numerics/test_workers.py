"""Who holds what, how many workers there are and in how many parts they run a step change no number but by rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.model.checkpoint import Tensors, assembled, save_student
from student.train.checkpoint import load_position, save_position
from student.train.loop import Position, Training
from student.train.strategy import CLIP_NORM
from tests.numerics.workers import (
    BF16,
    CONFIG,
    ODD,
    ROWS,
    SAVED_AFTER,
    STEPS,
    STRATEGIES,
    VOCABULARY,
    Course,
    Results,
    changed,
    course,
    results_of,
    start_workers,
)

LIMIT = 1e-6  # of a relative L2 error
AFTER = 3  # steps


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the workers: threads change the order of additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def training(shards: Shards) -> Training:
    return Training.of(ODD, CONFIG, shards)


@pytest.fixture(scope="module")
def alone(training: Training, shards: Shards) -> Course:
    """One worker, in one part, uninterrupted: what all others are compared with."""
    return course(training, shards)


@pytest.fixture(scope="module")
def results(training: Training, shards: Shards, alone: Course, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All trainings of two workers, and ZeRO's of one."""
    folder, start = tmp_path_factory.mktemp("workers"), alone.states[SAVED_AFTER]
    groups = {count: start_workers(count, folder, shards, training, start) for count in (2, 1)}  # at the same time
    two, one = (results_of(context, folder, count) for count, context in groups.items())
    return Results(two.courses | one.courses, two.resumed | one.resumed, two.traffic)


def error(ours: Tensors, theirs: Tensors) -> float:
    """The relative L2 error of all tensors as one vector."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return float((difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values())) ** 0.5)


def worst_gradient(ours: Course, theirs: Course) -> tuple[float, str]:
    pairs = zip(ours.gradients, theirs.gradients, strict=True)
    return max((error({name: a[name]}, {name: b[name]}), name) for a, b in pairs for name in b)


def assert_equal(ours: Course, theirs: Course) -> None:
    """But for rounding: in each step the loss and each gradient, and what was reached."""
    assert ours.losses == pytest.approx(theirs.losses, rel=LIMIT, abs=0)
    assert ours.norms == pytest.approx(theirs.norms, rel=LIMIT, abs=0)
    gradient, name = worst_gradient(ours, theirs)
    assert gradient < LIMIT, name
    for step in (AFTER, STEPS):
        assert error(ours.states[step].weights, theirs.states[step].weights) < LIMIT
        assert error(ours.states[step].average, theirs.states[step].average) < LIMIT


def test_the_reference_would_show_a_wrong_mean(alone: Course, training: Training, shards: Shards) -> None:
    assert min(alone.norms) > 1.5 * CLIP_NORM  # all steps are clipped
    assert all(gradient.norm() > 0 for gradients in alone.gradients for gradient in gradients.values())
    even = course(changed(training, forced_weight=1.0), shards)
    assert worst_gradient(even, alone)[0] > 1e3 * LIMIT


def test_a_step_in_two_parts_equals_one_in_one(training: Training, shards: Shards, alone: Course) -> None:
    assert_equal(course(changed(training, accumulation=2), shards), alone)


CASES = [*itertools.product(STRATEGIES, (2, 1), (1, 2))]


@pytest.mark.parametrize(("strategy", "workers", "accumulation"), CASES)
def test_workers_equal_one_under_every_strategy(
    results: Results, alone: Course, strategy: str, workers: int, accumulation: int
) -> None:
    assert_equal(results.courses[strategy, "float32", workers, accumulation], alone)


@pytest.mark.parametrize("workers", [2, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_saved_by_any_strategy_goes_on_alone(
    results: Results, alone: Course, training: Training, shards: Shards, strategy: str, workers: int
) -> None:
    saved = results.courses[strategy, "float32", workers, 1].states[SAVED_AFTER]
    resumed = course(training, shards, start=saved)
    assert error(resumed.states[STEPS].weights, alone.states[STEPS].weights) < LIMIT


@pytest.mark.parametrize("workers", [2, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_saved_alone_goes_on_under_any_strategy(results: Results, alone: Course, strategy: str, workers: int) -> None:
    resumed = results.resumed[strategy, "float32", workers, 2]
    assert resumed.losses == pytest.approx(alone.losses[SAVED_AFTER:], rel=LIMIT, abs=0)
    for part in ("weights", "first_moment", "second_moment"):
        assert error(getattr(resumed.states[STEPS], part), getattr(alone.states[STEPS], part)) < 2 * LIMIT, part


@pytest.mark.parametrize("strategy", BF16)
def test_bf16_stays_close_to_float32(results: Results, alone: Course, strategy: str) -> None:
    reached = results.courses[strategy, "bf16", 2, 1]
    assert reached.losses == pytest.approx(alone.losses, rel=5e-2)
    assert 1e-4 < worst_gradient(reached, alone)[0] < 5e-2  # it is bf16, and no worse


def test_workers_exchange_the_gradients_of_used_ids_alone(results: Results) -> None:
    traffic = results.traffic
    assert traffic is not None
    assert traffic.bytes == [4 * traffic.parameters] * 3
    assert traffic.parameters < ROWS * ODD.width + 20_000 < VOCABULARY * ODD.width / 100
    assert traffic.exchanges == {"all_reduce"}  # no buffer as long as the vocabulary


def test_a_checkpoint_gives_back_every_bit(training: Training, compiled: CompiledTask, alone: Course, tmp_path: Path) -> None:
    state, folder = alone.states[STEPS], str(tmp_path)
    position = Position(STEPS, [{"epoch": 1.0, "validation_ce": 0.1 + 0.2}], {"loss": 1 / 3})
    assert any(not torch.equal(weight, state.average[name]) for name, weight in state.weights.items())
    save_student(folder, assembled(training.shape, state.average | {"rows": torch.from_numpy(training.rows)}), compiled)
    save_position(folder, state, position.as_dict())
    back, place = load_position(folder)
    assert Position(**place) == position
    for part in ("weights", "first_moment", "second_moment", "average"):
        ours, theirs = getattr(back, part), getattr(state, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
