"""Services around a tiny student, and around a made-up one that does what a test wants."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest

from pipeline.comments.reading import Comment
from pipeline.task.compiled import CompiledTask
from student.config import ServeConfig
from student.decode.answerer import FAMILIARITY, WHOLE, Answer, Answerer
from student.serve.server import DrainingServer
from student.serve.service import Service
from tests.student.decode.test_decode import make_student

Serve = Callable[..., AbstractContextManager[httpx.Client]]


class FakeAnswerer:
    """Says "bad" to comments that begin so, else "good"; fails on "poison"; waits at its gate."""

    def __init__(self, compiled: CompiledTask, confidence: float = 0.9, familiarity: float | None = None) -> None:
        self.compiled, self._confidence, self._familiarity = compiled, confidence, familiarity
        self.thresholds: dict[str, float] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []

    def answer(self, rows: list[Comment], value_probabilities: bool = False) -> list[Answer]:
        self.batches.append([row.text for row in rows])
        self.gate.wait(20)
        if any(row.text == "poison" for row in rows):
            raise RuntimeError("the model broke")
        return [self._answer(row.text, value_probabilities) for row in rows]

    def _answer(self, text: str, value_probabilities: bool) -> Answer:
        bad = text.startswith("bad")
        each = {"mood": [0.0, 1.0, 0.0] if bad else [1.0, 0.0, 0.0], "loud": [1.0, 0.0]}
        values, unsure = {"mood": "bad" if bad else "good", "loud": True}, self._confidence < self.thresholds.get(WHOLE, 0)
        unsure |= (self._familiarity or 1) < self.thresholds.get(FAMILIARITY, 0)
        return Answer(values, self._confidence, each if value_probabilities else None, unsure, self._familiarity)


@pytest.fixture
def fake(compiled: CompiledTask) -> FakeAnswerer:
    return FakeAnswerer(compiled)


@pytest.fixture(scope="session")
def answerer(compiled: CompiledTask) -> Answerer:
    """A real one, of random weights, whose answers differ."""
    return Answerer(make_student(compiled, scale=3.0), compiled)


@contextmanager
def running(answerer: Any, beside: Any = None, fallback: float | None = None, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a real server, around a student or a whole service."""
    if fallback is not None:
        answerer.thresholds = {WHOLE: fallback}
    service = answerer if isinstance(answerer, Service) else Service(answerer, ServeConfig(**settings), beside)
    server, listener = DrainingServer(service), socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        service.close()


@pytest.fixture
def serve() -> Serve:
    return running


@pytest.fixture(scope="session")
def client(answerer: Answerer) -> Iterator[httpx.Client]:
    """Of one server around the real student."""
    with running(answerer, max_texts=50, max_bytes=20_000) as client:
        yield client
