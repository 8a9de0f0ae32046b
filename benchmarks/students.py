"""What the parts of `benchmarks.training` share: students in training, examples for them, and what a step takes."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.shards.manifest import open_shards
from pipeline.shards.payload import Stored
from student.config import StudentConfig, TrainConfig
from student.data.examples import Batch, Examples, open_examples
from student.data.unpack import TRAIN
from student.model.model import Student, embedding_rows
from student.model.shape import Shape
from student.train.loop import Training
from student.train.strategy import make_strategy
from student.train.trainer import Sums, Trainer

VOCABULARY, WATCHED, STEPS, CHOICES, CONTEXT = 262_144, 310, 36, 4, 100  # of synthetic examples
CORPUS_TOKENS = 7_000_000  # 500,000 comments of 14 tokens
SYNTHETIC = 2048


@dataclass(frozen=True)
class Data:
    """Examples, and what a student of them needs; `make` opens them as another kind of sequence.

    Attributes:
        make: the examples of a kind of sequence.
        shape: of the student.
        rows: the embedding's row of each id.
    """

    make: Callable[[str], Examples]
    shape: Shape
    rows: NDArray[np.int32]

    @cached_property
    def examples(self) -> Examples:
        """As the student reads them."""
        return self.make(self.shape.sequence)

    def of(self, sequence: str) -> Data:
        """The same in another kind of sequence."""
        return Data(self.make, replace(self.shape, sequence=sequence), self.rows)


def real_data(folder: str, student: StudentConfig, embeddings: str) -> Data:
    """The training split of an extraction."""
    shards = open_shards(folder)
    training = Training.of(student, TrainConfig(), shards)
    shape, rows = training.shape, training.rows
    if embeddings == "all":
        rows = np.arange(shape.input_vocabulary, dtype=np.int32)
    return Data(lambda sequence: open_examples(shards, TRAIN, sequence), replace(shape, embeddings=int(rows.max()) + 1), rows)


def synthetic_data(student: StudentConfig, embeddings: str) -> Data:
    """Examples of the thesis' sizes with made-up content: ids by Zipf's law, 3 to 25 of them, and answers of 36 steps."""
    random = np.random.default_rng(0)
    often_V = 1 / np.arange(1, VOCABULARY + 1)
    often_V = random.permutation(often_V / often_V.sum())
    answers = np.arange(STEPS, dtype=np.int32)
    rows = np.arange(VOCABULARY, dtype=np.int32)
    if embeddings == "corpus":
        rows = embedding_rows(random.multinomial(CORPUS_TOKENS, often_V), answers)
    columns = _synthetic_columns(random, often_V, answers)
    forced = np.arange(STEPS) % (STEPS // CHOICES) != 0
    compiled: Any = SimpleNamespace(automaton=SimpleNamespace(tokens=answers, forced=forced))
    stored, separator = Stored(columns["values"], columns["lse"], None), np.zeros(2, np.int32)
    shape = Shape(VOCABULARY, int(rows.max()) + 1, WATCHED, CONTEXT, **student.sizes())
    return Data(lambda sequence: Examples(columns, compiled, stored, sequence == "choices", separator), shape, rows)


def _synthetic_columns(random: np.random.Generator, often_V: NDArray[Any], answers: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The columns of `student.data.unpack`."""
    lengths, steps = random.integers(3, 26, SYNTHETIC), SYNTHETIC * STEPS
    logits = random.standard_normal((steps, WATCHED), np.float32)
    lse = np.log(np.exp(logits).sum(1, keepdims=True))
    starts = {"comment": lengths, "answer": STEPS, "kept": STEPS, "choice": CHOICES}
    columns = {f"{name}_starts": np.r_[0, np.cumsum(np.broadcast_to(n, SYNTHETIC))] for name, n in starts.items()}
    return columns | {
        "comment": random.choice(VOCABULARY, int(lengths.sum()), p=often_V).astype(np.int32),
        "answer": np.tile(answers, SYNTHETIC),
        "state": np.tile(np.arange(STEPS, dtype=np.int32), SYNTHETIC),
        "kept": np.ones(steps, bool),
        "values": (logits - lse).astype(np.float16),
        "lse": np.repeat(lse, 3, axis=1),
    }


class Contender:
    """A student that trains with the product's trainer.

    Args:
        data: of the student.
        config: of the training.
        device: where it trains.
        strategy: holds the student; by default the configured one.
    """

    def __init__(self, data: Data, config: TrainConfig, device: torch.device, strategy: Any = make_strategy) -> None:
        torch.manual_seed(config.seed)
        student = Student(data.shape, data.rows)
        self.counts = student.parameter_counts()
        self.strategy = strategy(student, config, device)
        self._data, self._device = data, device
        self._trainer = Trainer(self.strategy, config, data.shape, 1000, device)

    def batches(self, indices: NDArray[np.int64]) -> list[Batch]:
        """The passes of one optimizer step."""
        return [self._data.examples.batch(indices).to(self._device)]

    def step(self, indices: NDArray[np.int64], batches: list[Batch]) -> float:
        """One optimizer step on these examples; returns its seconds."""
        weight = self._data.examples.weight(indices, 1.0)
        return timed(lambda: self._trainer.step(batches, weight, Sums()), self._device)


def spread(batches: Iterator[NDArray[np.int64]], examples: Examples, count: int) -> list[NDArray[np.int64]]:
    """So many batches of an epoch's first, of lengths as the examples have them: from the quantiles of the batches' means."""
    pool = sorted(itertools.islice(batches, 64), key=lambda indices: float(examples.lengths[indices].mean()))
    return [pool[int((i + 0.5) / count * len(pool))] for i in np.random.default_rng(0).permutation(count)]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: the GPU's where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
