"""Seconds of each stage by its number of workers: measured, else given by the user, else from published peaks.

All three fill in the model of `tune.scaling.model`, which adds what more workers cost: start-up, whole units and examples, the
exchange of gradients. Where nothing was measured, workers do not slow their neighbours, and nothing of the exchange hides
behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile

from cluster.config import ClusterSettings
from cluster.plan.arithmetic import (
    FORWARD_SHARE,
    WEIGHT_BYTES,
    decode_seconds,
    example_seconds,
    prefill_seconds,
    update_seconds,
)
from cluster.plan.machines import GIB, Machine
from cluster.plan.measured import Measured
from cluster.plan.workload import Workload
from pipeline.base.errors import UserError
from pipeline.extract.prepare import CODEC_ROWS
from tune.scaling.model import ASSUMED_LINK, ExtractModel, Link, TrainModel, fit_extract, fit_train
from tune.scaling.rows import ExtractRow, TrainRow

BANDWIDTH_SHARE = 0.6  # of the peak memory bandwidth that is reached
START_SECONDS = 90.0  # until a stage's workers are at work, where it was not measured
TEACHER_BYTES = 2  # a parameter, in bfloat16
MANIFEST_SECONDS = 0.002  # a unit's line in the manifest, as measured (docs/scaling.md)
LOCAL_LATENCY = 3.4e-6  # seconds of a hop between GPUs of one machine: NCCL's tuning table for a ring over NVLink
CALL_SECONDS = 1.0  # of an API
MEASURED, GIVEN, PUBLISHED, ASSUMED = "measured", "given", "published peak × share", "assumed"


@dataclass(frozen=True)
class Timing:
    """A stage on a kind of machine, by its number of workers.

    Attributes:
        stage: its name.
        source: what its rate is from: `MEASURED`, `GIVEN`, `PUBLISHED` or `ASSUMED`.
        rate: of one worker without start-up, in answers or examples a second.
        seconds: wall time by workers, start included.
        machine: the kind.
        most: workers that can take part; None for any number. More change nothing.
        times: how often it runs, one after another.
    """

    stage: str
    source: str
    rate: float
    seconds: Callable[[int], float]
    machine: Machine
    most: int | None = None
    times: int = 1

    def busy(self, workers: int) -> int:
        """How many of them take part."""
        return min(workers, self.most or workers)

    def hours(self, workers: int) -> float:
        """Wall time of all times."""
        return self.times * self.seconds(self.busy(workers)) / 3600

    def worker_hours(self, workers: int) -> float:
        """Of all that take part together: GPU-hours where a worker is a GPU."""
        return self.busy(workers) * self.hours(workers)

    def dollars(self, workers: int, spot: bool) -> float | None:
        """A machine is paid for as a whole while the stage runs; None where there is no spot price."""
        return self.machine.dollars(self.busy(workers), self.hours(workers), spot)

    def efficiency(self, workers: int) -> float:
        """The share of the worker-hours that one worker alone would take too."""
        return self.worker_hours(1) / self.worker_hours(workers) if self.seconds(1) else 1.0

    def counts(self, most: int) -> list[int]:
        """1, 2, 4, … workers up to so many that can take part."""
        return [2**i for i in range(self.busy(most).bit_length())]

    def quickest(self, most: int) -> int:
        """Which of these counts takes the least time."""
        return min(self.counts(most), key=self.seconds)

    def pays(self, level: float, most: int) -> int:
        """The largest of these counts before the efficiency first falls below a level."""
        return list(takewhile(lambda workers: self.efficiency(workers) >= level, self.counts(most)))[-1]


def extract_timing(config: ClusterSettings, work: Workload, machine: Machine, measured: Measured | None) -> Timing:
    """Extraction, its calibration included.

    Raises:
        UserError: the teacher does not fit the machine.
    """
    plan, starts, command = config.plan, dict[int, float](), 0.0
    if config.teacher.engine == "openai":  # one process asks, whatever the workers
        row = plan.seconds_per_answer or CALL_SECONDS / config.teacher.requests
        source = GIVEN if plan.seconds_per_answer else ASSUMED
        return Timing("extract", source, 1 / row, lambda _: START_SECONDS + row * work.answers, machine)
    unit_rows = min(config.extract.rows_per_unit, work.answers)
    if measured and measured.extract:
        source, model = MEASURED, replace(fit_extract(measured.extract), unit_rows=unit_rows)
        starts, command = _starts(measured.extract), measured.command
    else:
        source = GIVEN if plan.seconds_per_answer else PUBLISHED
        row = plan.seconds_per_answer or answer_seconds(config, work, machine)
        model = ExtractModel(
            start=START_SECONDS,
            row=row,
            sharing=0.0,
            manifest=MANIFEST_SECONDS,
            unit_rows=unit_rows,
            per_node=machine.workers,
        )
    samples = [config.extract.calibration_rows] + ([CODEC_ROWS] if config.extract.codec == "compact" else [])
    calibration = [min(rows, work.answers) for rows in samples]

    def seconds(workers: int) -> float:
        """An engine for each calibration, then the actors."""
        before = sum(starts.get(1, model.start) + rows * model.row for rows in calibration)
        job = replace(model, start=starts.get(workers, model.start)).job(work.answers)
        return command + before + sum(job.terms(workers).values())

    return Timing("extract", source, 1 / model.row, seconds, machine)


def train_timing(config: ClusterSettings, work: Workload, machine: Machine, measured: Measured | None) -> Timing:
    """One training, its validations included."""
    plan, command = config.plan, 0.0
    if measured and measured.train:
        source, model = MEASURED, fit_train(measured.train, ASSUMED_LINK, tree=measured.gpus)
        starts, command = _starts(measured.train), measured.command
    else:
        source = GIVEN if plan.seconds_per_example else PUBLISHED
        model, starts = _assumed_training(config, work, machine), {1: START_SECONDS}

    def seconds(workers: int) -> float:
        """The batch is shared out; the validation split is read after each epoch."""
        step = sum(model.strong(work.batch).terms(workers).values())
        each = model.example + model.sharing * (min(workers, model.per_node) - 1)
        validation = work.epochs * -(-work.validation // workers) * FORWARD_SHARE * each
        return command + starts.get(workers, max(starts.values())) + work.steps * step + validation

    rate = 1 / (model.example + model.fixed / work.batch)
    return Timing("train", source, rate, seconds, machine, work.batch, work.trials)


def evaluate_timing(train: Timing, work: Workload) -> Timing:
    """The test split, read by one worker: a forward pass is a third of a training example's arithmetic."""
    rate = train.rate / FORWARD_SHARE
    return Timing("evaluate", train.source, rate, lambda _: work.test / rate, train.machine, 1, work.trials)


