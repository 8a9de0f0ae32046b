from __future__ import annotations

from typing import Any

import pytest

import pipeline.extract.progress
from pipeline.extract.monitor import Status
from pipeline.extract.progress import Pace, Watch


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(pipeline.extract.progress.time, "monotonic", lambda: self.now)

    def watch(self, total: int, before: int = 0, actors: int = 1) -> Watch:
        nobody: Any = None
        return Watch(nobody, nobody, total, before, actors, nobody)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_time_left_goes_by_the_last_units_and_not_by_the_start_of_the_engine(clock: Clock) -> None:
    watch = clock.watch(total=900, before=100)
    clock.now += 240  # the engine starts
    for unit in range(1, 51):
        clock.now += 1
        watch.see(Status(unit * 10, 0, []))
    assert watch.line() == "600 of 900 answers, 10.0/s, 30 s left, 0 set aside"


def test_rows_set_aside_are_done_too(clock: Clock) -> None:
    watch = clock.watch(total=1000)
    for unit in range(1, 31):
        clock.now += 1
        watch.see(Status(unit * 8, unit * 2, []))
    assert watch.line() == "240 of 1,000 answers, 10.0/s, 70 s left, 60 set aside"


def test_before_the_second_unit_the_time_left_goes_by_the_whole_run(clock: Clock) -> None:
    watch = clock.watch(total=110)
    clock.now += 50
    watch.see(Status(0, 0, []))
    assert "no answer yet" in watch.line()
    clock.now += 50
    watch.see(Status(10, 0, []))
    assert "0.1/s, 17 min left" in watch.line()


def test_a_pace_forgets_what_is_long_ago(clock: Clock) -> None:
    pace = Pace(actors=1)
    for second in range(600):
        pace.see(second, second)
    for second in range(600, 700):
        pace.see(second, 600 + (second - 600) * 5)
    assert pace.per_second(699) == pytest.approx(5)


def test_a_pace_without_news_stays_for_as_long_as_a_unit_takes_and_falls_from_then_on() -> None:
    pace = Pace(actors=1)
    for unit in range(1, 5):
        pace.see(unit * 100, unit * 50)
    for now in range(400, 500):
        pace.see(now, 200)
        assert pace.per_second(now) == pytest.approx(0.5)
    assert pace.per_second(600) == pytest.approx(1 / 3)


@pytest.mark.parametrize("every", [20, 300])
def test_actors_that_commit_together_are_not_taken_for_fast_ones(every: int) -> None:
    actors, rows, told = 4, 0, list[float | None]()
    pace = Pace(actors)
    for second in range(every * 8):
        if second % every < actors and second >= every:
            rows += 10
        pace.see(second, rows)
        told.append(pace.per_second(second))
    known = [rate for rate in told if rate is not None]
    assert len(known) > 4 * every
    assert known == pytest.approx([40 / every] * len(known))
