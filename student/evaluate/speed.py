"""How long a student takes for one comment alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Examples, student_examples
from student.data.unpack import TRAIN
from student.decode.decode import Decoder
from student.model.model import Student
from student.train.loop import Training

ROUNDS, TIMED = 5, 30  # times that each comment is answered, and comments


def median_ms(answer: Callable[[int], object]) -> float:
    """Milliseconds that a call takes on one thread: the median over calls of the least of several times each.

    Whatever else the machine does only adds to a time, and far more to that of several threads, which wait for each other
    (docs/log.md).
    """
    times, threads = np.empty((ROUNDS, TIMED)), torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in np.ndindex(times.shape):
        started = time.perf_counter()
        answer(turn[1])
        times[turn] = time.perf_counter() - started
    torch.set_num_threads(threads)
    return 1000 * float(np.median(times.min(0)))


def latency_ms(model: Student, compiled: CompiledTask, examples: Examples) -> float:
    """Milliseconds for one comment, see `median_ms`."""
    decoder = Decoder(model, compiled)
    return median_ms(lambda i: decoder.constrained([examples.prefix(i % len(examples))]))


def latency_before_training(training: Training, shards_folder: str) -> float:
    """The same of a student that is not trained yet: how long an answer takes does not depend on the weights."""
    shards = open_shards(shards_folder)
    model = training.student().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return latency_ms(model, shards.compiled, student_examples(shards, TRAIN, model))
