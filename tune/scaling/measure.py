"""`retort scale`: short extractions and trainings at several worker counts, a model fitted to them, and a page about both."""

from __future__ import annotations

import logging
import os
import time
from typing import Any, Literal

import psutil
import ray
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.base import storage
from pipeline.base.capacity import require_room
from pipeline.base.errors import UserError
from pipeline.base.runtime import start_ray
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.config import TeacherConfig
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.task_file import load_task
from student.config import RUNTIME_ONLY_KEYS, student_shape
from student.data.unpack import unpack
from student.model.pretrained import NGRAMS, OWN
from student.train.loop import Training
from tune.config import TuneSettings
from tune.scaling.extraction import UNITS_PER_WORKER, measure_extraction
from tune.scaling.model import ASSUMED_LINK
from tune.scaling.page import render
from tune.scaling.results import Result, extract_stage, train_stage
from tune.scaling.rows import Rows, TrainRow
from tune.scaling.training import measure_training

log = logging.getLogger(__name__)

FILE, PAGE, SCRATCH = "scale.json", "scale.html", "scratch"
JOB_ROWS = 500_000  # comments of the extraction that the model extrapolates
LOOKS = 4  # at what else the machine does, a second each
Stage = Literal["extract", "train"]


def measure_scaling(config: TuneSettings, shards_folder: str, folder: str) -> Result:
    """Measures what is not measured yet and writes `scale.json` and `scale.html`.

    Args:
        folder: where the two files go; all nodes must see it.

    Raises:
        UserError: a stage cannot run, or the folder holds the measurements of other settings.
        Stopped: a signal ended it early; what was measured is kept.
    """
    stages = _stages(config)
    if "train" in stages and config.train.strategy != "ddp":
        raise UserError("retort scale measures train.strategy=ddp alone: only there can a step leave its exchange out")
    shards = open_shards(shards_folder) if "train" in stages else None
    if shards:
        unpack(shards)  # damaged ones are better refused now
    start_ray()
    command = time.time() - psutil.Process().create_time()
    counts = _counts(config, stages)
    config = _with_threads(config, counts[-1])
    kept = _Kept(folder, {stage: _identity(stage, config, shards) for stage in stages})
    with _open_run(config, kept) as tracking:
        _measure(config, shards, counts, kept, command)
        result = _result(config, kept)
        _publish(result, kept, tracking)
        return result


def _stages(config: TuneSettings) -> list[Stage]:
    return ["extract", "train"] if config.scale.stage == "both" else [config.scale.stage]


def _counts(config: TuneSettings, stages: list[Stage]) -> list[int]:
    """The worker counts, rising from 1.

    Raises:
        UserError: there is no room for the largest.
    """
    needs = {"extract": config.teacher.resources, "train": config.train.resources}
    room = ray.cluster_resources()
    fit = min(_fitting(needs[stage], room) for stage in stages)
    counts = sorted({1, *config.scale.workers} if config.scale.workers else {2**i for i in range(max(fit, 1).bit_length())})
    for stage in stages:
        require_room(f"measuring {stage} with {counts[-1]} workers", counts[-1], needs[stage])
    return counts


def _fitting(each: dict[str, float], room: dict[str, float]) -> int:
    """How many workers have a core of their own, and what else they take."""
    each = each | {"CPU": max(each["CPU"], 1.0)}
    return int(min(room.get(name, 0.0) / amount for name, amount in each.items() if amount))


