from __future__ import annotations

import ray

from pipeline.base.runtime import start_ray
from pipeline.extract.monitor import Monitor, UnitReport


def test_reports_add_up_the_first_failure_stays_and_a_stop_is_passed_on() -> None:
    start_ray()
    monitor = Monitor.remote()
    assert not ray.get(monitor.report.remote(UnitReport("a", "unit 3", rows=5, set_aside=1)))
    ray.get(monitor.stop.remote())
    assert ray.get(monitor.report.remote(UnitReport("b", "failed", rows=2, failure="the disk is full")))
    assert ray.get(monitor.report.remote(UnitReport("a", "failed", failure="another")))
    status = ray.get(monitor.status.remote())
    assert (status.rows, status.set_aside, status.failure) == (7, 1, "the disk is full")
    assert [(name, state) for name, state, _ in status.actors] == [("a", "failed"), ("b", "failed")]
