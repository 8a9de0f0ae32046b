"""Real processes that decode: what one answerer answers, by several, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from pipeline.comments.reading import Comment, filter_rows, text_row
from pipeline.task.compiled import CompiledTask
from student.decode.answerer import WHOLE, Answerer
from student.model.checkpoint import save_student
from student.serve.pool import AnswererPool
from tests.student.decode.test_decode import make_student

SURE = 0.2  # which about half of these answers are


@pytest.fixture(scope="module")
def folder(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("student"))
    save_student(folder, make_student(compiled, scale=3.0), compiled)
    return folder


@pytest.fixture(scope="module")
def pool(folder: str, compiled: CompiledTask) -> Iterator[AnswererPool]:
    pool = AnswererPool(folder, compiled, "float32", {WHOLE: SURE}, processes=2, threads=1)
    yield pool
    pool.close()
    ended(children())


@pytest.fixture
def rows(compiled: CompiledTask) -> list[Comment]:
    texts = [f"comment {i} of many" for i in range(70)]
    return filter_rows([text_row(i, text) for i, text in enumerate(texts)], compiled.task.comments, compiled.tokenizer)


def children() -> list[psutil.Process]:
    """The decoding processes of this one."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_several_answer_what_one_answers(pool: AnswererPool, folder: str, compiled: CompiledTask, rows: list[Comment]):
    alone = Answerer.load(folder, thresholds={WHOLE: SURE}).answer(rows, value_probabilities=True)
    assert {answer.unsure for answer in alone} == {True, False}
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(lambda _: pool.answer(rows, value_probabilities=True), range(8)):
            assert [answer.values for answer in found] == [answer.values for answer in alone]
            assert [answer.confidence for answer in found] == pytest.approx([answer.confidence for answer in alone], abs=1e-5)
            assert [answer.unsure for answer in found] == [answer.unsure for answer in alone]


def test_one_that_is_killed_is_begun_anew_and_what_it_decoded_is_decoded_again(pool: AnswererPool, rows: list[Comment]):
    right = [answer.values for answer in pool.answer(rows)]
    before = children()
    assert len(before) == 2
    os.kill(before[0].pid, signal.SIGSTOP)  # what it is given stays with it until it dies
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(pool.answer, rows) for _ in range(2)]
        time.sleep(0.2)
        os.kill(before[0].pid, signal.SIGKILL)
        assert [[answer.values for answer in each.result(30)] for each in found] == [right, right]
    ended(before[:1])
    assert len(set(children()) - set(before)) == 1


def test_signals_are_left_to_the_service(pool: AnswererPool, rows: list[Comment]):
    before = children()
    for child in before:
        child.send_signal(signal.SIGTERM)
        child.send_signal(signal.SIGINT)
    assert len(pool.answer(rows)) == len(rows)
    assert children() == before
