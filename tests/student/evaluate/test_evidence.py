"""What is kept beside a student to certify it, and what its certificates say."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.task.compiled import CompiledTask
from student.config import AnswerConfig
from student.decode.answerer import FAMILIARITY, WHOLE
from student.evaluate.evidence import (
    EVIDENCE,
    LENGTH,
    Held,
    KnownAnswers,
    certificate,
    load_evidence,
    mix_of,
    targets_of,
    thresholds_of,
)

TEXTS = 2000
MIX: Any = {"mix": {"mood": [1, 2, 3], "loud": [4, 2], LENGTH: [3, 3]}, "cuts": [9]}


def known(random: np.random.Generator) -> KnownAnswers:
    """Of a task of two fields, by an honest student."""
    by_field = 1 - random.random((TEXTS, 2)) ** 4 / 2
    right = [("good", True)] * TEXTS
    agrees = random.random((TEXTS, 2)) < by_field
    found = [(mood if one else "bad", loud if two else False) for (mood, loud), (one, two) in zip(right, agrees, strict=True)]
    return KnownAnswers.of(right, [*found[:-1], None], by_field)


@pytest.fixture(scope="module")
def held() -> Held:
    random = np.random.default_rng(0)
    day = datetime.date(2026, 11, 27)
    return Held(
        answers="teacher", measured_on="the test split", measured=day, chooses=known(random), tests=known(random), **MIX
    )


@pytest.fixture
def student(held: Held, tmp_path: Path) -> str:
    (tmp_path / EVIDENCE).write_text(held.model_dump_json())
    return str(tmp_path)


def test_the_mix_of_answers_and_lengths(compiled: CompiledTask) -> None:
    answers = [("good", True)] * 3 + [("mixed", False), None]
    mix, cuts = mix_of(compiled.task, answers, ["a", "a", "bbb", "cccc", "ddddd"])
    moods = list(compiled.task.fields["mood"])
    assert dict(zip(moods, mix["mood"], strict=True)) == {"good": 3, "bad": 0, "mixed": 1}
    assert sum(mix["loud"]) == 4
    assert sum(mix[LENGTH]) == 5
    assert cuts == sorted(set(cuts))
    assert len(mix[LENGTH]) == len(cuts) + 1


def test_what_is_certified_and_for_how_many(held: Held, compiled: CompiledTask) -> None:
    found = certificate(held, compiled.task, {WHOLE: 0.9, "mood": 0.97})
    assert 0.3 < found.coverage < 1
    assert found.bounds[WHOLE] >= 0.9
    assert found.bounds["mood"] >= 0.97
    evidence = held.tests.evidence(list(compiled.task.fields))
    alone = np.all([evidence.confidence[name] >= least - 1e-9 for name, least in found.thresholds.items()], 0)
    assert alone.sum() == found.alone
    assert str(found).startswith("certified with 95 % confidence: where the student answers alone, on ")
    assert f"at least {100 * found.bounds[WHOLE]:.4g} % of its answers and " in str(found)
    assert f"{100 * found.bounds['mood']:.4g} % of its answers to 'mood' are the teacher's" in str(found)
    assert "are the teacher's; measured on the test split, 2,000 texts" in str(found)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_field_goes_by_those_before_it_where_it_hangs_on_them(held: Held, compiled: CompiledTask, hangs: bool) -> None:
    random = np.random.default_rng(0)
    by_field = 1 - np.stack([random.random(TEXTS) / 2, np.zeros(TEXTS) if hangs else random.random(TEXTS) / 4], 1)
    mood, loud = (random.random((TEXTS, 2)) < by_field).T
    flags = np.stack([mood, mood if hangs else loud], 1)
    part = KnownAnswers(confidence=by_field.tolist(), agrees=flags.tolist())
    found = certificate(held.model_copy(update={"chooses": part, "tests": part}), compiled.task, {"loud": 0.9})
    assert list(found.thresholds) == ["answer up to loud" if hangs else "loud"]
    assert found.targets == {"loud": 0.9}
    assert found.coverage > 0.3
    sure = by_field.prod(1) if hangs else by_field[:, 1]
    assert found.alone == (sure >= next(iter(found.thresholds.values())) - 1e-6).sum()


def test_unfamiliar_texts_are_left_to_the_teacher_before_anything_is_certified(held: Held, compiled: CompiledTask) -> None:
    new = np.arange(TEXTS) % 5 == 0
    parts = [
        KnownAnswers(
            confidence=part.confidence,
            agrees=[[a and not strange for a in row] for row, strange in zip(part.agrees, new, strict=True)],
            familiarity=np.where(new, 0.04, 0.5).tolist(),
        )
        for part in (held.chooses, held.tests)
    ]
    strange = held.model_copy(update={"chooses": parts[0], "tests": parts[1]})
    with pytest.raises(UserError, match="no confidence certifies"):
        certificate(strange, compiled.task, {WHOLE: 0.95})
    found = certificate(strange, compiled.task, {WHOLE: 0.95}, 0.05)
    assert found.thresholds[FAMILIARITY] == 0.05
    assert 0.2 < found.coverage < 0.8
    assert found.texts == TEXTS
    confidence = np.prod(strange.tests.confidence, 1)
    assert found.alone == (~new & (confidence >= found.thresholds[WHOLE] - 1e-6)).sum()
    assert certificate(strange, compiled.task, {WHOLE: 0.5}, 0.05).alone == (~new).sum()
    with pytest.raises(UserError, match="run `retort evaluate` again"):
        certificate(held, compiled.task, {WHOLE: 0.9}, 0.05)


def test_an_answer_that_is_none_agrees_with_nobody(held: Held) -> None:
    assert held.tests.agrees[-1] == [False, False]


def test_more_is_certified_of_fewer_texts(held: Held, compiled: CompiledTask) -> None:
    shares = [certificate(held, compiled.task, {WHOLE: share}).coverage for share in (0.8, 0.9, 0.95)]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ({WHOLE: 0.9999}, "no confidence certifies that 99.99 % of its answers are the teacher's"),
        ({"mod": 0.9}, "no field 'mod': its fields are mood, loud"),
    ],
)
def test_what_cannot_be_certified_is_refused(
    held: Held, compiled: CompiledTask, targets: dict[str, float], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        certificate(held, compiled.task, targets)


def test_thresholds_come_from_the_certificate_or_the_fallback(student: str, compiled: CompiledTask) -> None:
    task = compiled.task
    found, why = thresholds_of(AnswerConfig(teacher="x", agree=0.9), student, task)
    assert why is not None
    assert found == why.thresholds == {WHOLE: found[WHOLE]}
    assert thresholds_of(AnswerConfig(teacher="x", fallback=0.6), student, task) == ({WHOLE: 0.6}, None)
    asked = AnswerConfig(teacher="x", fallback=0.6, unfamiliar=0.05)
    assert thresholds_of(asked, student, task) == ({WHOLE: 0.6, FAMILIARITY: 0.05}, None)
    assert thresholds_of(AnswerConfig(), student, task) == ({}, None)
    with pytest.raises(UserError, match="need a teacher: name it"):
        thresholds_of(AnswerConfig(agree=0.9), student, task)


def test_targets_as_people_write_them() -> None:
    asked = AnswerConfig.model_validate({"agree": 0.9, "agree_fields": "mood=0.99,loud=0.9"})
    assert targets_of(asked) == {WHOLE: 0.9, "mood": 0.99, "loud": 0.9}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"agree": 0.9, "fallback": 0.5, "teacher": "x"}, "either a fallback"),
        ({"agree": 0.9, "weights": "bf16"}, "weights in float32"),
        ({"agree_fields": "mood"}, "agree_fields"),
        ({"unfamiliar": 0.05}, "somebody has to answer unfamiliar texts"),
        ({"agree": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AnswerConfig.model_validate(settings)


def test_a_student_without_evidence_or_with_anothers(student: str, compiled: CompiledTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `retort evaluate` first"):
        load_evidence(str(tmp_path / "none"), compiled.task)
    content = json.loads((tmp_path / EVIDENCE).read_text())
    content["tests"] = {"confidence": [[0.5]], "agrees": [[True]]}
    (tmp_path / EVIDENCE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="of other fields"):
        load_evidence(student, compiled.task)
    (tmp_path / EVIDENCE).write_text(json.dumps(content | {"chooses": {"confidence": [[0.5]], "agrees": []}}))
    with pytest.raises(UserError, match="not of the same texts"):
        load_evidence(student, compiled.task)
