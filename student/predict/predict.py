"""`retort predict`: comments through a student to answers, exactly once. The teacher is asked only where one is named.

As in an extraction a plan cuts the comments into units first, and each unit has a file of answers with its number: what a
killed run has left to do is the units without one. A few comments are answered in this process, many under Ray Data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.capacity import fitting, ray_options, require_room
from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.base.run import find_run
from pipeline.base.runtime import MALLOC, start_ray
from pipeline.base.signals import Stopped, StopRequest
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.comments.plan import CommentSource, Plan, describe_source, find_comments, find_plan, make_plan, read_unit
from pipeline.comments.reading import Comment, comment_batches, comment_tables
from pipeline.config import TeacherConfig
from pipeline.shards.files import committed_units, write_shard
from pipeline.shards.manifest import write_manifest
from pipeline.task.compiled import CompiledTask
from pipeline.task.vocabulary import WatchedSet
from student.config import AnswerConfig, PredictConfig, StudentSettings
from student.decode.answerer import Answer, Answerer
from student.evaluate.evidence import CERTIFICATE, thresholds_of
from student.model.checkpoint import CALIBRATION, WEIGHTS, load_student, load_temperatures
from student.predict.answer_files import Sourced, encode_part, part_name
from student.predict.teacher import SharedTeachers, Teacher, make_teacher, start_teachers

log = logging.getLogger(__name__)

ABOUT, PLAN, ANSWERS, ASKED, SHARDS = "predict.json", "comments", "answers", "asked", "shards"  # in the stage's folder
LARGE = 64 << 20  # bytes of comments from which Ray's start pays
ROWS_PER_UNIT = 8192  # comments of one unit of work and of one file
MAX_BLOCKS = 4096  # of Ray Data: units beyond this number share blocks


@dataclass(frozen=True)
class Prediction:
    """What is to be answered, and where.

    Attributes:
        student: its folder.
        folder: of the stage.
        source: of the comments.
        config: of the stage.
        asked: whom to ask where the student is unsure.
        thresholds: the confidences below which it is, see `Answerer`.
        engine: of the teacher, if it takes part.
    """

    student: str
    folder: str
    source: CommentSource
    config: PredictConfig
    asked: AnswerConfig
    thresholds: dict[str, float]
    engine: TeacherConfig

    def identity(self) -> dict[str, Any]:
        """What makes a prediction this one and no other."""
        files = [storage.join(self.student, name) for name in (WEIGHTS, CALIBRATION)]
        return {
            "student": [storage.fingerprint(file) for file in files if storage.exists(file)],
            "comments": self.source.model_dump(mode="json"),
            "form": self.config.model_dump(mode="json", include={"format", "probabilities"}),
            "answer": self.asked.model_dump(mode="json", exclude={"agree", "agree_fields", "unfamiliar"})
            | {"thresholds": self.thresholds},
        } | ({"url": self.engine.url} if self.engine.engine == "openai" else {})

    @property
    def asked_folder(self) -> str:
        """Where an API's answers go."""
        return storage.join(self.folder, ASKED)

    @property
    def shards(self) -> str:
        """Where the teacher's answers go, for a later training."""
        return storage.join(self.folder, SHARDS)

    def part(self, unit: int) -> str:
        """Where a unit's answers go."""
        return storage.join(self.folder, ANSWERS, part_name(unit, self.config.format))


