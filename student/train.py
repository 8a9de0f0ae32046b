"""`retort train`: logit shards to a student, by Ray Train with DistributedDataParallel."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Empty, Queue

from cluster.runtime import MALLOC, start_ray
from cluster.version import VARIABLE, check_code_version, code_version
from pipeline import storage
from pipeline.compiled import CompiledTask
from pipeline.config import RunConfig, student_shape
from pipeline.console import progress
from pipeline.errors import UserError
from pipeline.manifest import Shards, open_shards
from student.checkpoint import load_student, save_student
from student.config import TrainConfig
from student.data import TRAIN, VALIDATION, Batch, Examples, Order, load_answers, load_examples
from student.decode import Decoder
from student.model import Shape, Student
from student.trainer import Sums, Trainer
from tune.tracking import Tracking, tracking_uri

log = logging.getLogger(__name__)

SCORE = "validation_ce"  # picks the best epoch: of all measures the one whose meaning no schedule changes
SEND_EVERY = 0.5  # seconds between two parcels of step metrics


@dataclass(frozen=True)
class Training:
    """What every worker needs."""

    shards: str
    shape: Shape
    config: TrainConfig


def train(config: RunConfig, shards_folder: str, student_folder: str) -> dict[str, Any]:
    """Trains the configured student and writes the best epoch's to `student_folder`; returns what train.json holds.

    A folder that already holds this very training is left as it is.

    Raises:
        UserError: the shards are unusable, or the folder holds another training.
    """
    shards = open_shards(shards_folder)
    shape = shape_of(config, shards.compiled)
    identity = _identity(shape, config.train, shards)
    done = _finished(student_folder, identity)
    if done:
        log.info("%s already holds this training", student_folder)
        return done
    training = Training(shards_folder, shape, config.train)
    examples = len(load_answers(shards, TRAIN)[0])
    steps = Order(examples, config.train.batch_size, config.train.seed, 0, config.train.workers).steps
    with torch.device("meta"):
        counts = Student(training.shape).parameter_counts()
    log.info(
        "training %.1f M parameters + %.1f M embedding on %s examples, %s steps an epoch",
        *(counts["rest"] / 1e6, counts["embedding"] / 1e6),
        *(f"{examples:,}", steps),
    )
    start_ray()
    tracking = _start_tracking(config, identity)
    try:
        result = _fit(training, steps * config.train.epochs, tracking, student_folder)
    except BaseException:
        tracking.end(failed=True)
        raise
    return _keep_best(result, student_folder, identity, tracking)


def shape_of(config: RunConfig, compiled: CompiledTask) -> Shape:
    """The student's shape under a compiled task.

    Raises:
        UserError: what the run changes of the task's shape leaves none.
    """
    shape = student_shape(compiled.task, config.student)
    return Shape.of(shape, compiled.tokenizer.size, compiled.watched.size, compiled.task.context)


def _identity(shape: Shape, config: TrainConfig, shards: Shards) -> dict[str, Any]:
    """What makes a training this one and no other."""
    made_of = {key: shards.manifest[key] for key in ("task_name", "hashes", "teacher", "rows", "steps")}
    return {"student": shape.as_dict(), "train": config.model_dump(mode="json"), "shards": made_of}


def _finished(folder: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    path = storage.join(folder, "train.json")
    if not storage.exists(path):
        return None
    found: dict[str, Any] = storage.read_json(path)
    differ = [name for name in identity if found.get(name) != identity[name]]
    if differ:
        raise UserError(f"{folder} holds another training (its {', '.join(differ)} differ): choose another --out, or delete it")
    return found


def _start_tracking(config: RunConfig, identity: dict[str, Any]) -> Tracking:
    uri = tracking_uri(config.tracking.uri, config.out or ".")
    name = f"{identity['shards']['task_name']}-{identity['student']['layers']}x{identity['student']['width']}"
    return Tracking.start(uri, config.tracking.experiment, name, identity)


def _fit(training: Training, steps: int, tracking: Tracking, folder: str) -> ray.train.Result:
    """Runs the Ray Train job while the driver shows and logs what the workers send."""
    config = training.config
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(threads)}
    channel = Queue(actor_options={"num_cpus": 0})
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"training": training, "channel": channel},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{int(time.time())}",
            storage_path=storage.join(folder, "ray"),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SCORE, checkpoint_score_order="min"
            ),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    with _follow(channel, tracking, steps):
        return trainer.fit()


@contextmanager
def _follow(channel: Queue, tracking: Tracking, steps: int) -> Iterator[None]:
    """Shows and logs the workers' metrics from a thread of its own until the block ends."""
    ended = threading.Event()

    def follow() -> None:
        with progress("training", steps) as (bar, task):
            while not (ended.is_set() and channel.empty()):
                try:
                    rows = channel.get(timeout=0.5)
                except Empty:
                    continue
                tracking.log(rows)
                bar.update(task, completed=rows[-1][0], note=_note(rows[-1][1]))
                _log_epochs(rows)

    thread = threading.Thread(target=follow, name="training metrics")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        channel.shutdown()


def _note(row: dict[str, float]) -> str:
    names = ("loss", "kl", "ce", "step_accuracy", "learning_rate", "examples_per_second")
    return "  ".join(f"{name.replace('_', ' ')} {row[name]:.3g}" for name in names if name in row)


def _log_epochs(rows: list[tuple[int, dict[str, float]]]) -> None:
    for _, row in rows:
        if "epoch" in row:
            log.info(
                "epoch %.0f: loss %.4f, held out %.4f; choice accuracy %.3f, held out %.3f; %.1f examples/s",
                *(row[name] for name in ("epoch", "train_loss", "validation_loss")),
                *(row[name] for name in ("train_choice_accuracy", "validation_choice_accuracy", "epoch_examples_per_second")),
            )


