"""Processes that decode beside one another for one service, so that its rate grows with the cores.

One process has the port, the teacher, audits and figures, of which there must be one. uvicorn's own workers would each
have these for themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from queue import SimpleQueue

import torch

from pipeline.base.signals import SIGNALS, end_with_parent
from pipeline.comments.reading import Comment
from pipeline.task.compiled import CompiledTask
from student.decode.answerer import Answer, Answerer

_answerer: Answerer  # of such a process


class AnswererPool:
    """An `Answerer` that as many threads as it has processes may use at a time.

    A process that dies is begun anew, and decodes once more what it died of: it may have been another's fault.

    Args:
        folder: of the student; `weights` and `thresholds` as for `Answerer.load`.
        processes: how many.
        threads: CPU threads of each.
    """

    def __init__(
        self, folder: str, compiled: CompiledTask, weights: str, thresholds: dict[str, float], processes: int, threads: int
    ) -> None:
        self.compiled, self.thresholds = compiled, thresholds
        self._begin = partial(_begin, folder, weights, thresholds, threads)
        pools = [self._begin() for _ in range(processes)]
        for pool in pools:
            pool.submit(os.getpid).result()
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for pool in pools:
            self._idle.put(pool)

    def answer(self, rows: list[Comment], value_probabilities: bool = False) -> list[Answer]:
        """See `Answerer.answer`.

        Raises:
            BrokenProcessPool: a process died of these rows twice.
        """
        pool = self._idle.get()
        try:
            return pool.submit(_answer, rows, value_probabilities).result()
        except BrokenProcessPool:
            pool = self._begin()
            return pool.submit(_answer, rows, value_probabilities).result()
        finally:
            self._idle.put(pool)

    def close(self) -> None:
        """Ends the processes, which nobody waits for."""
        while not self._idle.empty():
            self._idle.get().shutdown(wait=False)


def _begin(folder: str, weights: str, thresholds: dict[str, float], threads: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_load, initargs=(folder, weights, thresholds, threads))


def _load(folder: str, weights: str, thresholds: dict[str, float], threads: int) -> None:
    """What a process does first."""
    global _answerer
    for number in SIGNALS:  # they are for the service, which has answers to give before it ends
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)
    _answerer = Answerer.load(folder, weights, thresholds)


def _answer(rows: list[Comment], value_probabilities: bool) -> list[Answer]:
    return _answerer.answer(rows, value_probabilities=value_probabilities)
