"""A plan: each stage's hours and money as the run is configured, with other numbers of workers, and on other machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cluster.config import ClusterSettings
from cluster.plan.arithmetic import CHINCHILLA, STATE_BYTES, WEIGHT_BYTES, shard_bytes
from cluster.plan.machines import CPU_MACHINE, GPU_MACHINE, Machine, machine_named, read_machines
from cluster.plan.measured import Measured, as_measured, differences, read_measured
from cluster.plan.timing import (
    BANDWIDTH_SHARE,
    CALL_SECONDS,
    START_SECONDS,
    Timing,
    evaluate_timing,
    extract_timing,
    fits,
    train_timing,
)
from cluster.plan.workload import Workload, workload_of
from pipeline.teacher.usage import Usage
from tune.compare.plots import short_number

PAYS = 0.5  # least efficiency at which more workers still pay: below it, most of what they cost is lost
FEWEST, FURTHEST = 4, 1024  # workers that are always looked at, and the most
CHECKPOINTS = 2  # kept of a training: the best and the last


@dataclass(frozen=True)
class Stage:
    """A stage, or all of them, as the run is configured; dollars are on demand, for whole machines, None without a price."""

    name: str
    source: str
    rate: float | None
    machine: str
    machines: int
    workers: int
    wall_hours: float
    worker_hours: float
    dollars: float
    spot_dollars: float | None


@dataclass(frozen=True)
class Point:
    """The whole run with some number of workers in each stage, by the stage's name."""

    workers: dict[str, int]
    stage_hours: dict[str, float]
    efficiency: dict[str, float]
    wall_hours: float
    worker_hours: float
    dollars: float
    spot_dollars: float | None


@dataclass(frozen=True)
class Estimate:
    """All that `retort plan` says.

    Attributes:
        work: the job.
        stages: as the run is configured.
        points: with other numbers of workers.
        pays: by stage, the workers up to which most of their time is of use.
        elsewhere: the same on one whole machine of each kind, by published peaks, each stage with as many workers as make it
            quickest; None where the teacher does not fit. Empty where a teacher was measured whose size is not known.
        bytes: of storage, by what it holds.
        tokens: training tokens, beside Chinchilla's.
        assumptions: what published peaks are taken times.
        warnings: what the plan cannot know.
    """

    work: Workload
    stages: tuple[Stage, ...]
    points: tuple[Point, ...]
    pays: dict[str, int]
    elsewhere: dict[str, Point | None]
    bytes: dict[str, float]
    tokens: dict[str, float]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def total(self) -> Stage:
        """All stages one after another."""
        return Stage(
            name="in all",
            source="",
            rate=None,
            machine="",
            machines=max(stage.machines for stage in self.stages),
            workers=max(stage.workers for stage in self.stages),
            wall_hours=sum(stage.wall_hours for stage in self.stages),
            worker_hours=sum(stage.worker_hours for stage in self.stages),
            dollars=sum(stage.dollars for stage in self.stages),
            spot_dollars=_sum([stage.spot_dollars for stage in self.stages]),
        )

    def figures(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self) | {"total": asdict(self.total)}


def make_plan(config: ClusterSettings) -> Estimate:
    """The plan of a run; nothing is started, and nothing is read but the task, the prices, a scale.json and a reader's files.

    Raises:
        UserError: one of these is wrong, or the teacher does not fit its machine.
    """
    measured = read_measured(config.plan.scale) if config.plan.scale else None
    config = as_measured(config, measured) if measured else config
    machines, work = read_machines(config.plan.prices), workload_of(config, measured)
    comparable = not (measured and measured.extract) or "teacher_params" in config.plan.model_fields_set
    usual = CPU_MACHINE if measured and not measured.gpus else GPU_MACHINE
    is_api = config.teacher.engine == "openai"
    teachers = config.plan.teacher_machine or (CPU_MACHINE if is_api else usual)
    students = config.plan.student_machine or (usual if is_api else teachers)
    timings = _timings(config, work, measured, machine_named(machines, teachers), machine_named(machines, students))
    counts = [
        1 if is_api else config.plan.workers or config.teacher.actors,
        *[config.plan.workers or config.train.most_workers] * 2,
    ]
    stages = zip(timings, (teachers, students, students), counts, strict=True)
    return Estimate(
        work=work,
        stages=tuple(_stage(timing, name, workers) for timing, name, workers in stages),
        points=tuple(_points(timings, set(counts))),
        pays={timing.stage: timing.pays(PAYS, FURTHEST) for timing in timings},
        elsewhere={name: _elsewhere(config, work, machine) for name, machine in machines.items()} if comparable else {},
        bytes=_bytes(config, work),
        tokens={
            "trained": work.passes * work.examples * work.sequence,
            "distinct": float(work.examples * work.sequence),
            "chinchilla": float(CHINCHILLA * work.body),  # compute-optimal for the student's layers
        },
        assumptions=tuple(_assumptions(config, work)),
        warnings=tuple(_warnings(config, measured)),
    )


