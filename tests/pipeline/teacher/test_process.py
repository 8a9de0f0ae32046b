"""The engine's process, on the plain engine and a tiny teacher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.base.errors import UserError
from pipeline.config import TeacherConfig
from pipeline.task.compilation import compile_automaton
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.teacher.engines import Job, Request
from pipeline.teacher.process import EngineError, EngineProcess
from tests.tiny import ROOT, save_teacher, tiny_task, tiny_tokenizer

CONFIG = TeacherConfig(engine="transformers", dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def job() -> Job:
    tokenizer = TeacherTokenizer(tiny_tokenizer())
    automaton = compile_automaton(tiny_task(), tokenizer)
    return Job(automaton, tokenizer.end_id, 60, automaton.tokens)


@pytest.fixture
def engine(model: str, job: Job) -> Iterator[EngineProcess]:
    engine = EngineProcess(model, CONFIG, job)
    yield engine
    engine.close()


def test_it_answers_until_it_is_killed_and_says_so(engine: EngineProcess) -> None:
    captured = engine.record([Request([5, 6, 7]), Request([5, 6])])
    assert captured.lengths.min() > 3
    assert captured.finite().all()
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"the engine died \(SIGKILL, as when memory runs out\)"):
        engine.record([Request([5])])


def test_several_calls_at_a_time_get_their_own_answers_or_all_hear_of_the_end(engine: EngineProcess) -> None:
    prompts = [[Request([5 + i] * (1 + j)) for j in range(3)] for i in range(6)]
    alone = [engine.record(requests) for requests in prompts]
    with ThreadPoolExecutor(6) as threads:
        for one, other in zip(alone, threads.map(engine.record, prompts), strict=True):
            np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
        os.kill(engine.pid, signal.SIGSTOP)
        calls = [threads.submit(engine.record, requests) for requests in prompts]
        while len(engine._calls) < 6:
            time.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(EngineError, match="SIGKILL"):
                call.result(20)


@pytest.mark.parametrize("kills", [1, 2])
def test_one_killed_while_it_starts_is_started_once_more(
    model: str, job: Job, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    spawn, spawned = EngineProcess._spawn, list[int]()

    def spawn_and_kill(engine: EngineProcess, environment: dict[str, str]) -> None:
        spawn(engine, environment)
        spawned.append(engine.pid)
        if len(spawned) <= kills:
            os.kill(engine.pid, signal.SIGKILL)

    monkeypatch.setattr(EngineProcess, "_spawn", spawn_and_kill)
    if kills == 2:
        with pytest.raises(UserError, match=r"cannot start: the engine died \(SIGKILL, as when memory runs out\)"):
            EngineProcess(model, CONFIG, job)
    else:
        engine = EngineProcess(model, CONFIG, job)
        assert engine.record([Request([5])]).finite().all()
        engine.close()
    assert len(spawned) == 2


def test_an_exception_ends_it_with_its_reason(engine: EngineProcess) -> None:
    with pytest.raises(EngineError, match=r"IndexError: index out of range"):
        engine.record([Request([10**6])])
    assert not psutil.pid_exists(engine.pid)


def test_logits_that_are_not_numbers_come_back_as_they_are(tmp_path: Path, job: Job) -> None:
    """They are set aside by row, not raised."""
    from transformers import AutoModelForCausalLM

    save_teacher(tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.get_input_embeddings().weight.data[9] = np.nan  # tied to the head: one token's logits, and prompts that hold it
    model.save_pretrained(tmp_path)
    engine = EngineProcess(str(tmp_path), CONFIG, job)
    captured = engine.record([Request([5, 9, 7]), Request([5, 6])])
    engine.close()
    assert not captured.finite()[0]


def test_a_teacher_that_cannot_start_fails_at_once_with_its_reason(tmp_path: Path, job: Job) -> None:
    started = time.monotonic()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the teacher .* cannot start: ValueError: "):
        EngineProcess(str(tmp_path), CONFIG, job)
    assert time.monotonic() - started < 60


def test_it_does_not_outlive_its_parent(model: str, tmp_path: Path) -> None:
    script = f"""
import sys, time
from pipeline.config import TeacherConfig
from pipeline.teacher.process import EngineProcess
from tests.pipeline.teacher.test_process import CONFIG
from pipeline.teacher.engines import Job
import pipeline.task.compilation, tests.tiny, pipeline.task.tokenization
tokenizer = pipeline.task.tokenization.TeacherTokenizer(tests.tiny.tiny_tokenizer())
automaton = pipeline.task.compilation.compile_automaton(tests.tiny.tiny_task(), tokenizer)
engine = EngineProcess({model!r}, CONFIG, Job(automaton, tokenizer.end_id, 60, automaton.tokens))
print(engine.pid, flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, cwd=tmp_path)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10)
