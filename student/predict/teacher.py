"""The teacher beside the student: what it answers to texts, for a service or for a batch of comments."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from concurrent.futures import Future
from typing import Any, Literal

import ray

from pipeline.base.capacity import ray_options
from pipeline.base.version import VARIABLE, code_version
from pipeline.config import TeacherConfig
from pipeline.task.compiled import CompiledTask, require_same
from pipeline.task.tokenization import TeacherTokenizer, load_teacher_tokenizer
from pipeline.task.values import Value
from pipeline.teacher.capture import nothing
from pipeline.teacher.engines import Job, Request
from pipeline.teacher.model_files import absolute_model
from pipeline.teacher.process import EngineError, EngineProcess
from student.predict.api_teacher import ApiTeacher
from student.predict.recorded import Recorded

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "failed"]


def load_same_tokenizer(model: str, config: TeacherConfig, compiled: CompiledTask) -> TeacherTokenizer:
    """A teacher's tokenizer.

    Raises:
        UserError: no such model, or one that writes other tokens than the student.
    """
    tokenizer = load_teacher_tokenizer(model, config.revision)
    require_same({"tokenizer": tokenizer.hash}, {"tokenizer": compiled.tokenizer.hash}, f"the teacher {model}", "the student")
    return tokenizer


class FallbackTeacher:
    """Answers as extraction would record them. One thread may ask at a time.

    Its engine starts in the background, in a process of its own, and once more when it has died.

    Raises:
        UserError: no such model, or one that writes other tokens than the student.
    """

    def __init__(self, model: str, config: TeacherConfig, compiled: CompiledTask) -> None:
        self.model = absolute_model(model)
        tokenizer = load_same_tokenizer(self.model, config, compiled)
        self._config, self._compiled, self._prompt = config, compiled, tokenizer.prompt(compiled.task)
        self._job = Job(
            automaton=compiled.automaton,
            end_id=compiled.tokenizer.end_id,
            max_prompt=self._prompt.longest(compiled.task, tokenizer),
            watched=compiled.watched.tokens,
            capture="choices",
        )
        self._closed = False
        self._engine = self._begin()

    @property
    def name(self) -> str:
        """For people: without the folders of this machine."""
        return os.path.basename(self.model.rstrip("/")) if os.path.isabs(self.model) else self.model

    @property
    def state(self) -> State:
        """Of its engine."""
        if not self._engine.done():
            return "starting"
        return "failed" if self._engine.exception() else "ready"

    def answer(self, texts: list[str]) -> list[dict[str, Value] | None]:
        """Its answers, by field; None to a text that cannot be asked. Waits for the engine to start.

        Raises:
            EngineError: the engine died of it; another one is starting.
            UserError: the engine cannot start.
        """
        return self.record(texts).by_text(len(texts), self._compiled)

    def record(self, texts: list[str]) -> Recorded:
        """The same with its logits; see `answer`."""
        engine = self._engine.result()
        prompts = {i: ids for i, text in enumerate(texts) if (ids := self._ids(text))}
        if not prompts:
            return Recorded([], nothing(self._compiled.watched.size))
        try:
            captured = engine.record([Request(ids) for ids in prompts.values()])
        except EngineError:
            if not self._closed:
                self._engine = self._begin()
            raise
        finite = captured.finite()
        return Recorded([i for i, good in zip(prompts, finite, strict=True) if good], captured.select(finite))

    def close(self) -> None:
        """Ends the engine. One that still starts ends with this process."""
        self._closed = True
        if self.state == "ready":
            self._engine.result().close()

    def _ids(self, text: str) -> list[int] | None:
        try:
            ids = self._prompt.ids([text], self._compiled.tokenizer)[0]
        except ValueError:
            return None
        return ids if len(ids) <= self._job.max_prompt else None

    def _begin(self) -> Future[EngineProcess]:
        engine: Future[EngineProcess] = Future()
        threading.Thread(target=self._start, args=[engine], name="teacher", daemon=True).start()
        return engine

    def _start(self, engine: Future[EngineProcess]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for us, and we end the engine
        try:
            engine.set_result(EngineProcess(self.model, self._config, self._job))
            log.info("the teacher %s is ready", self.model)
        except Exception as error:
            log.error("%s", error)
            engine.set_exception(error)


Teacher = FallbackTeacher | ApiTeacher


def make_teacher(model: str, config: TeacherConfig, compiled: CompiledTask, folder: str | None = None) -> Teacher:
    """A teacher of the configured kind.

    Args:
        folder: for the answers of an API, see `ApiTeacher`.

    Raises:
        UserError: see `FallbackTeacher` and `ApiTeacher`.
    """
    is_api = config.engine == "openai"
    return ApiTeacher(model, config, compiled, folder) if is_api else FallbackTeacher(model, config, compiled)


class SharedTeachers:
    """Teachers as actors of Ray, for workers who ask them as they would ask a `Teacher`."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def answer(self, texts: list[str]) -> list[dict[str, Value] | None]:
        """See `FallbackTeacher` and `ApiTeacher`."""
        return ray.get(random.choice(self._actors).answer.remote(texts)) if texts else []

    def record(self, texts: list[str]) -> Recorded:
        """See `FallbackTeacher` and `ApiTeacher`."""
        found: Recorded = ray.get(random.choice(self._actors).record.remote(texts))
        return found


def start_teachers(
    model: str | None, config: TeacherConfig, compiled: CompiledTask, folder: str
) -> tuple[SharedTeachers | None, dict[str, float]]:
    """As many teachers on Ray as an extraction has, if a model is named, and what they take together, by Ray's names.

    Of an API there is one, whose calls share a budget.

    Raises:
        UserError: no such model, or one that writes other tokens than the student.
    """
    if model is None:
        return None, {}
    is_api = config.engine == "openai"
    place, count = (model, 1) if is_api else (absolute_model(model), config.actors)
    if not is_api:
        load_same_tokenizer(place, config, compiled)  # better refused now than by an actor
    environment = {"env_vars": {VARIABLE: code_version()}}
    actor = ray.remote(max_restarts=2, max_task_retries=2, runtime_env=environment, **ray_options(config.resources))(
        ApiTeacher if is_api else FallbackTeacher
    )
    given = (place, config, compiled, folder) if is_api else (place, config, compiled)
    actors = [actor.remote(*given) for _ in range(count)]
    return SharedTeachers(actors), {name: count * amount for name, amount in config.resources.items()}
