"""SIGINT and SIGTERM ask a stage to finish what is in flight; a second one ends it at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from pipeline.base.errors import UserError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 130  # the exit code of a command that a signal has ended early, as shells know it


def cause(code: int) -> str:
    """What a process ended of, by its return code."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return name + (", as when memory runs out" if name == "SIGKILL" else "")


def end_with_parent(every: float = 0.5) -> None:
    """Ends this process soon after its parent is gone, in the middle of a call too: its memory and its GPU are wanted back."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stopped(UserError):  # noqa: N818 - no error, though it ends a stage as one does
    """A stage ended early because it was asked to. The same command goes on from there."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}. Run the same command again to go on")


class StopRequest:
    """Whether a signal has asked to stop, while the block lasts. Only the main thread of a process can ask."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._asked = threading.Event()

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()
        log.info("%s: %s; once more to end at once", signal.Signals(number).name, self._doing)
