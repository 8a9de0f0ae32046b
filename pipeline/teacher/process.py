"""A teacher in a process of its own: what kills the engine leaves its actor alive to say so and to start another.

The parent keeps one end of a pipe, the child the other; each call is a method's name and arguments, each answer a result
or the reason why there is none.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
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
    """A teacher behind a pipe.

    Raises:
        UserError: the engine cannot start; the message holds its reason.
    """

    def __init__(self, model: str, config: TeacherConfig, job: Job) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "pipeline.teacher.process", str(theirs.fileno())]
        environment = os.environ | engine_environment(config)
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])  # noqa: S603 - our own
        theirs.close()
        try:
            self._call((model, config, job))
        except EngineError as failure:
            raise UserError(f"the teacher {model} cannot start: {failure}") from failure

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def record(self, requests: list[Request]) -> Captured:
        """See `pipeline.teacher.engines.TeacherEngine`.

        Raises:
            EngineError: the engine is gone.
        """
        return self._call(("record", requests))

    def census(self, prompts: list[list[int]]) -> CensusResult:
        """See `pipeline.teacher.engines.TeacherEngine`.

        Raises:
            EngineError: the engine is gone.
        """
        return self._call(("census", prompts))

    def close(self) -> None:
        """Ends the child."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _call(self, message: Any) -> Any:
        try:
            self._pipe.send(message)
            result = self._pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # the last: it died while it sent
            self.close()
            raise EngineError(f"the engine died ({cause(self._process.returncode)})") from None
        if isinstance(result, _Failed):
            self.close()
            raise EngineError(result.reason)
        return result


def serve(pipe: Connection) -> None:
    """The child: starts the engine and answers calls until the pipe closes or one fails."""
    end_with_parent()
    model, config, job = pipe.recv()
    try:
        teacher = open_teacher(model, config, job)
        pipe.send(None)
        while True:
            method, argument = pipe.recv()
            pipe.send(getattr(teacher, method)(argument))
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()  # the whole of it is for the worker's log
        pipe.send(_Failed(_reason(error)))


def _reason(error: BaseException) -> str:
    """One line, of the error that started it all."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}")[:500]


if __name__ == "__main__":
    from pipeline.teacher import process as engine  # by its name: what this process sends must not be pickled as of __main__

    engine.serve(Connection(int(sys.argv[1])))