def _assumptions(config: ClusterSettings, work: Workload) -> Iterator[str]:
    plan, ladder = config.plan, config.ladder
    yield (
        f"Published peaks count as reached to {100 * plan.mfu:g} % of FLOP/s and "
        f"{100 * BANDWIDTH_SHARE:g} % of the memory bandwidth; "
        f"{config.teacher.max_num_seqs} answers share a reading of the weights of {plan.teacher_params:.3g} parameters; "
        f"a stage takes {START_SECONDS:g} s to start."
    )
    if config.teacher.engine == "openai":
        read, written = work.answers * work.lengths.prompt, work.answers * work.lengths.answer
        cost = Usage(work.answers, read, written).cost(config.teacher)
        money = (
            "teacher.input_price and teacher.output_price say what they cost" if cost is None else f"{cost:,.2f} by its prices"
        )
        yield (
            f"The API answers {work.answers:,} calls, {config.teacher.requests} at once and each in {CALL_SECONDS:g} s; they "
            f"read {short_number(read)} tokens and write {short_number(written)} at most: {money}, beside what machines cost."
        )
    if work.trials == 1:
        yield (
            f"Training is that of one student. The ladder of retort run trains one for each of {', '.join(ladder.rungs)} "
            f"and for every reader, each for {ladder.minutes:g} min at most (ladder.*)."
        )


def _warnings(config: ClusterSettings, measured: Measured | None) -> Iterator[str]:
    """Of what the plan cannot know."""
    yield from differences(config, measured) if measured else ()
    if config.task is None:
        yield "no task was given: lengths in tokens that plan.* does not say are the thesis'"


def _timings(
    config: ClusterSettings, work: Workload, measured: Measured | None, teachers: Machine, students: Machine
) -> list[Timing]:
    train = train_timing(config, work, students, measured)
    return [extract_timing(config, work, teachers, measured), train, evaluate_timing(train, work)]


def _stage(timing: Timing, machine: str, workers: int) -> Stage:
    busy = timing.busy(workers)
    return Stage(
        name=timing.stage if timing.times == 1 else f"{timing.stage} × {timing.times}",
        source=timing.source,
        rate=timing.rate,
        machine=machine,
        machines=timing.machine.count(busy),
        workers=busy,
        wall_hours=timing.hours(workers),
        worker_hours=timing.worker_hours(workers),
        dollars=timing.dollars(workers, False) or 0.0,
        spot_dollars=timing.dollars(workers, True),
    )


def _points(timings: list[Timing], chosen: set[int]) -> Iterator[Point]:
    """With 1, 2, 4, … workers, up to the first count with which the whole run does not pay, and with those chosen."""
    alone = _point(timings, [1] * len(timings))
    for workers in sorted({2**i for i in range(FURTHEST.bit_length())} | chosen):
        point = _point(timings, [workers] * len(timings))
        yield point
        if workers >= max(FEWEST, *chosen) and alone.worker_hours < PAYS * point.worker_hours:
            return


def _point(timings: list[Timing], counts: list[int]) -> Point:
    each = list(zip(timings, counts, strict=True))
    return Point(
        workers={timing.stage: timing.busy(workers) for timing, workers in each},
        stage_hours={timing.stage: timing.hours(workers) for timing, workers in each},
        efficiency={timing.stage: timing.efficiency(workers) for timing, workers in each},
        wall_hours=sum(timing.hours(workers) for timing, workers in each),
        worker_hours=sum(timing.worker_hours(workers) for timing, workers in each),
        dollars=sum(timing.dollars(workers, False) or 0.0 for timing, workers in each),
        spot_dollars=_sum([timing.dollars(workers, True) for timing, workers in each]),
    )


def _elsewhere(config: ClusterSettings, work: Workload, machine: Machine) -> Point | None:
    """Retort on one whole machine of a kind, whatever was given or measured on another."""
    plan = config.plan.model_copy(update={"seconds_per_answer": None, "seconds_per_example": None})
    config = config.model_copy(update={"plan": plan})
    if not fits(config, machine):
        return None
    timings = _timings(config, work, None, machine, machine)
    return _point(timings, [timing.quickest(machine.workers) for timing in timings])


def _sum(parts: list[float | None]) -> float | None:
    """None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _bytes(config: ClusterSettings, work: Workload) -> dict[str, float]:
    """Storage: shards, the same unpacked on the students' machines, checkpoints with their moments, and students."""
    shards = work.answers * shard_bytes(work.kept_steps, work.lengths.watched, config.extract.codec == "compact")
    return {
        "shards": shards,
        "unpacked for training": shards,
        "checkpoints": float(work.trials * CHECKPOINTS * STATE_BYTES * work.params),
        "students": float(work.trials * WEIGHT_BYTES * work.params),
    }
