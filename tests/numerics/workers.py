"""Trainings by one worker or several, and all that is compared of them. Apart from the tests: each worker imports it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import student.train.loop
import student.train.strategy
from pipeline.shards.manifest import Shards, open_shards
from student.config import StudentConfig, TrainConfig
from student.model.checkpoint import Tensors
from student.model.model import Student
from student.model.shape import Shape
from student.train.loop import Loop, Position, Training
from student.train.strategy import DataParallel, State

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
BF16 = ("ddp", "zero2")
STEPS, SAVED_AFTER = 4, 2
ODD = StudentConfig(layers=2, width=30, heads=3, mlp=61, sequence="full")  # neither numbers nor shares of them come out even
# An uneven batch whose positions weigh unlike, and steps that are clipped: means over the wrong things would show.
CONFIG = TrainConfig(epochs=1, batch_size=7, forced_weight=0.3, log_every=1, learning_rate=1e-4, weight_decay=0.1)
VOCABULARY, ROWS = 262_144, 50  # Gemma's ids, of which a corpus uses few


@dataclass
class Course:
    """What was measured in each step, and reached after some."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Traffic:
    """What DistributedDataParallel exchanges: bytes of gradients in each step, and all exchanges of the last one, by name.

    Before that it agrees on its buckets.
    """

    bytes: list[int]
    parameters: int
    exchanges: set[str]


Key = tuple[str, str, int, int]  # strategy, precision, workers, accumulation


@dataclass
class Results:
    """Of all trainings in a group of workers."""

    courses: dict[Key, Course] = field(default_factory=dict)
    resumed: dict[Key, Course] = field(default_factory=dict)
    traffic: Traffic | None = None


def course(
    training: Training, shards: Shards, rank: int = 0, workers: int = 1, start: State | None = None, steps: int = STEPS
) -> Course:
    """Trains to so many steps, from the first or from a state saved after `SAVED_AFTER`."""
    loop, reached = Loop(training, shards, rank, workers), Course()
    strategy, step = loop._strategy, loop._strategy.step

    def looked_at(rate: float) -> torch.Tensor:
        reached.gradients.append(strategy.gradients())
        return step(rate)

    strategy.step = looked_at  # type: ignore[method-assign]
    if start is not None:
        loop.go_on_from(start, Position(SAVED_AFTER))
    for report in loop.run():
        reached.losses.append(report.row["loss"])
        reached.norms.append(report.row["gradient_norm"])
        reached.states[report.step] = _copy(loop.state())
        if report.step == steps:
            return reached
    raise AssertionError("the epoch is too short")


def _copy(state: State) -> State:
    """Plain data parallelism hands out the weights themselves."""
    parts = (state.weights, state.first_moment, state.second_moment, state.average)
    return State(*({name: tensor.clone() for name, tensor in part.items()} for part in parts))


def changed(training: Training, **changes: object) -> Training:
    """The same with another configuration."""
    return Training(training.shape, training.rows, training.config.model_copy(update=changes))


@contextmanager
def group(rank: int, workers: int, rendezvous: Path) -> Iterator[None]:
    """A group of gloo workers; one that died fails the others within a minute."""
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers, timeout=patience)
    yield
    dist.destroy_process_group()


def work(rank: int, workers: int, folder: str, shards_folder: str, training: Training, start: State) -> None:
    """One worker of a group that trains under every strategy, one after another; the first writes what came out."""
    torch.set_num_threads(1)
    student.train.loop.GRADIENTS_EVERY = 1  # under no strategy does looking at them change anything
    shards, results = open_shards(shards_folder), Results()
    with group(rank, workers, Path(folder, f"rendezvous{workers}")):
        for strategy in STRATEGIES:
            for accumulation in (1, 2):
                one = changed(training, strategy=strategy, accumulation=accumulation)
                key = (strategy, "float32", workers, accumulation)
                results.courses[key] = course(one, shards, rank, workers)
            results.resumed[key] = course(one, shards, rank, workers, start)
            if workers > 1 and strategy in BF16:
                bf16 = changed(training, strategy=strategy, precision="bf16")
                results.courses[strategy, "bf16", workers, 1] = course(bf16, shards, rank, workers)
        if workers > 1:
            results.traffic = _traffic(rank)
    if rank == 0:
        torch.save(results, Path(folder, f"results{workers}"))


def start_workers(count: int, folder: Path, shards: Shards, training: Training, start: State) -> mp.ProcessContext:
    """Starts a group; `results_of` waits for it."""
    return mp.spawn(work, (count, str(folder), shards.folder, training, start), nprocs=count, join=False)


def results_of(context: mp.ProcessContext, folder: Path, count: int) -> Results:
    """What a group's trainings came to."""
    while not context.join():
        pass
    return torch.load(Path(folder, f"results{count}"), weights_only=False)


def train(rank: int, workers: int, folder: str, shards_folder: str, training: Training) -> None:
    """One worker of a whole training; the first writes the weights it ends with."""
    torch.set_num_threads(1)
    with group(rank, workers, Path(folder, "rendezvous")):
        loop = Loop(training, open_shards(shards_folder), rank, workers)
        for _ in loop.run():
            pass
        weights = loop.state().weights
    if rank == 0:
        torch.save(weights, Path(folder, "weights"))


def _traffic(rank: int) -> Traffic:
    """Some steps of a student of a large vocabulary, few of whose ids are used."""
    counted: list[int] = []
    add_up = student.train.strategy._add_up

    def counting(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return add_up(bucket)

    student.train.strategy._add_up = counting
    shape = Shape(VOCABULARY, ROWS, output_vocabulary=20, context=16, **ODD.sizes())
    rows = np.arange(VOCABULARY, dtype=np.int32) % ROWS
    strategy = DataParallel(Student(shape, rows), CONFIG)
    tokens = torch.arange(12).view(2, 6) + rank
    steps = []
    for _ in range(3):
        counted.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            strategy.backward(strategy.module(tokens).square().mean())
            strategy.step(1e-3)
        steps.append(sum(counted))
    student.train.strategy._add_up = add_up
    exchanges = {event.key.rpartition(":")[2] for event in profile.key_averages() if "gloo" in event.key}
    return Traffic(steps, sum(p.numel() for p in strategy.module.parameters()), exchanges)
