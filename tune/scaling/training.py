"""How fast a training goes with so many workers: a short Ray Train job of the product's own trainer, batches and strategy."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.runtime import MALLOC
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.shards.manifest import open_shards
from student.config import TrainConfig
from student.data.examples import Examples, open_examples
from student.data.unpack import TRAIN
from student.model.model import Student
from student.train.loop import Training
from student.train.order import Order, parts
from student.train.strategy import Strategy, make_strategy
from student.train.trainer import Sums, Trainer, global_sum
from tune.scaling.model import BUCKET
from tune.scaling.rows import TrainRow

WARM_UP = 2  # steps of each kind that are not timed: the first ones allocate
PINGS = 20
POOL = 1024  # batches that the timed ones are drawn from: of few, the mean length would differ from size to size


@dataclass(frozen=True)
class Job:
    """One measurement. It travels to the workers."""

    training: Training
    shards: str
    shares: tuple[int, ...]  # examples of each worker in a step, one measurement each
    steps: int  # timed of each
    file: str  # where the first worker leaves the rows


def measure_training(training: Training, shards: str, workers: int, steps: int, folder: str) -> list[TrainRow]:
    """Times training steps with so many workers: with the configured batch for each worker, and with it shared out among them.

    One worker alone is timed on half a batch too: two sizes tell what a step costs from what an example does.

    Args:
        folder: for the job's own files; all nodes must see it.
    """
    batch = training.config.step_examples
    shares = tuple(sorted({batch, max(1, batch // max(workers, 2))}))
    job = Job(training, shards, shares, steps, storage.join(folder, f"train-{workers}.json"))
    trainer = _ray_trainer(job, workers, folder)
    began = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - began
    found = storage.read_json(job.file)
    return [TrainRow(workers=workers, startup=seconds - found["seconds"], **row) for row in found["rows"]]


def _ray_trainer(job: Job, workers: int, folder: str) -> ray.train.torch.TorchTrainer:
    """As `student.train.train` has it, without checkpoints and second tries."""
    config = job.training.config
    environment = {"env_vars": MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(config.threads_per_worker)}}
    scaling = ray.train.ScalingConfig(
        num_workers=workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=config.resources
    )
    name = f"train-{workers}-{time.time_ns()}"
    run = ray.train.RunConfig(name=name, storage_path=folder, worker_runtime_env=environment)
    return ray.train.torch.TorchTrainer(work, train_loop_config={"job": job}, scaling_config=scaling, run_config=run)


def work(settings: dict[str, Any]) -> None:
    """Runs in every worker; the first one leaves the rows."""
    check_code_version()
    job, context = settings["job"], ray.train.get_context()
    bench = Bench(job, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    nodes = global_sum(torch.tensor(float(context.get_local_rank() == 0), device=bench.device))
    began = time.perf_counter()
    rows = [bench.row(share) | {"nodes": int(nodes)} for share in job.shares]
    if context.get_world_rank() == 0:
        storage.write_json(job.file, {"seconds": time.perf_counter() - began, "rows": rows})


class Bench:
    """One worker of a measurement."""

    def __init__(self, job: Job, rank: int, workers: int, device: torch.device) -> None:
        self.device, self._rank, self._workers, self._steps = device, rank, workers, job.steps
        self._config, training = job.training.config, job.training
        self._examples = open_examples(open_shards(job.shards), TRAIN, training.shape.sequence, training.shape.separator)
        torch.manual_seed(self._config.seed)
        student = Student(training.shape, training.rows)
        self._size = sum(parameter.numel() for parameter in student.parameters())
        strategy = make_strategy(student, self._config, device)
        self._together = Trainer(strategy, self._config, training.shape, 1000, device)
        self._alone = Trainer(_Alone(strategy), self._config, training.shape, 1000, device)

    def row(self, share: int) -> dict[str, Any]:
        """The samples of `TrainRow`."""
        step, alone = [], []
        for indices in _batches(self._examples, self._config, share * self._workers, self._steps + WARM_UP):
            mine = parts(indices, self._rank, self._workers, self._config.accumulation)
            batches = [self._examples.batch(part).to(self.device) for part in mine]
            weight = self._examples.weight(indices, self._config.forced_weight)
            step.append(self._time(self._together.step, batches, weight, Sums()))
            if self._workers > 1:
                took = self._time(self._alone.step, batches, weight, Sums())
                alone.append(float(global_sum(torch.tensor(took, device=self.device, dtype=torch.float64))) / self._workers)
        samples = {"step": step[WARM_UP:], "alone": (alone or step)[WARM_UP:]}
        samples |= {"exchange": self._reductions(self._size, self._steps), "ping": self._reductions(1, PINGS)}
        return samples | {"share": share, "bytes": 4 * self._size}

    def _reductions(self, numbers: int, count: int) -> list[float]:
        """Seconds of all-reduces of so many float32, in buckets as the strategy exchanges them."""
        if self._workers == 1:
            return []
        values = torch.split(torch.zeros(numbers, device=self.device), BUCKET // 4)

        def reduce() -> None:
            for work in [dist.all_reduce(bucket, async_op=True) for bucket in values]:
                work.wait()

        return [self._time(reduce) for _ in range(count + WARM_UP)][WARM_UP:]

    def _time(self, call: Callable[..., Any], *arguments: Any) -> float:
        """Seconds of a call that all workers begin together."""
        if self._workers > 1:
            global_sum(torch.zeros(1, device=self.device))
        self._wait()
        start = time.perf_counter()
        call(*arguments)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Alone:
    """A strategy whose workers keep their gradients to themselves. They drift apart, which costs no time."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Never exchanges."""
        return self._strategy.part(last=False)


def _batches(examples: Examples, config: TrainConfig, size: int, count: int) -> list[NDArray[np.int64]]:
    """So many global batches, of lengths as the examples have them: the same spread for every size."""
    order = Order(examples.lengths, config.model_copy(update={"batch_size": size, "workers": 1}))
    pool = sorted(islice(order.epoch(1), POOL), key=lambda indices: float(examples.lengths[indices].mean()))
    places = np.random.default_rng(0).permutation(count)
    return [pool[int((place + 0.5) / count * len(pool))] for place in places]
