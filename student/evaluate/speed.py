"""How long a student takes for one comment alone."""

from __future__ import annotations

import time

import numpy as np
import torch

from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Examples, student_examples
from student.data.unpack import TRAIN
from student.decode.decode import Decoder
from student.model.model import Student
from student.train.loop import Training

WARM_UP, TIMED = 5, 30  # comments


def latency_ms(model: Student, compiled: CompiledTask, examples: Examples) -> float:
    """Milliseconds for one comment: the median over a few, after some that are not timed."""
    decoder, times = Decoder(model, compiled), []
    for i in range(WARM_UP + TIMED):
        prefix, started = examples.prefix(i % len(examples)), time.perf_counter()
        decoder.constrained([prefix])
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[WARM_UP:]))


def latency_before_training(training: Training, shards_folder: str) -> float:
    """The same of a student that is not trained yet: how long an answer takes does not depend on the weights."""
    shards = open_shards(shards_folder)
    model = training.student().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return latency_ms(model, shards.compiled, student_examples(shards, TRAIN, model))
