"""A teacher in a process of its own: what kills the engine leaves its actor alive to say so and to start another.

The parent keeps one end of a pipe, the child the other; each call is a number, a method's name and arguments, each answer the
number and a result or the reason why there is none.
"""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from pipeline.base.errors import UserError
from pipeline.base.signals import cause, end_with_parent
from pipeline.config import TeacherConfig
from pipeline.teacher.capture import Captured, CensusResult
from pipeline.teacher.engines import Job, Request, engine_environment, open_teacher


class EngineError(RuntimeError):
    """A call did not come back: the engine died of it, or raised. Either way that engine is gone."""


@dataclass(frozen=True)
class _Failed:
    """What the child sends instead of a result."""

    reason: str


class EngineProcess:
    """A teacher behind a pipe. One that is killed while it starts is started once more.

    Raises:
        UserError: the engine cannot start; the message holds its reason.
    """

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        self._lock, self._numbers = threading.Lock(), itertools.count()
        for again in (True, False):
            self._spawn(os.environ | engine_environment(config))
            try:
                self._call("start", model, config, job)
                return
            except EngineError as failure:
                if not again or self._process.returncode >= 0:
                    raise UserError(f"the teacher {model} cannot start: {failure}") from failure

    def _spawn(self, environment: dict[str, str]) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "pipeline.teacher.process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])  # noqa: S603 - our own
        theirs.close()
        self._over, self._calls = "", dict[int, Future[Any]]()
        threading.Thread(target=self._receive, daemon=True).start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def record(self, requests: list[Request]) -> Captured:
        """See `pipeline.teacher.engines.TeacherEngine`. Several threads may call it at a time.

        Raises:
            EngineError: the engine is gone.
        """
        return self._call("record", requests)

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `pipeline.teacher.engines.TeacherEngine`.

        Raises:
            EngineError: the engine is gone.
        """
        return self._call("census", prompts)

    def close(self) -> None:
        """Ends the child."""
        self._process.kill()
        self._process.wait()

    def _call(self, method: str, *arguments: Any) -> Any:
        call: Future[Any] = Future()
        with self._lock:
            if self._over:
                raise EngineError(self._over)
            number = next(self._numbers)
            self._calls[number] = call
            with suppress(OSError):  # it has died: `_receive` hears of it too
                self._pipe.send((number, method, arguments))
        return call.result()

    def _receive(self) -> None:
        """Hands out results until the child is gone."""
        reason = ""
        try:
            while True:
                number, result = self._pipe.recv()
                if isinstance(result, _Failed):
                    reason = result.reason
                    break
                self._calls.pop(number).set_result(result)
        except (EOFError, OSError, pickle.UnpicklingError):  # the last: it died while it sent
            pass
        self.close()
        self._pipe.close()
        with self._lock:
            self._over = reason or f"the engine died ({cause(self._process.returncode)})"
        for call in self._calls.values():
            call.set_exception(EngineError(self._over))


def serve(pipe: Connection) -> None:
    """The child: its main thread has the engine; each call has a thread, until the pipe closes or one fails."""
    end_with_parent()
    sending = threading.Lock()

    def reply(number: int, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = call(*arguments)
        except Exception as error:
            traceback.print_exc()  # the whole of it is for the worker's log
            with sending:
                pipe.send((number, _Failed(_reason(error))))
                os._exit(1)
        with sending:
            pipe.send((number, None if call is open_teacher else result))
        return result

    def receive() -> None:
        with suppress(EOFError):
            while True:
                number, method, arguments = pipe.recv()
                threading.Thread(target=reply, args=[number, getattr(teacher, method), *arguments], daemon=True).start()
        os._exit(0)

    number, _, arguments = pipe.recv()
    teacher = reply(number, open_teacher, *arguments)
    receiving = threading.Thread(target=receive)
    receiving.start()
    teacher.run()
    receiving.join()


def _reason(error: BaseException) -> str:
    """One line, of the error that started it all."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}")[:500]


if __name__ == "__main__":
    from pipeline.teacher import process as engine  # by its name: what this process sends must not be pickled as of __main__

    engine.serve(Connection(int(sys.argv[1])))
