"""Which epoch a training keeps, and what makes it another one; tests/integration/test_training.py has the whole command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from mlflow.tracking import MlflowClient
from ray.train import Checkpoint
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult

import student.train.train as driver
from cluster.config import ClusterSettings
from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.tracking import Tracking
from pipeline.shards.manifest import Shards
from student.config import TrainConfig
from student.model.checkpoint import TRAINED, WEIGHTS, Tensors, load_tensors, save_student
from student.train.channel import Sender
from student.train.loop import Loop, Training
from student.train.trainer import Trainer
from student.train.worker import SCORE, UNSCORED, _Worker
from tests.student.conftest import DEBUG, made_up_shards
from tests.student.decode.test_decode import make_student


class Keeper:
    """Takes a worker's checkpoints as Ray Train would, and keeps those that its own manager does."""

    def __init__(self, training: Training, folder: Path) -> None:
        job = driver._ray_trainer(training, "", None, str(folder))
        self._manager, self._folder = _CheckpointManager(job.run_config.checkpoint_config), folder / driver.CHECKPOINTS
        self.weights: list[Tensors] = []  # of each checkpoint
        self.metrics: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any], checkpoint: Checkpoint, checkpoint_dir_name: str, **_: object) -> None:
        self.weights.append(load_tensors(f"{checkpoint.path}/{WEIGHTS}"))
        self.metrics.append(metrics)
        kept = shutil.move(checkpoint.path, self._folder / checkpoint_dir_name)
        self._manager.register_checkpoint(_TrainingResult(Checkpoint.from_directory(kept), metrics))

    def result(self) -> ray.train.Result:
        latest, best = self._manager.latest_checkpoint_result, self._manager.best_checkpoint_results
        kept = [(one.checkpoint, one.metrics) for one in best]
        return ray.train.Result(latest.metrics, latest.checkpoint, None, str(self._folder), best_checkpoints=kept)


@pytest.mark.parametrize("scores", [[0.5, 0.2, 0.9], [0.2, 0.9, 0.5], [0.9, 0.5, 0.2]])
def test_the_epoch_with_the_most_equal_held_out_answers_is_kept(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float]
) -> None:
    """Whatever the cross-entropy says; and no checkpoint within an epoch, of which there is one after each step."""
    config = TrainConfig(epochs=3, batch_size=40, log_every=1, checkpoint_minutes=1e-9)
    training, coming = Training.of(DEBUG, config, shards), iter(scores)
    keeper = Keeper(training, tmp_path)
    monkeypatch.setattr(Trainer, "measure", lambda *_: {"ce": (accuracy := 1 - next(coming)), "answer_accuracy": accuracy})
    monkeypatch.setattr(ray.train, "report", keeper.report)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    _Worker(Loop(training, shards), training, shards.compiled, Sender(None), rank=0).run()
    assert len(keeper.metrics) > 2 * len(scores)
    run = Tracking.start(f"sqlite:///{tmp_path}/mlflow.db", "tests", "a run", {}, "student")
    first, *others = (row["step"] for row in keeper.metrics if row[SCORE] != UNSCORED)
    run.log([(first, {"epoch": 1.0, "validation_answer_accuracy": -1.0})])  # the others were lost with a killed driver
    trained = driver._keep_best(config, keeper.result(), str(tmp_path), driver._identity(training, shards), run)
    assert trained.best_epoch == 1 + scores.index(0.2)
    assert [1 - row["validation_answer_accuracy"] for row in trained.epochs] == pytest.approx(scores)
    logged = MlflowClient(run.uri).get_metric_history(run.run_id, "validation_answer_accuracy")
    assert [(one.step, one.value) for one in logged] == [
        (first, -1.0),
        *zip(others, (pytest.approx(1 - score) for score in scores[1:]), strict=True),
    ]
    best = next(i for i, row in enumerate(keeper.metrics) if row[SCORE] == pytest.approx(0.2))
    kept = load_tensors(f"{tmp_path}/{WEIGHTS}")
    same = [all(torch.equal(tensor, one[name]) for name, tensor in kept.items()) for one in keeper.weights]
    assert same == [i == best for i in range(len(same))]


class Held:
    """A folder that holds a training, which begins from a student."""

    def __init__(self, shards: Shards, folder: Path) -> None:
        self.init, self._shards, self._folder = str(folder / "init"), shards, str(folder / "student")
        self.begin_from(seed=0)
        training = Training.of(DEBUG, self._settings({}).train, shards)
        about = {"best_epoch": 1, "parameters": {"embedding": 1, "rest": 1}, "epochs": [{}], "cost": {}}
        about |= {"mlflow": {"uri": "", "run": ""}}
        storage.write_json(f"{self._folder}/{TRAINED}", driver._identity(training, shards) | about)

    def begin_from(self, seed: int) -> None:
        save_student(self.init, make_student(self._shards.compiled, seed), self._shards.compiled)

    def train(self, shards: Shards | None = None, **changes: Any) -> None:
        driver.train(self._settings(changes), (shards or self._shards).folder, self._folder)

    def _settings(self, changes: dict[str, Any]) -> ClusterSettings:
        train = {"epochs": 2, "init": self.init} | changes.get("train", {})
        return ClusterSettings.model_validate(changes | {"train": train})


@pytest.fixture
def held(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    monkeypatch.setattr(driver, "start_ray", lambda: pytest.fail("it begins anew"))
    return Held(shards, tmp_path)


def test_a_training_that_is_there_is_not_done_again(held: Held) -> None:
    held.train()
    held.train(train={"workers": 2, "log_every": 1})  # change how it runs


@pytest.mark.parametrize(("name", "changes"), [("train", {"seed": 1}), ("train", {"epochs": 3}), ("student", {"dropout": 0.5})])
def test_other_settings_are_another_training(held: Held, name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"holds another training \(its {name} differ\)"):
        held.train(**{name: changes})


def test_other_weights_to_begin_from_are_another_training(held: Held) -> None:
    held.begin_from(seed=1)
    with pytest.raises(UserError, match=r"holds another training \(its init differ\)"):
        held.train()


def test_other_shards_are_another_training(held: Held, shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds another training \(its shards differ\)"):
        held.train(made_up_shards(tmp_path / "shards", shards.compiled, 60))
