"""The Ray workers of `retort prune`: each holds the whole source, and measures batches of examples as they come."""

from __future__ import annotations

import os
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
from student.config import PruneConfig
from student.data.examples import open_examples
from student.data.unpack import TRAIN
from student.model.checkpoint import save_student
from student.model.shape import Shape
from student.prune.cut import Kept, choose, cut
from student.prune.importance import LEAVE_OUT, Importance, Sums, measure
from student.prune.sizes import Sizes
from student.prune.source import Source

IMPORTANCE = "importance.safetensors"


def start_workers(config: PruneConfig, shards_folder: str, source: Source) -> list[Any]:
    """The configured number of them; they end when nobody holds the list."""
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(threads)}
    options = ray_options(config.resources) | {"runtime_env": {"env_vars": environment}}
    actor = ray.remote(max_restarts=2, max_task_retries=2, **options)(Worker)
    return [actor.remote(config, shards_folder, source) for _ in range(config.workers)]


def measure_all(workers: list[Any], config: PruneConfig, shards: Shards, shape: Shape) -> list[Sums]:
    """The sums of each batch, in order, so that they always add up to the same."""
    count = len(open_examples(shards, TRAIN, shape.sequence, shape.separator))
    batches, parts = _batches(np.unique(np.linspace(0, count - 1, config.examples).astype(np.int64)), config.batch_size), []
    with progress("measuring", sum(len(batch) for batch, _ in batches)) as (bar, task):
        done = ActorPool(workers).map(lambda worker, batch: worker.measure.remote(*batch), batches)
        for sums, (batch, _) in zip(done, batches, strict=True):
            parts.append(sums)
            bar.advance(task, len(batch))
    return parts


def _batches(chosen: NDArray[np.int64], size: int) -> list[tuple[NDArray[np.int64], bool]]:
    """Examples of each pass, and whether to leave each layer out for them: for a few that are spread over all."""
    some = np.zeros(len(chosen), bool)
    some[:: -(-len(chosen) // LEAVE_OUT)] = True
    return [(part, left) for left in (True, False) for part in _cut_up(chosen[some == left], size)]


def _cut_up(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class Worker:
    """An actor that holds the whole source."""

    def __init__(self, config: PruneConfig, shards_folder: str, source: Source) -> None:
        check_code_version()
        self._config, shards, shape = config, open_shards(shards_folder), source.shape
        self._compiled = shards.compiled
        self._examples = open_examples(shards, TRAIN, shape.sequence, shape.separator)
        self._model = source.load(self._compiled.watched.tokens).to("cuda" if torch.cuda.is_available() else "cpu")

    def measure(self, batch: NDArray[np.int64], leave_out: bool) -> Sums:
        """The sums of a batch of examples."""
        over = {"over_sequence": self._config.over_sequence, "over_batch": self._config.over_batch}
        return measure(self._model, self._examples, batch, len(batch) * leave_out, len(batch), **over)

    def cut(self, sizes: Sizes, scores: Importance, folder: str) -> Kept:
        """Writes the student and what was measured; returns which units it kept."""
        config = self._config
        ranks = scores.shuffled(config.seed) if config.rank == "random" else scores
        kept = choose(ranks, self._model.shape, sizes, config.rank_layers)
        save_student(folder, cut(self._model, kept, scores), self._compiled)
        scores.save(storage.join(folder, IMPORTANCE))
        return kept