def answer_seconds(config: ClusterSettings, work: Workload, machine: Machine) -> float:
    """One answer of the teacher on one worker, from published peaks: reading the prompt, then writing.

    Raises:
        UserError: the teacher does not fit the worker's memory.
    """
    plan, weight_bytes = config.plan, config.plan.teacher_params * TEACHER_BYTES
    if not fits(config, machine):
        raise UserError(
            f"a teacher of {plan.teacher_params:.3g} parameters takes {weight_bytes / GIB:.1f} GiB, and a worker has "
            f"{machine.memory_gib:g}: choose another plan.teacher_machine"
        )
    peak = machine.flops_per_second
    reading = prefill_seconds(plan.teacher_params, work.lengths.prompt, peak, plan.mfu)
    return reading + decode_seconds(
        plan.teacher_params,
        work.lengths.answer,
        work.calls,
        config.teacher.max_num_seqs,
        weight_bytes,
        peak,
        plan.mfu,
        machine.bytes_per_second * BANDWIDTH_SHARE,
    )


def fits(config: ClusterSettings, machine: Machine) -> bool:
    """Whether the teacher's weights leave room in what an engine takes of a worker's memory."""
    room = machine.memory_bytes * config.teacher.gpu_memory_utilization
    return config.plan.teacher_params * TEACHER_BYTES < room


def _assumed_training(config: ClusterSettings, work: Workload, machine: Machine) -> TrainModel:
    """A training nobody measured: a time for an example given, or 6·N·T FLOPs at an MFU, which has AdamW's update in it.

    With more workers that update does not shrink, so it is set apart.
    """
    plan, fixed = config.plan, 0.0
    example = plan.seconds_per_example
    if example is None:
        example = example_seconds(work.body, work.sequence, machine.flops_per_second, plan.mfu)
        update = update_seconds(work.params, machine.bytes_per_second * BANDWIDTH_SHARE)
        fixed = min(update, example * work.batch / 2)
    return TrainModel(
        fixed=fixed,
        example=example - fixed / work.batch,
        sharing=0.0,
        waiting=0.0,
        overlap=0.0,
        local=Link(machine.local_gbyte_s * 1e9, LOCAL_LATENCY),
        link=Link(machine.network_gbit_s * 1e9 / 8, ASSUMED_LINK.latency),
        bytes=WEIGHT_BYTES * work.params,
        per_node=machine.workers,
        tree=True,
    )


def _starts(rows: list[ExtractRow] | list[TrainRow]) -> dict[int, float]:
    """Start-up by workers, seconds."""
    return {row.workers: row.startup for row in rows}
