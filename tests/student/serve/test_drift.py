"""How far incoming texts and answers are from those that a student was evaluated on."""

from __future__ import annotations

import datetime
import random

import pytest

from pipeline.task.compiled import CompiledTask
from student.config import ServeConfig
from student.evaluate.evidence import LENGTH, Held, KnownAnswers
from student.serve.drift import FEWEST, Drift
from student.serve.service import Service
from tests.student.serve.conftest import FakeAnswerer, running

NOTHING = KnownAnswers(confidence=[], agrees=[])
SHARES = {"good": 0.6, "bad": 0.3, "mixed": 0.1}


@pytest.fixture
def drift(compiled: CompiledTask) -> Drift:
    moods = [round(1000 * SHARES[str(mood)]) for mood in compiled.task.fields["mood"]]
    mix = {"mood": moods, "loud": [500, 500], LENGTH: [500, 500]}
    day = datetime.date(2026, 11, 27)
    known = {"chooses": NOTHING, "tests": NOTHING}
    held = Held(answers="teacher", measured_on="x", measured=day, mix=mix, cuts=[10], **known)
    return Drift(held, compiled.task)


def note(drift: Drift, shares: dict[str, float], longer: float, texts: int = 1000) -> None:
    chance = random.Random(0)
    for mood in chance.choices(list(shares), list(shares.values()), k=texts):
        text = "a text of some length" if chance.random() < longer else "short"
        drift.note(text, {"mood": mood, "loud": chance.random() < 0.5})


def test_texts_as_they_were_are_no_drift(drift: Drift) -> None:
    note(drift, SHARES, 0.5)
    assert all(drift.index(name) < 0.02 for name in ("mood", "loud", LENGTH))


def test_another_mix_is_one_where_it_differs(drift: Drift) -> None:
    note(drift, SHARES, 0.5)
    note(drift, {"good": 0.2, "bad": 0.3, "mixed": 0.5}, 0.95)
    assert drift.index("mood") == pytest.approx(0.4 * 1.0986 + 0.4 * 1.6094, rel=0.25)  # ln 3 and ln 5, by hand
    assert drift.index(LENGTH) > 0.25
    assert drift.index("loud") < 0.02


def test_few_texts_say_nothing(drift: Drift) -> None:
    note(drift, {"mixed": 1}, 1, FEWEST - 1)
    assert drift.index("mood") == 0
    note(drift, {"mixed": 1}, 1, 1)
    assert drift.index("mood") > 0.25


def test_a_service_tells_it(drift: Drift, compiled: CompiledTask) -> None:
    service = Service(FakeAnswerer(compiled), ServeConfig(), drift=drift)  # type: ignore[arg-type]
    with running(service) as client:
        client.post("/classify", json={"texts": ["bad"] * 200})
        metrics = client.get("/metrics").text
    index = float(next(line for line in metrics.splitlines() if line.startswith('retort_drift_index{of="mood"}')).split()[-1])
    assert index > 0.25