def predict(config: StudentSettings, student_folder: str, folder: str) -> dict[str, Any]:
    """Answers every comment that the task's filters let through; returns what predict.json holds.

    `answers/` gets a file for each unit, and `comments/set_aside.jsonl` a line for every row without an answer, with its
    reason. What is already there is not done again.

    Raises:
        UserError: no comments, no student, more malformed rows than allowed, or the folder holds another prediction.
        Stopped: a signal ended it early.
    """
    if config.answer.teacher is not None and not config.answer.asks:
        raise UserError("say when the teacher is asked: below which confidence (--fallback), or to agree how often (--agree)")
    _, compiled = load_student(student_folder)  # each worker loads it too; a damaged one is better refused now
    load_temperatures(student_folder, compiled.task)
    paths = find_comments(config.comments, compiled.task)
    source = describe_source(config.comments, paths, compiled.task, compiled.tokenizer, ROWS_PER_UNIT)
    thresholds, found = thresholds_of(config.answer, student_folder, compiled.task)
    job = Prediction(student_folder, folder, source, config.predict, config.answer, thresholds, config.teacher)
    on_ray = config.predict.workers > 0 if config.predict.workers is not None else _is_large(paths)
    identity = job.identity()
    begun = find_run(folder, ABOUT, identity, "prediction")
    plan = find_plan(storage.join(folder, PLAN), source)
    if plan is None:
        if on_ray:
            import ray.data  # noqa: F401 - before Ray starts, so that its log lines stay away

            start_ray()
        read = comment_batches if on_ray else comment_tables
        tables = read(paths, source.columns(compiled.task), compiled.task, compiled.tokenizer)
        plan = make_plan(storage.join(folder, PLAN), source, config.comments, tables, every=True)
    if begun is None:  # now that there is something to answer
        storage.write_json(storage.join(folder, ABOUT), identity)
    if found:
        storage.write_json(storage.join(folder, CERTIFICATE), found.as_dict())
    log.info("comments: %s", plan.summary())
    _answer(job, plan, on_ray)
    storage.sweep(storage.join(folder, ANSWERS))  # what killed writes have left
    if config.answer.teacher is not None:
        compiled = taught_as(compiled, config.teacher)
        compiled.save(job.shards)
        asked = {"model": config.answer.teacher, "engine": config.teacher.engine}
        facts = {"task_name": compiled.task.name, "hashes": compiled.hashes, "teacher": asked, "files": source.paths}
        taught = write_manifest(job.shards, plan.units, facts | {"comments": plan.model_dump(mode="json")})
        log.info("%s answers of the teacher, for a later training, in %s", f"{taught.rows:,}", job.shards)
    return {"answers": plan.kept, "set_aside": plan.read - plan.kept}


def taught_as(compiled: CompiledTask, teacher: TeacherConfig) -> CompiledTask:
    """The compiled task that a teacher's recorded answers are of: an API tells nothing of tokens that no answer has."""
    if teacher.engine != "openai":
        return compiled
    tokens = compiled.automaton.tokens
    return replace(compiled, watched=WatchedSet(tokens, len(tokens)))


def _answer(job: Prediction, plan: Plan, on_ray: bool) -> None:
    """Answers the units that have no file yet.

    Raises:
        Stopped: a signal asked for it.
    """
    there = set(storage.list_files(storage.join(job.folder, ANSWERS)))
    taught = set(range(plan.units) if job.asked.teacher is None else committed_units(job.shards))
    todo = [unit for unit in range(plan.units) if part_name(unit, job.config.format) not in there or unit not in taught]
    if not todo:
        log.info("all %s units have their answers", plan.units)
        return
    before, started, rows, units = (plan.units - len(todo)) * plan.source.rows_per_unit, time.perf_counter(), 0, 0
    with StopRequest("finishing the unit under way") as stop, progress("answering", plan.kept) as (bar, task):
        for count in _on_ray(job, todo) if on_ray else map(Predictor(job).unit, todo):
            rows, units = rows + count, units + 1
            bar.update(task, completed=before + rows)
            if stop:
                break
    if units < len(todo):
        raise Stopped(f"stopped with {plan.units - len(todo) + units} of {plan.units} units answered")
    seconds = time.perf_counter() - started
    log.info("answered %s comments in %.1f s, %s a second", f"{rows:,}", seconds, f"{rows / seconds:,.0f}")


def _is_large(paths: list[str]) -> bool:
    """Whether Ray's start pays."""
    return sum(storage.size(path) for path in paths) > LARGE


