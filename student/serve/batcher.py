"""Dynamic batching: threads work on whatever waits, and each caller gets the answers to what it asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

LONGEST_RETRY = 60  # seconds that a caller is told to wait at most
MEMORY = 0.8  # weight of what was known of the pace when another batch is done


class Overloaded(RuntimeError):  # noqa: N818 - a state of the service, as are those below
    """More would wait than may.

    Attributes:
        retry_after: whole seconds until what waits now is likely done.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too much waits already; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(RuntimeError):  # noqa: N818
    """Nothing more is taken on."""


class Failed(RuntimeError):  # noqa: N818
    """The batch that held the caller's items failed."""


@dataclass(eq=False)
class _Call(Generic[Item, Answer]):
    """What one caller asked. It may be answered over several batches, whose answers come in any order."""

    items: list[Item]
    future: asyncio.Future[list[Answer]]
    taken: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)  # by the item's place

    @property
    def left(self) -> int:
        return len(self.items) - self.taken

    def take(self, most: int) -> range:
        places = range(self.taken, min(self.taken + most, len(self.items)))
        self.taken = places.stop
        return places

    def settle(self, error: Exception | None = None) -> None:
        """Wakes the caller, from the worker's thread."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody is left to wake
            self.future.get_loop().call_soon_threadsafe(self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():  # the caller has gone
            return
        if error:
            self.future.set_exception(error)
        else:
            self.future.set_result([self.answers[place] for place in range(len(self.items))])


class Batcher(Generic[Item, Answer]):
    """Works on items of many callers in threads of its own.

    Args:
        batch: most items of one batch. Nothing is waited for: fewer make a smaller batch.
        observe: is told the size and the seconds of each batch.
        threads: batches that are worked on at a time.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Answer]],
        batch: int,
        queue: int,
        observe: Callable[[int, float], Any],
        threads: int = 1,
    ) -> None:
        self._work, self._batch, self._queue, self._observe = work, batch, queue, observe
        self._condition = threading.Condition()
        self._calls: deque[_Call[Item, Answer]] = deque()
        self._waiting, self._idle, self._pace, self._closed = 0, 0, 0.0, False
        self._threads = [threading.Thread(target=self._run, name="batcher", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return self._waiting

    async def answer(self, items: list[Item]) -> list[Answer]:
        """The answers to items, in their order. When the caller is cancelled, those that still wait are forgotten.

        Raises:
            Overloaded: too many wait.
            Closed: `close` was called.
            Failed: a batch with some of them did.
        """
        if not items:
            return []
        call: _Call[Item, Answer] = _Call(items, asyncio.get_running_loop().create_future())
        self._enqueue(call)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._forget(call)
            raise

    def close(self) -> None:
        """Takes on no more, and returns when all that waits is answered."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, call: _Call[Item, Answer]) -> None:
        with self._condition:
            if self._closed:
                raise Closed("the service is stopping")
            if self._waiting + call.left > self._queue:
                raise Overloaded(min(max(1, math.ceil(self._waiting * self._pace / len(self._threads))), LONGEST_RETRY))
            self._calls.append(call)
            self._waiting += call.left
            self._condition.notify()

    def _forget(self, call: _Call[Item, Answer]) -> None:
        with self._condition:
            if call in self._calls:
                self._calls.remove(call)
                self._waiting -= call.left

    def _run(self) -> None:
        while parts := self._take():
            self._answer(parts)

    def _take(self) -> list[tuple[_Call[Item, Answer], range]]:
        """The next batch, by caller and places; empty when closed."""
        parts = []
        with self._condition:
            self._idle += 1
            self._condition.wait_for(lambda: self._calls or self._closed)
            room = min(self._batch, math.ceil(self._waiting / self._idle))  # the other idle threads take their part
            self._idle -= 1
            while room and self._calls:
                call = self._calls.popleft()
                places = call.take(room)
                parts.append((call, places))
                room -= len(places)
                self._waiting -= len(places)
                if call.left:  # behind the others, so that a long request does not hold up the short ones
                    self._calls.append(call)
            if self._calls:
                self._condition.notify()
        return parts

    def _answer(self, parts: list[tuple[_Call[Item, Answer], range]]) -> None:
        items = [call.items[place] for call, places in parts for place in places]
        start = time.perf_counter()
        try:
            answers = self._work(items)
            if len(answers) != len(items):
                raise AssertionError(f"{len(answers)} answers to {len(items)} items")
        except Exception as error:
            log.exception("a batch of %d failed", len(items))
            self._fail([call for call, _ in parts], error)
            return
        self._measure(len(items), time.perf_counter() - start)
        rest = iter(answers)
        for call, places in parts:
            call.answers.update(zip(places, rest, strict=False))
            if len(call.answers) == len(call.items):
                call.settle()

    def _fail(self, calls: list[_Call[Item, Answer]], error: Exception) -> None:
        for call in calls:
            self._forget(call)
            failed = Failed(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            call.settle(failed)

    def _measure(self, count: int, seconds: float) -> None:
        pace = seconds / count
        self._pace = MEMORY * self._pace + (1 - MEMORY) * pace if self._pace else pace
        self._observe(count, seconds)
