"""Made-up extractions of any size: comments, answers of the tiny task, and logits that are what a test says they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.base import storage
from pipeline.shards.codec import Codec
from pipeline.shards.files import write_shard
from pipeline.shards.manifest import Shards, open_shards, write_manifest
from pipeline.shards.payload import CODEC_FILE, Compact
from pipeline.task.compiled import CompiledTask
from pipeline.teacher.capture import TEMPERATURES, Captured


@dataclass(frozen=True)
class Said:
    """One example: a comment, which of the task's answers it has, and what the teacher thought at each step of it."""

    text: str
    answer: list[int]
    logits: np.ndarray  # float32 [T, W]
    lse: np.ndarray  # float32 [T, K]


def make_up(compiled: CompiledTask, texts: list[str], seed: int, scale: float = 3.0) -> list[Said]:
    """Any answers to these comments, nearly sure at each step."""
    rng, task = np.random.default_rng(seed), compiled.task
    answers = [[*ids, compiled.tokenizer.end_id] for ids in compiled.tokenizer.encode(list(map(task.render, task.answers())))]
    examples = []
    for text in texts:
        answer = answers[rng.integers(len(answers))]
        logits = (scale * rng.normal(size=(len(answer), compiled.watched.size))).astype(np.float32)
        logits[np.arange(len(answer)), np.searchsorted(compiled.automaton.tokens, answer)] += 8
        lse = [np.logaddexp.reduce(logits.astype(np.float64) / t, -1) + 0.1 / t for t in TEMPERATURES]
        examples.append(Said(text, answer, logits, np.stack(lse, -1).astype(np.float32)))
    return examples


def write_extraction(
    folder: Path, compiled: CompiledTask, units: list[list[Said]], choices_alone: bool = False, compact: bool = False
) -> Shards:
    """A finished extraction of these units; `compact` under a codec fitted to its own steps."""
    codec = _fitted(compiled, [said for unit in units for said in unit]) if compact else None
    compiled.save(str(folder))
    if codec:
        codec.codec.save(storage.join(str(folder), CODEC_FILE))
    about = {"hashes": compiled.hashes}
    for number, unit in enumerate(units):
        captured = _captured(compiled, unit, choices_alone)
        write_shard(str(folder), number, _comments(compiled, unit), captured, about | {"seconds": 1.0}, compact=codec)
    teacher = {"model": "made up", "revision": None, "dtype": "auto", "engine": "none", "parameters": None}
    facts = {"files": ["made up"], "task_name": "tiny", "teacher": teacher, "watched": compiled.watched.size}
    facts |= {"comments": {"source": {"answer": None}}}
    write_manifest(str(folder), len(units), about | facts)
    return open_shards(str(folder))


def _fitted(compiled: CompiledTask, examples: list[Said]) -> Compact:
    states = compiled.automaton.states_before([np.array(said.answer, np.int32) for said in examples])
    logprobs = np.concatenate([said.logits - said.lse[:, :1] for said in examples])
    return Compact(Codec.fit(logprobs, states, compiled.automaton.forced), compiled.automaton)


def _captured(compiled: CompiledTask, unit: list[Said], choices_alone: bool) -> Captured:
    longest = max((len(said.answer) for said in unit), default=1)
    shape = len(unit), longest
    tokens, kept = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logits, lse = np.zeros((*shape, compiled.watched.size), np.float32), np.zeros((*shape, len(TEMPERATURES)), np.float32)
    for row, said in enumerate(unit):
        steps = len(said.answer)
        tokens[row, :steps] = said.answer
        kept[row, :steps] = ~compiled.automaton.forced[compiled.automaton.walk(said.answer)[:-1]] if choices_alone else True
        logits[row, :steps], lse[row, :steps] = said.logits, said.lse
    lengths = np.array([len(said.answer) for said in unit], np.int32)
    return Captured(tokens, lengths, kept, logits * kept[..., None], lse * kept[..., None])


def _comments(compiled: CompiledTask, unit: list[Said]) -> pa.Table:
    rows = len(unit)
    return pa.table(
        {
            "file": pa.array([0] * rows, pa.int32()),
            "row": pa.array(range(rows), pa.int64()),
            "sample": pa.array([0] * rows, pa.int32()),
            "id": pa.array([str(i) for i in range(rows)], pa.string()),
            "text": pa.array([said.text for said in unit], pa.string()),
            "tokens": pa.array(compiled.tokenizer.encode([said.text for said in unit]), pa.list_(pa.int32())),
        }
    )
