"""`retort train`: logit shards to a student, by Ray Train. Here is the driver; `student.train.worker` does the work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from pyarrow.fs import FileSelector, FileType

from pipeline.base import storage
from pipeline.base.capacity import require_room
from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.base.run import find_run, tracked_run
from pipeline.base.runtime import MALLOC, start_ray
from pipeline.base.signals import Stopped, StopRequest
from pipeline.base.tracking import MetricsRow, Tracking, Writer, tracking_uri
from pipeline.base.version import VARIABLE, code_version
from pipeline.shards.manifest import Shards, open_shards
from pipeline.teacher.model_files import fingerprint
from student.config import StudentSettings, TrainConfig, student_shape
from student.data.examples import student_examples
from student.data.sample_size import few_examples
from student.data.unpack import TRAIN
from student.model.checkpoint import (
    PRUNED,
    TRAINED,
    WEIGHTS,
    Trained,
    load_student,
    load_temperatures,
    load_training,
    save_student,
    save_temperatures,
)
from student.model.model import Student
from student.model.pretrained import NGRAMS, OWN
from student.train.channel import open_channel
from student.train.checkpoint import POSITION
from student.train.loop import Training
from student.train.losses import Loss
from student.train.order import Order
from student.train.worker import SCORE, work

log = logging.getLogger(__name__)

BEGUN = "begun.json"  # in the student's folder: which training it is, and its run in MLflow
CHECKPOINTS = "checkpoints"  # in the student's folder: the best epoch's and the last, to go on from
NOT_LOGGED = ("kinds", "opening", "separator", "epsilon", "reader")  # of a student: they follow from what it was cut from
POLL = 0.3  # seconds between two looks for metrics


@dataclass(frozen=True)
class Child:
    """A training's run in MLflow, where it is part of a search or a chain.

    Attributes:
        name: of the run.
        parent: the run it belongs to.
    """

    name: str
    parent: str


@dataclass(frozen=True)
class Watcher:
    """A search that watches one of its trainings.

    Attributes:
        stop: set when the training has to stop.
        on_epoch: gets the measures of each epoch.
    """

    stop: threading.Event
    on_epoch: Callable[[dict[str, Any]], None]


def train(
    config: StudentSettings, shards_folder: str, student_folder: str, child: Child | None = None, watcher: Watcher | None = None
) -> Trained:
    """Trains the configured student and writes the best epoch's to `student_folder`; returns what train.json holds.

    A folder that already holds this very training is left as it is; one that holds a part of it is gone on with.

    Raises:
        UserError: the shards are unusable, or the folder holds another training.
        Stopped: a signal, or the search, ended it early.
    """
    changed = sorted(config.student.model_dump(exclude_none=True, exclude={"dropout"}))
    if config.train.init and changed:
        raise UserError(
            f"the student in {config.train.init} has its shape already: leave student.{', student.'.join(changed)} out"
        )
    shards = open_shards(shards_folder)
    training = Training.of(student_shape(shards.compiled.task, config.student), config.train, shards)
    identity = _identity(training, shards)
    if find_run(student_folder, TRAINED, identity, "training"):
        log.info("%s already holds this training", student_folder)
        return load_training(student_folder)
    student = training.student()
    examples = student_examples(shards, TRAIN, student)
    steps = Order(examples.lengths, training.config).steps
    _announce(student, not config.train.init and student.reader is None, len(examples), steps)
    if shards.manifest.answers == "given" and shards.manifest.teacher.model and config.train.objective != "hard-label":
        log.warning("the answers were given: train.objective=hard-label leaves the teacher's own probabilities out")
    start_ray()
    require_room("training", config.train.fewest_workers, config.train.resources)
    start = partial(_start_run, config, identity, child)
    closes = watcher is None  # a search ends its trials' runs itself: a trial may be stopped just as its training ends
    with tracked_run(student_folder, BEGUN, identity, "training", start, closes) as tracking:
        result = _run(training, shards_folder, steps * config.train.epochs, tracking, student_folder, watcher)
        return _keep_best(training.config, result, student_folder, identity, tracking)


def copy_trained(source: str, folder: str) -> Trained:
    """A trained student to another folder, where it is whole once train.json is there."""
    model, compiled = load_student(source)
    temperatures = load_temperatures(source, compiled.task)
    storage.delete(storage.join(folder, TRAINED))
    save_student(folder, model, compiled)
    if temperatures:
        save_temperatures(folder, temperatures)
    for name in (BEGUN, TRAINED):
        storage.write_json(storage.join(folder, name), storage.read_json(storage.join(source, name)))
    return load_training(folder)


def _announce(student: Student, fresh: bool, examples: int, steps: int) -> None:
    few = few_examples(examples)
    if few and fresh:
        log.warning("%s", few)
    counts = student.parameter_counts()
    log.info(
        "training %.1f M parameters + %.1f M of the embedding on %s examples, %s steps an epoch",
        *(counts["rest"] / 1e6, counts["embedding"] / 1e6),
        *(f"{examples:,}", f"{steps:,}"),
    )


def _identity(training: Training, shards: Shards) -> dict[str, Any]:
    """What makes a training this one and no other."""
    made_of = shards.manifest.model_dump(mode="json", include={"task_name", "hashes", "teacher", "rows", "steps", "digest"})
    init = training.config.init
    begun_from = {"init": storage.fingerprint(storage.join(init, WEIGHTS))} if init else {}
    if training.source:
        begun_from["reader"] = str(fingerprint(training.source))
    return {"student": training.shape.as_dict(), "train": training.config.recipe(), "shards": made_of} | begun_from


def _start_run(config: StudentSettings, identity: dict[str, Any], child: Child | None) -> Tracking:
    uri = tracking_uri(config.tracking.uri, config.out or ".")
    name = child.name if child else f"{identity['shards']['task_name']}-{shape_name(identity['student'])}"
    logged = {key: value for key, value in identity["student"].items() if key not in NOT_LOGGED}
    parameters = {
        "shards": identity["shards"],
        "student": logged | {"reader": reader_name(identity["student"].get("reader"))},
        "train": identity["train"] | _chosen(config.train, identity["student"]["width"]),
        "pruned": _pruned(config.train.init),
    }
    return Tracking.start(uri, config.tracking.experiment, name, parameters, "student", child.parent if child else None)


def _pruned(init: str | None) -> dict[str, Any]:
    """What the student was cut from, and how, if it was."""
    path = storage.join(init, PRUNED) if init else None
    if path is None or not storage.exists(path):
        return {}
    about = storage.read_json(path)
    how = {name: about["prune"][name] for name in ("by", "fraction")}
    share = about["parameters"]["student"] / about["parameters"]["source"]
    source = about["source"].get("student") or about["source"]["model"]
    return how | {"from": source, "share": round(share, 4), "parent_run": about["parent_run"]}


def _chosen(config: TrainConfig, width: int) -> dict[str, float]:
    """What stands for the settings that were left open, so that runs compare."""
    return Loss(config).settings | {"learning_rate": config.peak_rate(width)}


def shape_name(student: dict[str, Any]) -> str:
    """Reader, layers × width, for people."""
    reader = reader_name(student.get("reader"))
    return f"{'' if reader == OWN else f'{reader}-'}{student['layers']}x{student['width']}"


def reader_name(reader: dict[str, Any] | None) -> str:
    """A reader in a word: `own`, `ngrams`, or a pretrained model's kind and size."""
    if reader is None:
        return OWN
    config = reader["config"]
    return f"{config['model_type']}-{config['num_hidden_layers']}x{config['hidden_size']}" if config else NGRAMS