def _keep_best(result: ray.train.Result, folder: str, identity: dict[str, Any], tracking: Tracking) -> dict[str, Any]:
    """Copies the best checkpoint's student to the folder; train.json, written last, says it is whole."""
    checkpoint, metrics = min(result.best_checkpoints, key=lambda pair: pair[1][SCORE])
    with checkpoint.as_directory() as path:
        model, compiled = load_student(path)
        save_student(folder, model, compiled)
        last, _ = max(result.best_checkpoints, key=lambda pair: pair[1]["epoch"])
    with last.as_directory() as path:
        epochs = storage.read_json(storage.join(path, "epochs.json"))
    about = identity | {
        "best_epoch": metrics["epoch"],
        "parameters": model.parameter_counts(),
        "epochs": epochs,
        "mlflow": {"uri": tracking.uri, "run": tracking.run_id},
        "code_version": code_version(),
    }
    storage.write_json(storage.join(folder, "train.json"), about)
    tracking.end(failed=False)
    log.info("student of epoch %s in %s", metrics["epoch"], folder)
    return about


def _work(settings: dict[str, Any]) -> None:
    """One worker of the Ray Train job."""
    check_code_version()
    training: Training = settings["training"]
    config, context = training.config, ray.train.get_context()
    shards = open_shards(training.shards)
    torch.manual_seed(config.seed)
    device = ray.train.torch.get_device()
    student = Student(training.shape)
    model = ray.train.torch.prepare_model(student)
    data = load_examples(shards, TRAIN)
    order = Order(len(data), config.batch_size, config.seed, context.get_world_rank(), context.get_world_size())
    worker = _Worker(
        trainer=Trainer(model, config, order.steps * config.epochs, config.peak_rate(training.shape.width), device),
        student=student,
        compiled=shards.compiled,
        train=data,
        validation=load_examples(shards, VALIDATION),
        order=order,
        channel=settings["channel"] if context.get_world_rank() == 0 else None,
    )
    history: list[dict[str, Any]] = []
    for epoch in range(1, config.epochs + 1):
        history.append(worker.epoch(epoch))
        worker.report(history, config.samples)


@dataclass
class _Worker:
    """The parts of one worker's training. Only rank 0 has a channel to the driver."""

    trainer: Trainer
    student: Student
    compiled: CompiledTask
    train: Examples
    validation: Examples
    order: Order
    channel: Queue | None

    def epoch(self, epoch: int) -> dict[str, float]:
        """Trains one epoch and measures the validation split."""
        started, parts, parcel = time.perf_counter(), list[Sums](), _Parcel(self.channel)
        for indices in self.order.epoch(epoch):
            sums, metrics = self.trainer.step(self.train.batch(indices), self.order.batch_size)
            parcel.add(self.trainer.step_index, sums.means() | metrics)
            parts.append(sums)
        seconds = time.perf_counter() - started
        row = {"epoch": float(epoch), "epoch_examples_per_second": self.order.steps * self.order.batch_size / seconds}
        row |= {f"train_{name}": value for name, value in Sums.total(parts).means().items()}
        held_out = self.trainer.measure(self._held_out())
        row |= {f"validation_{name}": value for name, value in held_out.items()}
        parcel.add(self.trainer.step_index, row)
        parcel.send()
        return row

    def _held_out(self) -> Iterator[Batch]:
        """This worker's share of the validation split; with fewer examples than workers, some are shared."""
        mine = np.arange(self.order.rank % len(self.validation), len(self.validation), self.order.workers)
        size = max(1, self.order.batch_size // self.order.workers)
        for start in range(0, len(mine), size):
            yield self.validation.batch(mine[start : start + size])

    def report(self, history: list[dict[str, Any]], samples: int) -> None:
        """Hands Ray Train the epoch's metrics and rank 0's checkpoint."""
        metrics = {"epoch": int(history[-1]["epoch"]), SCORE: history[-1][SCORE]}
        if self.order.rank != 0:
            ray.train.report(metrics)
            return
        history[-1]["samples"] = self._samples(samples)
        with tempfile.TemporaryDirectory() as folder:
            save_student(folder, self.student, self.compiled)
            storage.write_json(storage.join(folder, "epochs.json"), history)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _samples(self, count: int) -> list[dict[str, str]]:
        """The first few validation comments with the teacher's answer and the student's of this epoch."""
        rows = range(min(count, len(self.validation)))
        if not rows:
            return []
        self.student.eval()
        prefixes = [self.validation.prefixes[i] for i in rows]
        decoder, decode = Decoder(self.student, self.compiled), self.compiled.tokenizer.decode
        constrained, free = decoder.constrained(prefixes), decoder.free(prefixes)
        return [
            {
                "comment": self.validation.texts[i],
                "teacher": decode(self.validation.answers[i]),
                "student": decode(constrained.tokens[i]),
                "unconstrained": decode(free.tokens[i]),
            }
            for i in rows
        ]


class _Parcel:
    """Step metrics on their way to the driver, a few at a time; on other ranks than 0 they go nowhere."""

    def __init__(self, channel: Queue | None) -> None:
        self._channel = channel
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._sent = time.perf_counter()

    def add(self, step: int, row: dict[str, float]) -> None:
        """Takes one row, and sends what waits once in a while."""
        if self._channel is None:
            return
        self._rows.append((step, row))
        if time.perf_counter() - self._sent > SEND_EVERY:
            self.send()

    def send(self) -> None:
        """Sends what waits."""
        if self._channel is not None and self._rows:
            self._channel.put(self._rows)
        self._rows, self._sent = [], time.perf_counter()
