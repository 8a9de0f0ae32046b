from __future__ import annotations

import time

from student.evaluate.speed import TIMED, median_ms


def test_what_else_a_machine_does_is_not_counted() -> None:
    calls = 0

    def answer(i: int) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.02 if calls % 3 == 0 else 0.001)  # disturbed now and then

    assert median_ms(answer) < 5
    assert calls >= 3 * TIMED