def _on_ray(job: Prediction, todo: list[int]) -> Iterator[int]:
    """Maps units over a pool of actors; gives the comments of each as it ends."""
    import ray.data  # some seconds, which a few comments do not need

    start_ray()
    teachers, beside = start_teachers(job.asked.teacher, job.engine, load_student(job.student)[1], job.asked_folder)
    workers = _workers(job.config, len(todo), beside)
    log.info("answering %s units with %s workers", len(todo), workers)
    threads = str(max(1, int(job.config.cpus_per_worker)))
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": threads}
    ray.data.DataContext.get_current().execution_options.preserve_order = False
    units = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=min(len(todo), MAX_BLOCKS))
    answered = units.map_batches(
        Predictor,
        fn_constructor_args=(job, teachers),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        runtime_env={"env_vars": environment},
        **ray_options(job.config.resources),
    )
    for row in answered.iter_rows():
        if row["refused"]:
            raise UserError(row["refused"])
        yield row["rows"]


def _workers(config: PredictConfig, units: int, beside: dict[str, float]) -> int:
    """As many as are wanted, or there is room for.

    Args:
        beside: what the teachers take, by Ray's names.

    Raises:
        UserError: there is no room for them.
    """
    idle = ray.cluster_resources().get("GPU", 0.0) - beside.get("GPU", 0.0)
    if idle >= 1 and not config.gpus_per_worker:
        log.warning("%g GPU(s) stay idle: --set predict.gpus_per_worker=1 answers on them", idle)
    workers = min(config.workers or fitting(config.resources, beside), units)
    require_room("prediction", workers, config.resources, beside)
    return workers


class Predictor:
    """Answers units, in this process or as an actor of Ray Data.

    Args:
        teachers: to ask instead of one of its own.
    """

    def __init__(self, job: Prediction, teachers: SharedTeachers | None = None) -> None:
        check_code_version()
        self._job, self._answerer = job, Answerer.load(job.student, job.asked.weights, job.thresholds)
        self._teacher: Teacher | SharedTeachers | None = teachers
        if job.asked.teacher and not teachers:
            self._teacher = make_teacher(job.asked.teacher, job.engine, self._answerer.compiled, job.asked_folder)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, list[Any]]:
        """Answers the batch's units; returns the comments of each, or what the user has to mend, which Ray would bury."""
        try:
            rows = [self.unit(unit) for unit in batch["unit"].tolist()]
        except UserError as error:
            return {"rows": [0], "refused": [str(error)]}
        return {"rows": rows, "refused": [""] * len(rows)}

    def unit(self, unit: int) -> int:
        """Answers one unit and writes its file; returns its comments. Again, it writes the same."""
        comments = read_unit(storage.join(self._job.folder, PLAN), unit)
        answers = self._answerer.answer(_rows(comments), value_probabilities=self._job.config.probabilities)
        sourced = self._fall_back(unit, answers, comments)
        part = encode_part(self._job.config.format, self._job.source, comments, sourced, self._answerer.compiled.task)
        storage.write_bytes(self._job.part(unit), part)
        return len(comments)

    def _fall_back(self, unit: int, answers: list[Answer], comments: pa.Table) -> list[Sourced]:
        """The answers, the teacher's instead of unsure ones; a shard keeps what it said."""
        sourced = [Sourced(answer) for answer in answers]
        if self._teacher is None:
            return sourced
        unsure, texts, start = [i for i, a in enumerate(answers) if a.unsure], comments["text"].to_pylist(), time.perf_counter()
        recorded = self._teacher.record([texts[i] for i in unsure])
        for i, values in zip(unsure, recorded.by_text(len(unsure), self._answerer.compiled), strict=True):
            sourced[i] = replace(sourced[i], teacher=values)
        rows = comments.take(pa.array([unsure[i] for i in recorded.places], pa.int64()))
        rows = rows.append_column("sample", pa.array([0] * len(rows), pa.int32()))
        compiled = taught_as(self._answerer.compiled, self._job.engine)
        about = {"hashes": compiled.hashes, "seconds": time.perf_counter() - start}
        write_shard(self._job.shards, unit, rows, recorded.captured, about)
        return sourced


def _rows(comments: pa.Table) -> list[Comment]:
    return [
        Comment(i, text=text, tokens=tokens)
        for i, (text, tokens) in enumerate(zip(*(comments[c].to_pylist() for c in ("text", "tokens")), strict=True))
    ]
