"""The Ray workers of `retort prune`: each holds the whole source, and measures batches of examples as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util import ActorPool

from pipeline.base import storage
from pipeline.base.capacity import ray_options
from pipeline.base.console import progress
from pipeline.base.runtime import MALLOC
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.shards.manifest import Shards, open_shards
from student.config import TrainConfig
from student.data.examples import open_examples
from student.data.unpack import TRAIN
from student.model.checkpoint import save_student
from student.model.shape import Shape
from student.prune.cut import Kept, choose, cut
from student.prune.importance import LEAVE_OUT, Importance, Sums, measure
from student.prune.sizes import Sizes
from student.prune.source import PruneSource

IMPORTANCE = "importance.safetensors"
BATCH_SIZE = 32  # examples of one forward pass


def start_workers(train: TrainConfig, shards_folder: str, source: PruneSource) -> list[Any]:
    """As many as a training has, with what one of its workers has; they end when nobody holds the list."""
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(train.threads_per_worker)}
    options = ray_options(train.resources) | {"runtime_env": {"env_vars": environment}}
    actor = ray.remote(max_restarts=2, max_task_retries=2, **options)(ImportanceWorker)
    return [actor.remote(shards_folder, source) for _ in range(train.most_workers)]


def measure_all(workers: list[Any], examples: int, shards: Shards, shape: Shape) -> list[Sums]:
    """The sums of each batch, in order, so that they always add up to the same."""
    count = len(open_examples(shards, TRAIN, shape.sequence, shape.separator))
    batches, parts = _batches(np.unique(np.linspace(0, count - 1, examples).astype(np.int64))), []
    with progress("measuring", sum(len(batch) for batch, _ in batches)) as (bar, task):
        done = ActorPool(workers).map(lambda worker, batch: worker.measure.remote(*batch), batches)
        for sums, (batch, _) in zip(done, batches, strict=True):
            parts.append(sums)
            bar.advance(task, len(batch))
    return parts


def _batches(chosen: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], bool]]:
    """Examples of each pass, and whether to leave each layer out for them: for a few that are spread over all."""
    some = np.zeros(len(chosen), bool)
    some[:: -(-len(chosen) // LEAVE_OUT)] = True
    return [
        (part[start : start + BATCH_SIZE], left)
        for part, left in ((chosen[some], True), (chosen[~some], False))
        for start in range(0, len(part), BATCH_SIZE)
    ]


class ImportanceWorker:
    """An actor that holds the whole source."""

    def __init__(self, shards_folder: str, source: PruneSource) -> None:
        check_code_version()
        shards, shape = open_shards(shards_folder), source.shape
        self._compiled = shards.compiled
        self._examples = open_examples(shards, TRAIN, shape.sequence, shape.separator)
        self._model = source.load(self._compiled.watched.tokens).to("cuda" if torch.cuda.is_available() else "cpu")

    def measure(self, batch: NDArray[np.int64], leave_out: bool) -> Sums:
        """The sums of a batch of examples."""
        return measure(self._model, self._examples, batch, len(batch) * leave_out, len(batch))

    def cut(self, sizes: Sizes, scores: Importance, folder: str) -> Kept:
        """Writes the student and what was measured; returns which units it kept."""
        kept = choose(scores, self._model.shape, sizes)
        save_student(folder, cut(self._model, kept), self._compiled)
        scores.save(storage.join(folder, IMPORTANCE))
        return kept
