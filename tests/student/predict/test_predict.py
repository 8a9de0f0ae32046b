"""`retort predict`, mostly in one process; tests/integration/test_run.py has all of it under Ray Data."""

from __future__ import annotations

import datetime
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from pipeline.base.signals import Stopped
from pipeline.cli.settings import load_config
from pipeline.comments.reading import Comment
from pipeline.config import TeacherConfig
from pipeline.shards.manifest import open_shards
from pipeline.shards.shares import NEVER, capture_votes
from pipeline.task.compiled import CompiledTask
from student.config import AnswerConfig, PredictConfig
from student.decode.answerer import WHOLE, Answerer
from student.decode.familiarity import Familiarity
from student.evaluate.evidence import EVIDENCE, LENGTH, Held, KnownAnswers
from student.model.checkpoint import save_student, save_temperatures
from student.predict.predict import Prediction, Predictor, _workers, predict
from student.predict.recorded import Recorded
from student.predict.teacher import SharedTeachers, start_teachers
from tests.student.decode.test_decode import make_student

BODIES = [
    "good and LOUD",
    "",
    None,
    "see https://x.org",
    "bad <end_of_turn>",
    *(f"bad and quiet {i}" for i in range(20)),
    "good " * 60,
]
KEPT = [1, *range(6, 26)]  # lines


@pytest.fixture
def student(compiled: CompiledTask, tmp_path: Path) -> str:
    folder = str(tmp_path / "student")
    save_student(folder, make_student(compiled, 3, 6.0, sequence="choices"), compiled)
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.predict.predict.ROWS_PER_UNIT", 8)


def configured(folder: Path, *overrides: str) -> ClusterSettings:
    path = folder / "comments.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"id": i, "body": body}) + "\n" for i, body in enumerate(BODIES)) + "{broken\n")
    return load_config(None, ["predict.workers=0", *overrides], {"comments.paths": [str(path)]})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "out/answers").iterdir()) for row in lines(path)]


def test_every_row_has_an_answer_or_a_reason(compiled: CompiledTask, student: str, tmp_path: Path) -> None:
    done = predict(configured(tmp_path), student, str(tmp_path / "out"))
    found, aside = answers(tmp_path), lines(tmp_path / "out/comments/set_aside.jsonl")
    assert done == {"answers": len(KEPT), "set_aside": len(BODIES) + 1 - len(KEPT)}
    assert [row["line"] for row in found] == KEPT
    assert {row["line"]: row["reason"].split(":")[0] for row in aside} == {
        2: "too_short",
        3: "the text is null",
        4: "urls",
        5: "special_tokens",
        26: "too_long",
        27: "not JSON",
    }
    assert [row["body"] for row in found] == [BODIES[row["line"] - 1] for row in found]
    assert all(compiled.task.fit(row["answer"]) for row in found)
    assert len({path.name for path in (tmp_path / "out/answers").iterdir()}) == 3