def _run(
    training: Training, shards: str, steps: int, tracking: Tracking, folder: str, watcher: Watcher | None
) -> ray.train.Result:
    """Runs the Ray Train job in a thread of its own, as signals come to the main one.

    Raises:
        Stopped: a signal, or the search, ended it early.
    """
    channel, ended, writer = open_channel(), _Outcome(), Writer(tracking)
    trainer = _ray_trainer(training, shards, channel, folder)
    thread = threading.Thread(target=ended.run, args=[trainer], daemon=True, name="Ray Train")
    with StopRequest("saving a checkpoint") as stop, progress("training", steps) as (bar, task):
        thread.start()
        running = True
        while running:
            running = thread.is_alive()  # before the last look
            if stop or (watcher and watcher.stop.is_set()):
                channel.stop.remote()
            rows: list[MetricsRow] = ray.get(channel.take.remote())
            if rows:
                bar.update(task, completed=rows[-1][0], note=_note(rows[-1][1]))
                _log_epochs(rows)
                writer.add(rows)
                for _, row in rows:
                    if watcher and "epoch" in row:
                        watcher.on_epoch(row)
            thread.join(POLL)
    writer.write()
    result = ended.result()
    if result.metrics["epoch"] < training.config.epochs:
        raise Stopped(f"training stopped at step {result.metrics['step']:,} of {steps:,}, saved in {folder}")
    return result


