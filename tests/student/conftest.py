"""The debug student: one tiny compiled task, its shards with made-up logits, and a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.shards.files import write_shard
from pipeline.shards.manifest import Shards, open_shards, write_manifest
from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import CompiledTask
from pipeline.task.tokenization import TeacherTokenizer
from pipeline.task.vocabulary import WatchedSet
from pipeline.teacher.capture import Captured
from student.config import StudentConfig
from student.model.model import Student
from student.model.shape import Shape
from tests.tiny import tiny_task, tiny_tokenizer

DEBUG = StudentConfig(layers=2, width=32, heads=2, mlp=64, sequence="full")


@pytest.fixture(scope="session")
def compiled() -> CompiledTask:
    tokenizer = TeacherTokenizer(tiny_tokenizer())
    task = tiny_task()
    automaton = compile_automaton(task, tokenizer)
    others = np.setdiff1d(np.arange(tokenizer.size, dtype=np.int32), automaton.tokens)[:20]
    watched = WatchedSet(np.concatenate([automaton.tokens, others]), len(automaton.tokens))
    return CompiledTask(task, tokenizer, automaton, watched)


def made_up_shards(folder: Path, compiled: CompiledTask, rows: int, seed: int = 0) -> Shards:
    """Comments whose words decide the answer, and a teacher nearly sure of it."""
    rng = np.random.default_rng(seed)
    words = [("good", "bad", "fine"), ("LOUD", "quiet")]
    picks = [(rng.integers(3), rng.integers(2)) for _ in range(rows)]
    texts = [f"{words[0][a]} and {words[1][b]} {i}" for i, (a, b) in enumerate(picks)]
    moods, louds = compiled.task.fields.values()
    ids = compiled.tokenizer.encode([compiled.task.render((moods[a], louds[b])) for a, b in picks])
    answers = [[*row, compiled.tokenizer.end_id] for row in ids]
    lengths = np.array([len(answer) for answer in answers], np.int32)
    tokens = np.zeros((rows, lengths.max()), np.int32)
    logits = rng.normal(size=(*tokens.shape, compiled.watched.size)).astype(np.float32)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        columns = np.searchsorted(compiled.automaton.tokens, answer)
        logits[row, np.arange(len(answer)), columns] += 8
    lse = np.repeat(np.log(np.exp(logits).sum(-1, keepdims=True)), 3, axis=-1)
    comments = pa.table(
        {
            "file": pa.array([0] * rows, pa.int32()),
            "row": pa.array(range(rows), pa.int64()),
            "sample": pa.array([0] * rows, pa.int32()),
            "id": [str(i) for i in range(rows)],
            "text": texts,
            "tokens": pa.array(compiled.tokenizer.encode(texts), pa.list_(pa.int32())),
        }
    )
    about = {"hashes": compiled.hashes}
    kept = np.arange(tokens.shape[1]) < lengths[:, None]
    write_shard(str(folder), 0, comments, Captured(tokens, lengths, kept, logits, lse), about | {"seconds": 1.0})
    compiled.save(str(folder))
    teacher = {"model": "made up", "revision": None, "dtype": "auto", "engine": "none", "parameters": None}
    write_manifest(
        str(folder),
        1,
        about
        | {"files": ["made up"], "task_name": compiled.task.name, "teacher": teacher, "watched": compiled.watched.size}
        | {"comments": {"source": {"answer": None}}},
    )
    return open_shards(str(folder))


@pytest.fixture(scope="session")
def shards(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return made_up_shards(tmp_path_factory.mktemp("shards"), compiled, 200)


@pytest.fixture
def model(compiled: CompiledTask) -> Student:
    torch.manual_seed(0)
    ids, context = compiled.tokenizer.size, compiled.context
    shape = Shape(ids, ids, compiled.watched.size, context, **DEBUG.sizes())
    return Student(shape, np.arange(ids, dtype=np.int32)).eval()