def test_a_killed_prediction_goes_on_with_what_is_missing(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    whole = {path: path.read_bytes() for path in (tmp_path / "out/answers").iterdir()}
    gone = tmp_path / "out/answers/part-000001.jsonl"
    gone.unlink()
    done: list[int] = []
    unit = Predictor.unit
    monkeypatch.setattr(Predictor, "unit", lambda self, number: done.append(number) or unit(self, number))
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    assert done == [1]
    assert {path: path.read_bytes() for path in whole} == whole
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    assert done == [1]


def test_a_stopped_prediction_says_so_and_goes_on(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    whole = answers(tmp_path)
    for number in (0, 1):  # the shorter one is there
        (tmp_path / f"out/answers/part-{number:06d}.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.base.signals.StopRequest.__bool__", lambda _: True)
        with pytest.raises(Stopped, match="2 of 3 units"):
            predict(configured(tmp_path), student, str(tmp_path / "out"))
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    assert answers(tmp_path) == whole


def test_another_student_form_or_comments_are_refused(compiled: CompiledTask, student: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    predict(configured(tmp_path), student, out)
    for override, name in (
        ("predict.format=parquet", "form"),
        ("predict.probabilities=true", "form"),
        ("comments.limit=3", "comments"),
    ):
        with pytest.raises(UserError, match=rf"another prediction \(its {name} differ\)"):
            predict(configured(tmp_path, override), student, out)
    for seed, refused in ((4, True), (3, False)):  # other weights in the same folder, and the first ones again
        save_student(student, make_student(compiled, seed, 6.0, sequence="choices"), compiled)
        with pytest.raises(UserError, match="its student differ") if refused else nullcontext():
            predict(configured(tmp_path), student, out)
    save_temperatures(student, {"mood": 2.0, "loud": 1.0})
    with pytest.raises(UserError, match="its student differ"):
        predict(configured(tmp_path), student, out)


def test_a_command_that_found_no_texts_is_not_in_the_way_of_the_mended_one(student: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no key 'words'"):
        predict(configured(tmp_path, "comments.text=words"), student, str(tmp_path / "out"))
    assert predict(configured(tmp_path), student, str(tmp_path / "out"))["answers"] == len(KEPT)


def test_another_way_to_answer_is_refused(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.predict.predict.make_teacher", Beside)
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    for overrides in (["answer.weights=bf16"], ["answer.teacher=some", "answer.fallback=0.5"]):
        with pytest.raises(UserError, match=r"another prediction \(its answer differ\)"):
            predict(configured(tmp_path, *overrides), student, str(tmp_path / "out"))


def test_parquet_holds_the_same(compiled: CompiledTask, student: str, tmp_path: Path) -> None:
    config = configured(tmp_path, "predict.format=parquet", "predict.probabilities=true", "comments.limit=10")
    predict(config, student, str(tmp_path / "out"))
    rows = [row for path in sorted((tmp_path / "out/answers").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["line"] for row in rows] == KEPT[:10]
    for row in rows:
        answer, value_probabilities = json.loads(row["answer"]), json.loads(row["probabilities"])
        assert list(value_probabilities) == list(compiled.task.fields) == list(answer)
        for name, ranked in value_probabilities.items():
            assert sum(pair["share"] for pair in ranked) == pytest.approx(1, abs=1e-3)
            assert [repr(pair["value"]) for pair in ranked] == list(map(repr, compiled.task.fields[name]))
        assert row["confidence"] > 0


def test_a_comment_has_the_same_answer_in_any_company(
    compiled: CompiledTask, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(configured(tmp_path), student, str(tmp_path / "out"))
    monkeypatch.setattr("student.predict.predict.ROWS_PER_UNIT", 1)
    predict(configured(tmp_path), student, str(tmp_path / "alone/out"))
    together, alone = answers(tmp_path), answers(tmp_path / "alone")
    assert [row["answer"] for row in together] == [row["answer"] for row in alone]
    assert [row["confidence"] for row in together] == pytest.approx([row["confidence"] for row in alone], abs=2e-6)


def test_comments_that_cannot_be_read_are_named(student: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no key 'text'"):
        predict(configured(tmp_path, "comments.text=text"), student, str(tmp_path / "out"))
    with pytest.raises(UserError, match="more than 1 malformed"):
        predict(configured(tmp_path, "comments.max_malformed=1"), student, str(tmp_path / "out2"))
    with pytest.raises(UserError, match="no student in"):
        predict(configured(tmp_path), str(tmp_path / "nowhere"), str(tmp_path / "out3"))


def test_temperatures_are_used_where_the_student_has_them(compiled: CompiledTask, student: str, tmp_path: Path) -> None:
    predict(configured(tmp_path), student, str(tmp_path / "plain/out"))
    save_temperatures(student, {"mood": 20.0, "loud": 20.0})
    assert Answerer.load(student).compiled.task == compiled.task
    predict(configured(tmp_path), student, str(tmp_path / "flat/out"))
    plain, flat = answers(tmp_path / "plain"), answers(tmp_path / "flat")
    assert [row["answer"] for row in plain] == [row["answer"] for row in flat]
    assert max(row["confidence"] for row in flat) < min(row["confidence"] for row in plain)


class Beside:
    """A teacher that finds everything mixed but what it cannot be asked."""

    def __init__(self, _model: str, _config: TeacherConfig, compiled: CompiledTask, *_: object) -> None:
        self.compiled = compiled

    def record(self, texts: list[str]) -> Recorded:
        compiled, places = self.compiled, [i for i, text in enumerate(texts) if not text.endswith("7")]
        answer = compiled.tokens(("mixed", False))
        votes = capture_votes([answer] * len(places), [{answer: 1}] * len(places), compiled.automaton)
        others = ((0, 0), (0, 0), (0, compiled.watched.size - compiled.watched.required))
        return Recorded(places, replace(votes, logits=np.pad(votes.logits, others, constant_values=NEVER)))


def test_unsure_answers_are_the_teachers(
    compiled: CompiledTask, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.predict.predict.make_teacher", Beside)
    predict(configured(tmp_path), student, str(tmp_path / "alone/out"))
    alone = {row["line"]: row for row in answers(tmp_path / "alone")}
    threshold = sorted(row["confidence"] for row in alone.values())[len(alone) // 2]
    config = configured(tmp_path, "answer.teacher=some", f"answer.fallback={threshold}")
    predict(config, student, str(tmp_path / "out"))
    taught = 0
    for row in answers(tmp_path):
        before = alone[row["line"]]
        assert row["confidence"] == pytest.approx(before["confidence"], abs=2e-6)
        if before["confidence"] < threshold - 1e-5 and not row["body"].endswith("7"):
            assert (row["source"], row["answer"]) == ("teacher", {"mood": "mixed", "loud": False})
            taught += 1
        else:
            assert (row["source"], row["answer"]) == ("student", before["answer"])
    assert taught > 5
    shards = open_shards(str(tmp_path / "out/shards"))
    asked = [text for table in shards.tables() for text in table.texts]
    assert asked == [row["body"] for row in answers(tmp_path) if row["source"] == "teacher"]
    assert shards.compiled.hashes == compiled.hashes  # to be joined with those that the student learnt from
    with pytest.raises(UserError, match="fall back on"):
        configured(tmp_path, "answer.fallback=0.5")
    with pytest.raises(UserError, match="--fallback"):
        predict(configured(tmp_path, "answer.teacher=some"), student, str(tmp_path / "unsure"))


def test_unfamiliar_texts_are_the_teachers(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.predict.predict.make_teacher", Beside)
    asked = configured(tmp_path, "answer.teacher=some", "answer.unfamiliar=0.5")
    with pytest.raises(UserError, match="run `retort evaluate` first"):
        predict(asked, student, str(tmp_path / "early"))
    confidence, texts = np.linspace(0.1, 1, len(BODIES[5:25])), BODIES[5:25]
    familiarity = Familiarity.fit(texts[:10], texts, confidence)
    familiarity.save(student)
    predict(asked, student, str(tmp_path / "out"))
    rows = answers(tmp_path)
    found = familiarity.of([row["body"] for row in rows], np.array([row["confidence"] for row in rows]))
    expected = [
        "teacher" if one < 0.5 and not row["body"].endswith("7") else "student" for one, row in zip(found, rows, strict=True)
    ]
    assert [row["source"] for row in rows] == expected
    assert set(expected) == {"teacher", "student"}


def test_a_certificate_says_which_answers_are_the_students_own(
    compiled: CompiledTask, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.predict.predict.make_teacher", Beside)
    random = np.random.default_rng(0)
    by_field = 1 - random.random((2000, 2)) ** 4 / 2
    agrees = (random.random((2000, 2)) < by_field).tolist()
    known = KnownAnswers(confidence=by_field.tolist(), agrees=agrees)
    held = Held(
        answers="teacher",
        measured_on="x",
        measured=datetime.date.today(),
        chooses=known,
        tests=known,
        mix={"mood": [1, 2, 3], "loud": [4, 2], LENGTH: [3, 3]},
        cuts=[9],
    )
    Path(student, EVIDENCE).write_text(held.model_dump_json())
    asked = "answer.teacher=some", "answer.agree_fields=mood=0.97"
    predict(configured(tmp_path, *asked), student, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out/certificate.json").read_text())
    least = found["thresholds"]["mood"]
    texts = BODIES[5:25]
    ids = compiled.tokenizer.encode(texts)
    rows = [Comment(i, text=text, tokens=ids[i]) for i, text in enumerate(texts)]
    unsure = [answer.unsure for answer in Answerer.load(student, thresholds={"mood": least}).answer(rows)]
    sources = [row["source"] for row in answers(tmp_path)[1:]]
    expected = [one and not text.endswith("7") for one, text in zip(unsure, texts, strict=True)]
    assert sources == ["teacher" if asked else "student" for asked in expected]
    assert set(sources) == {"teacher", "student"}
    assert predict(configured(tmp_path, *asked), student, str(tmp_path / "out"))["answers"] == len(KEPT)
    with pytest.raises(UserError, match="another prediction"):
        predict(configured(tmp_path, "answer.teacher=some", "answer.agree=0.8"), student, str(tmp_path / "out"))


class Counted(Beside):
    """A teacher that leaves a file where it starts."""

    def __init__(self, model: str, config: TeacherConfig, compiled: CompiledTask) -> None:
        super().__init__(model, config, compiled)
        Path(model, str(os.getpid())).touch()


@pytest.mark.slow
def test_workers_share_the_teachers(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.predict.teacher.FallbackTeacher", Counted)
    monkeypatch.setattr("student.predict.teacher.load_same_tokenizer", lambda *_: None)
    (tmp_path / "teacher").mkdir()
    asked = f"answer.teacher={tmp_path}/teacher", "answer.fallback=1"
    two = "predict.workers=2", "predict.cpus_per_worker=0.5"
    try:
        done = predict(configured(tmp_path, *asked, *two), student, str(tmp_path / "out"))
    finally:
        ray.shutdown()
    assert len(list((tmp_path / "teacher").iterdir())) == 1
    sources = {row["line"]: row["source"] for row in answers(tmp_path)}
    assert len(sources) == done["answers"] == len(KEPT)
    assert set(sources.values()) == {"teacher", "student"}


def test_a_worker_that_shares_teachers_starts_none(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("student.predict.predict.make_teacher", lambda *given: started.append(given))
    asked = AnswerConfig(teacher="some", fallback=1)
    job = Prediction(student, str(tmp_path), None, PredictConfig(), asked, {WHOLE: 1}, TeacherConfig())
    shared = SharedTeachers([])
    assert Predictor(job, shared)._teacher is shared
    assert not started
    Predictor(job)
    assert len(started) == 1


def test_teachers_reserve_what_an_extractions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    started: list[tuple[Any, ...]] = []

    def remote(**given: Any) -> Any:
        options.append(given)
        return lambda _: SimpleNamespace(remote=lambda *given: started.append(given))

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr("student.predict.teacher.load_same_tokenizer", lambda *_: None)
    config = TeacherConfig(actors=2, tensor_parallel=2, gpus=1, machines="big")
    assert start_teachers("some", config, None, "")[1] == {"CPU": 2, "GPU": 4, "big": pytest.approx(0.002)}
    (given,) = options
    assert (given["num_cpus"], given["num_gpus"], given["resources"]) == (1, 2, {"big": pytest.approx(0.001)})
    assert len(started) == 2
    assert start_teachers(None, config, None, "") == (None, {})


def test_workers_take_the_gpus_that_they_are_given_and_no_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}])
    assert _workers(PredictConfig(gpus_per_worker=1), 100, {}) == 4
    assert _workers(PredictConfig(gpus_per_worker=1), 100, {"CPU": 0.5, "GPU": 2}) == 2
    assert not caplog.text
    assert _workers(PredictConfig(), 100, {}) == 16
    assert "4 GPU(s) stay idle: --set predict.gpus_per_worker=1" in caplog.text
    assert _workers(PredictConfig(gpus_per_worker=1), 3, {}) == 3
    with pytest.raises(UserError, match=r"4 × 1 \+ 1 beside = 5 GPU"):
        _workers(PredictConfig(gpus_per_worker=1, workers=4), 100, {"GPU": 1})
