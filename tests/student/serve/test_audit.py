"""Audits: the teacher's word on answers that the student gives alone, and the alarm when it disagrees too often."""

from __future__ import annotations

import datetime
import json
import random
import time
from pathlib import Path

import pytest

from pipeline.task.compiled import CompiledTask
from student.config import ServeConfig
from student.decode.answerer import WHOLE
from student.evaluate.evidence import Certificate
from student.serve.audit import KEPT, Audit
from student.serve.metrics import Metrics
from student.serve.service import Service
from tests.student.serve.conftest import FakeAnswerer, Serve, running
from tests.student.serve.test_teacher import SAD, FakeTeacher

CERTIFICATE = Certificate(
    targets={WHOLE: 0.9},
    thresholds={WHOLE: 0.5},
    bounds={WHOLE: 0.91},
    coverage=0.8,
    texts=1000,
    alone=800,
    answers="teacher",
    measured_on="the test split",
    measured=datetime.date(2026, 11, 27),
)
GOOD, BAD = {"mood": "good", "loud": True}, {"mood": "bad", "loud": True}


def audited(agreement: list[float], seed: int = 0) -> list[bool]:
    """Whether the alarm was up after each audit, with a chance of agreement for each."""
    chance, audit = random.Random(seed), Audit(1, CERTIFICATE, Metrics(CERTIFICATE), None)
    raised = []
    for share in agreement:
        audit.note("text", GOOD, 0.9, GOOD if chance.random() < share else BAD)
        raised.append(audit.alarm is not None)
    return raised


def test_an_alarm_when_texts_change_and_none_before() -> None:
    for seed in range(20):
        raised = audited([0.93] * 600 + [0.7] * 200, seed)
        assert not any(raised[:600])
        assert any(raised[600:])


def test_no_alarm_in_long_runs_of_texts_as_they_were_certified() -> None:
    assert not any(any(audited([0.92] * 1000, seed)) for seed in range(20))


def test_the_alarm_ends_when_texts_are_as_before() -> None:
    raised = audited([0.5] * 60 + [0.97] * 600)
    assert raised[59]
    assert not raised[-1]


def test_chance_decides_which_answers() -> None:
    audit = Audit(0.1, None, Metrics(), None)
    assert 50 < sum(audit.chosen() for _ in range(1000)) < 170


def wait_for(path: Path, lines: int) -> list[dict[str, object]]:
    for _ in range(1000):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            break
        time.sleep(0.01)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_service_audits_its_own_answers_and_keeps_what_it_hears(compiled: CompiledTask, tmp_path: Path) -> None:
    student, teacher = FakeAnswerer(compiled), FakeTeacher()
    student.thresholds = {WHOLE: 0.5}
    service = Service(student, ServeConfig(audit=1), teacher, CERTIFICATE, str(tmp_path))  # type: ignore[arg-type]
    with running(service) as client:
        assert client.get("/task").json()["audit"]["audited"] == 0
        answer = client.post("/classify", json={"texts": ["fine", ""]}).json()["results"][0]
        assert (answer["source"], answer["answer"]) == ("student", GOOD)
        (row,) = wait_for(tmp_path / KEPT, 1)
        assert {name: row[name] for name in ("body", "answer", "student", "confidence")} == {
            "body": "fine",
            "answer": SAD,
            "student": GOOD,
            "confidence": 0.9,
        }
        client.post("/classify", json={"texts": ["fine"] * 60})
        wait_for(tmp_path / KEPT, 61)
        about, metrics = client.get("/task").json(), client.get("/metrics").text
    assert about["audit"]["alarm"].startswith("the student agrees with its teacher in 0 of the latest 50 audited answers")
    assert about["certificate"] == str(CERTIFICATE)
    assert 'retort_audits_total{agrees="false"} 61.0' in metrics
    assert "retort_audit_alarm 1.0" in metrics
    assert 'retort_certified_agreement{of="whole answer"} 0.91' in metrics
    assert "retort_certified_coverage 0.8" in metrics


def test_unsure_answers_are_no_audits(serve: Serve, compiled: CompiledTask) -> None:
    teacher = FakeTeacher()
    with serve(FakeAnswerer(compiled, confidence=0.4), teacher, fallback=0.6, audit=1) as client:
        assert client.post("/classify", json={"text": "fine"}).json()["results"][0]["source"] == "teacher"
        assert client.get("/task").json()["audit"]["audited"] == 0
    assert teacher.asked == [["fine"]]


@pytest.mark.parametrize("certified", [False, True])
def test_the_interval_is_that_of_the_binomial(certified: bool) -> None:
    audit = Audit(1, CERTIFICATE if certified else None, Metrics(), None)
    assert audit.interval == (1.0, 0.0, 1.0)
    for i in range(10):
        audit.note("text", GOOD, 0.9, GOOD if i else BAD)
    assert audit.interval == pytest.approx((0.9, 0.554984, 0.997471), abs=1e-6)
