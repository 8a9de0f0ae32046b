"""Texts through the student, and the unsure ones through the teacher: what every way to ask has in common."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from pipeline.comments.reading import KEPT, Comment, filter_rows, text_row
from pipeline.task.values import Value
from student.config import ServeConfig
from student.decode.answerer import Answer, Answerer
from student.evaluate.evidence import Certificate
from student.predict.teacher import Teacher
from student.serve.audit import Audit
from student.serve.batcher import Batcher
from student.serve.drift import Drift
from student.serve.metrics import Metrics
from student.serve.pool import AnswererPool
from student.serve.taught import KeptTeacher
from student.serve.turns import Turns

log = logging.getLogger(__name__)

BATCH = 64  # comments decoded together, when as many wait
QUEUE = 4096  # comments that may wait; a request that would add more is refused

TeacherAnswer = dict[str, Value] | None


@dataclass(frozen=True)
class Result:
    """What became of one text.

    Attributes:
        row: the text as read, with its tokens, or why it is set aside.
        answer: the student's; None where the text is set aside.
        teacher: the teacher's answer, where it was asked and gave one.
        unsure: whether the student's confidence is too low for its answer to be taken while there is the teacher's.
    """

    row: Comment
    answer: Answer | None = None
    teacher: TeacherAnswer = None
    unsure: bool = False

    @property
    def source(self) -> str:
        """Whose answer counts."""
        return "teacher" if self.unsure and self.teacher else "student"

    @property
    def values(self) -> TeacherAnswer:
        """The answer that counts, by field."""
        if self.answer is None:
            return None
        return self.teacher if self.unsure and self.teacher else self.answer.values


class Service:
    """A student, and a teacher if there is one, for callers that ask at the same time.

    Attributes:
        draining: whether it is about to end.
        certificate: what is certified of the answers that the student gives alone, if anything is.
        drift: how texts and answers differ from those that the student was evaluated on, where that is known.
        audit: what asks the teacher about some of these answers, if anything does.
        turns: for work that has the event loop for milliseconds.
    """

    def __init__(
        self,
        answerer: Answerer | AnswererPool,
        config: ServeConfig,
        teacher: Teacher | KeptTeacher | None = None,
        certificate: Certificate | None = None,
        folder: str | None = None,
        drift: Drift | None = None,
    ) -> None:
        self.config, self.teacher, self.certificate = config, teacher, certificate
        self.metrics, self.draining = Metrics(certificate), False
        self.turns = Turns()
        self.compiled, self.task = answerer.compiled, answerer.compiled.task
        self._answerer, self._audits = answerer, set[asyncio.Task[None]]()
        share = config.audit if teacher else 0
        self.audit = Audit(share, certificate, self.metrics, folder) if share else None
        self.thresholds, self.drift = answerer.thresholds, drift
        if drift:
            self.metrics.watch_drift(drift.names, drift.index)
        self._student = Batcher(self._decode, BATCH, QUEUE, self.metrics.batch, config.workers)
        self.metrics.watch_queue(lambda: self._student.waiting)
        self._teacher = Batcher(teacher.answer, BATCH, QUEUE, _unobserved) if teacher else None

    async def classify(self, texts: list[Any], value_probabilities: bool = False, ask: bool = False) -> list[Result]:
        """The results of texts, in order.

        Args:
            texts: strings; anything else is set aside as malformed.

        Raises:
            TimeoutError: the student took too long. A teacher that does is left out.
            Overloaded, Closed, Failed: see `Batcher`.
        """
        deadline = time.monotonic() + self.config.timeout_seconds
        async with asyncio.timeout(self.config.timeout_seconds):
            rows = await asyncio.to_thread(self._read, texts)
            answers = iter(await self._student.answer([(row, value_probabilities) for row in rows if row.status == KEPT]))
        found = ((row, next(answers) if row.status == KEPT else None) for row in rows)
        results = [Result(row, answer, unsure=answer is not None and answer.unsure) for row, answer in found]
        for result in results:
            if self.drift and result.answer:
                self.drift.note(result.row.text, result.answer.values)
            self.metrics.comments.labels("answered" if result.answer else result.row.status).inc()
        self._audit_some(results)
        return await self._taught(results, ask, deadline - time.monotonic())

    def close(self) -> None:
        """Answers what waits, then ends the teacher."""
        self._student.close()
        if isinstance(self._answerer, AnswererPool):
            self._answerer.close()
        if self.teacher:
            self.teacher.close()

    def _read(self, texts: list[Any]) -> list[Comment]:
        rows = [text_row(i, self.task.text_of(text)) for i, text in enumerate(texts)]
        return filter_rows(rows, self.task.comments, self.compiled.tokenizer)

    def _decode(self, items: list[tuple[Comment, bool]]) -> list[Answer]:
        return self._answerer.answer(
            [row for row, _ in items], value_probabilities=any(value_probabilities for _, value_probabilities in items)
        )

    async def _taught(self, results: list[Result], ask: bool, seconds: float) -> list[Result]:
        """The results, with the teacher's answers to those it is asked about."""
        asked = [i for i, result in enumerate(results) if result.answer and (ask or result.unsure)]
        if not asked:
            return results
        given = await self._ask([results[i].row.text for i in asked], seconds)
        for i, values in zip(asked, given, strict=True):
            results[i] = replace(results[i], teacher=values)
            if results[i].unsure:
                self.metrics.fallbacks.labels(results[i].source).inc()
        return results

    def _audit_some(self, results: list[Result]) -> None:
        """Has the teacher asked about some answers of the student's own, while the caller has them already."""
        if self.audit:
            chosen = [result for result in results if result.answer and not result.unsure and self.audit.chosen()]
            task = asyncio.create_task(self._audited(self.audit, chosen)) if chosen else None
            if task:
                self._audits.add(task)  # the loop itself keeps no reference
                task.add_done_callback(self._audits.discard)

    async def _audited(self, audit: Audit, chosen: list[Result]) -> None:
        given = await self._ask([result.row.text for result in chosen], self.config.timeout_seconds)
        for result, values in zip(chosen, given, strict=True):
            if result.answer and values:
                audit.note(result.row.text, result.answer.values, result.answer.confidence, values)

    async def _ask(self, texts: list[str], seconds: float) -> list[TeacherAnswer]:
        """The teacher's answers; None to all where it is not there, or fails, or takes too long."""
        if self._teacher and self.teacher and self.teacher.state == "ready":
            try:
                async with asyncio.timeout(seconds):
                    return await self._teacher.answer(texts)
            except (TimeoutError, RuntimeError) as error:  # the second: what a batcher raises
                log.warning("%d comments go without the teacher's answer: %s", len(texts), error or "it took too long")
        return [None] * len(texts)


def _unobserved(_size: int, _seconds: float) -> None:
    """The teacher's batches are no part of the student's figures."""