class _Outcome:
    """What a job in another thread came to."""

    def __init__(self) -> None:
        self._result: ray.train.Result | None = None
        self._error: BaseException | None = None

    def run(self, trainer: ray.train.torch.TorchTrainer) -> None:
        """Runs the job."""
        try:
            self._result = trainer.fit()
        except BaseException as error:
            self._error = error

    def result(self) -> ray.train.Result:
        """Its result, or its error raised."""
        if self._error is not None:
            raise self._error
        return self._result


def _ray_trainer(training: Training, shards: str, channel: Any, folder: str) -> ray.train.torch.TorchTrainer:
    """The job. Under the same folder it goes on from its last checkpoint: Ray Train finds it by the name."""
    config = training.config
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(config.threads_per_worker)}
    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"training": training, "shards": shards, "channel": channel},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=config.resources,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=folder,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SCORE, checkpoint_score_order="min"
            ),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )


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


def _delete_strays(folder: str, kept: set[str]) -> None:
    """Deletes the checkpoints that a killed run wrote and Ray Train does not know of."""
    fs, inner = storage.filesystem(folder)
    for info in fs.get_file_info(FileSelector(inner)):
        if info.type == FileType.Directory and info.base_name not in kept:
            fs.delete_dir(info.path)


def _cost(config: TrainConfig, seconds: float) -> dict[str, float]:
    workers = config.most_workers
    return {"worker_seconds": seconds * workers, "gpu_seconds": seconds * workers * config.gpus_per_worker}


def _keep_best(
    config: TrainConfig, result: ray.train.Result, folder: str, identity: dict[str, Any], tracking: Tracking
) -> Trained:
    """Copies the best checkpoint's student to the folder; train.json, written last, says it is whole."""
    best = result.get_best_checkpoint(SCORE, "min")
    _delete_strays(storage.join(folder, CHECKPOINTS), {Path(kept.path).name for kept in (best, result.checkpoint)})
    with best.as_directory() as path:
        model, compiled = load_student(path)
        save_student(folder, model, compiled)
        best_epoch = len(storage.read_json(storage.join(path, POSITION))["history"])
    with result.checkpoint.as_directory() as path:
        history = storage.read_json(storage.join(path, POSITION))["history"]
    steps = result.metrics["step"] // config.epochs
    measures = [{name: value for name, value in row.items() if isinstance(value, float)} for row in history]
    tracking.log_missing([(epoch * steps, row) for epoch, row in enumerate(measures, 1)])
    about = identity | {
        "best_epoch": best_epoch,
        "parameters": model.parameter_counts(),
        "epochs": history,
        "cost": _cost(config, history[-1]["seconds"]),
        "mlflow": {"uri": tracking.uri, "run": tracking.run_id},
        "code_version": code_version(),
    }
    storage.write_json(storage.join(folder, TRAINED), about)
    log.info("student of epoch %s in %s", best_epoch, folder)
    return Trained.model_validate(about)
