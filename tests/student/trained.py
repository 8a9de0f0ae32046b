"""Students as `retort train` leaves them, trained in this process: without Ray, which takes seconds to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.config import ClusterSettings
from pipeline.base import storage
from pipeline.config import TrackingConfig
from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.model.checkpoint import assembled, save_student
from student.train.loop import Loop, Training
from student.train.train import _identity, _start_run
from student.train.worker import SAMPLES, samples
from tests.student.conftest import DEBUG


def train_here(out: Path, shards: Shards, tracking: TrackingConfig, **changes: Any) -> None:
    """A student in OUT/student, with a run in MLflow. What is not changed is as open as the defaults leave it."""
    settings = TrainConfig.model_validate({"epochs": 2, "batch_size": 16} | changes)
    config = ClusterSettings(out=str(out), tracking=tracking, train=settings)
    training, folder = Training.of(DEBUG, config.train, shards), str(out / "student")
    identity = _identity(training, shards)
    run = _start_run(config, identity, None)
    loop = Loop(training, shards)
    history = loop.position.history
    for report in loop.run():
        if report.epoch_ended:
            model = assembled(training.shape, loop.state().average | {"rows": torch.tensor(training.rows)})
            history[-1]["samples"] = samples(model, shards.compiled, loop.validation, SAMPLES)
    run.end()
    save_student(folder, model, shards.compiled)
    about = {"best_epoch": 2, "parameters": model.parameter_counts(), "epochs": history, "cost": {"worker_seconds": 1.0}}
    about |= {"mlflow": {"uri": run.uri, "run": run.run_id}}
    storage.write_json(storage.join(folder, "train.json"), identity | about)