def _with_threads(config: TuneSettings, most: int) -> TuneSettings:
    """Each worker the same CPU threads at every count, or counts would not compare: its share where most of them run."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    threads = max(1, (os.cpu_count() or 1) // -(-most // nodes))
    log.info("each worker has %s CPU thread(s) at every count, unless teacher.threads or train.threads says otherwise", threads)
    teacher = config.teacher.model_copy(update={"threads": config.teacher.threads or threads})
    train = config.train.model_copy(update={"threads": config.train.threads or threads})
    return config.model_copy(update={"teacher": teacher, "train": train})


def _identity(stage: Stage, config: TuneSettings, shards: Shards | None) -> dict[str, Any]:
    """What makes measurements comparable. How many counts there are may change from call to call."""
    machine = {"cores": os.cpu_count()}
    if stage == "extract":
        if config.task is None:
            raise UserError("measuring extraction needs a task (--task), or measure training alone with --stage train")
        return machine | {
            "task": load_task(config.task).hash,
            "teacher": config.teacher.model_dump(mode="json", exclude={"actors"}),
            "comments": config.comments.model_dump(mode="json", exclude={"limit"}),
            "extract": config.extract.model_dump(mode="json"),
            "units_per_worker": UNITS_PER_WORKER,
        }
    assert shards is not None  # noqa: S101 (opened for this stage)
    how = config.train.model_dump(mode="json", include=RUNTIME_ONLY_KEYS - {"workers", "checkpoint_minutes", "max_failures"})
    student = student_shape(shards.compiled.task, config.student)
    return machine | {
        "student": student.model_dump(mode="json"),
        "train": config.train.with_batch(student.reader not in (OWN, NGRAMS)).recipe() | how,
        "shards": shards.manifest.model_dump(mode="json", include={"task_name", "rows", "digest"}),
        "steps": config.scale.steps,
    }


class _Kept:
    """The measurements in scale.json, written as each is done.

    Raises:
        UserError: the file holds a stage's measurements under other settings.
    """

    def __init__(self, folder: str, identity: dict[Stage, dict[str, Any]]) -> None:
        self.folder, self._path = folder, storage.join(folder, FILE)
        found: dict[str, Any] = storage.read_json(self._path) if storage.exists(self._path) else {}
        self.mlflow: dict[str, str] | None = found.get("mlflow")
        self.identity: dict[str, Any] = found.get("settings", {})
        for stage, wanted in identity.items():
            before = self.identity.setdefault(stage, wanted)
            if differ := [name for name in wanted if before.get(name) != wanted[name]]:
                raise UserError(
                    f"{self._path} has measurements of other settings ({stage}: its {', '.join(differ)} differ): choose "
                    "another --out, or delete it. With another largest count of workers each has other threads: "
                    "teacher.threads and train.threads hold them"
                )
        self.rows = Rows.model_validate(found.get("measured", {}))

    def has(self, stage: Stage, workers: int) -> bool:
        """Whether a stage was measured with so many workers."""
        return any(row.workers == workers for row in getattr(self.rows, stage))

    def write(self, figures: dict[str, Any] | None = None) -> None:
        """Writes them all, with what was made of them."""
        content = {"mlflow": self.mlflow, "settings": self.identity, "figures": figures or {}}
        storage.write_json(self._path, content | {"measured": self.rows.model_dump()})


def _open_run(config: TuneSettings, kept: _Kept) -> Tracking:
    """The MLflow run: a new one, or the one the measurements were begun under."""
    if kept.mlflow:
        return Tracking.reopen(**kept.mlflow)
    uri = tracking_uri(config.tracking.uri, config.out or ".")
    parameters = kept.identity | {"scale": config.scale.model_dump(mode="json")}
    tracking = Tracking.start(uri, config.tracking.experiment, "scale", parameters, "scale")
    kept.mlflow = tracking.place
    kept.write()
    return tracking


def _measure(config: TuneSettings, shards: Shards | None, counts: list[int], kept: _Kept, command: float) -> None:
    """Measures each stage at each count that is not measured yet."""
    scratch = storage.join(kept.folder, SCRATCH)
    for stage in _stages(config):
        for workers in counts:
            if kept.has(stage, workers):
                log.info("%s with %s worker(s) is already measured", stage, workers)
                continue
            log.info("measuring %s with %s worker(s)", stage, workers)
            here, also = storage.join(scratch, stage), {"busy": busy_share(), "command": command}
            if stage == "extract":
                kept.rows.extract.append(measure_extraction(config, workers, counts[-1], here).model_copy(update=also))
            else:
                kept.rows.train.extend(row.model_copy(update=also) for row in _trained(config, shards, workers, here))
            kept.write()
    storage.delete(scratch)


def _trained(config: TuneSettings, shards: Shards | None, workers: int, folder: str) -> list[TrainRow]:
    assert shards is not None  # noqa: S101 (opened for this stage)
    train = config.train.model_copy(update={"workers": workers})
    training = Training.of(student_shape(shards.compiled.task, config.student), train, shards)
    return measure_training(training, shards.folder, workers, config.scale.steps, folder)


def busy_share() -> float:
    """The share of this machine's CPU time that is in use while nothing of ours is measured.

    The least of some looks: Ray's own processes may still be starting, or ending.
    """
    return min(psutil.cpu_percent(interval=1) for _ in range(LOOKS)) / 100


def _result(config: TuneSettings, kept: _Kept) -> Result:
    """The models of all that was measured, this time or before."""
    price, stages = config.scale.price_per_hour, []
    if kept.rows.extract:
        gpus = TeacherConfig(**kept.identity["extract"]["teacher"]).resources["GPU"]
        stages.append(extract_stage(kept.rows.extract, JOB_ROWS, gpus, price))
    if kept.rows.train:
        train = kept.identity["train"]["train"]
        stages.append(train_stage(kept.rows.train, train["batch_size"], ASSUMED_LINK, train["gpus_per_worker"], price))
    return Result(tuple(stages), kept.identity)


def _publish(result: Result, kept: _Kept, tracking: Tracking) -> None:
    """The figures and the page, in the folder and in MLflow."""
    page = render(result)
    kept.write(result.figures())
    storage.write_text(storage.join(kept.folder, PAGE), page)
    try:
        tracking.log(result.metrics())
        MlflowClient(tracking.uri).log_text(tracking.run_id, page, PAGE)
    except MlflowException as error:  # the figures are in scale.json too
        log.warning("MLflow does not take the figures: %s", error)
