"""A plan: each stage's hours and money as the run is configured, with other numbers of workers, and on other machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cluster.config import ClusterSettings
from cluster.plan.arithmetic import CHINCHILLA, STATE_BYTES, WEIGHT_BYTES, shard_bytes
from cluster.plan.machines import CPU_MACHINE, GPU_MACHINE, Machine, machine_named, read_machines
from cluster.plan.measured import Measured, as_measured, differences, read_measured
from cluster.plan.timing import BANDWIDTH_SHARE, START_SECONDS, Timing, evaluate_timing, extract_timing, fits, train_timing
from cluster.plan.workload import Workload, workload_of

PAYS = 0.5  # least efficiency at which more workers still pay: below it, most of what they cost is lost
FEWEST, FURTHEST = 4, 1024  # workers that are always looked at, and the most
CHECKPOINTS = 2  # kept of a training: the best and the last


@dataclass(frozen=True)
class Stage:
    """One stage as the run is configured.

    Attributes:
        name, source, rate: see `Timing`.
        machine: the kind.
        machines: how many.
        workers: that take part.
        wall_hours: of all its trainings one after another.
        worker_hours: GPU-hours where a worker is a GPU.
        dollars: on demand, whole machines.
        spot_dollars: None where there is no spot price.
    """

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
    """The whole run with some number of workers in each stage. A machine is paid for while its stage runs, as a whole.

    Attributes:
        workers: of each stage, by its name.
        stage_hours: wall time by stage.
        efficiency: by stage.
        wall_hours, worker_hours, dollars, spot_dollars: in all, see `Stage`.
    """

    workers: dict[str, int]
    stage_hours: dict[str, float]
    efficiency: dict[str, float]
    wall_hours: float
    worker_hours: float
    dollars: float
    spot_dollars: float | None


@dataclass(frozen=True)
class Elsewhere:
    """The same job on one machine of a kind, by published peaks, each stage with as many workers as make it quickest.

    `point` is None where the teacher does not fit.
    """

    machine: str
    point: Point | None


@dataclass(frozen=True)
class Estimate:
    """All that `retort plan` says.

    Attributes:
        work: the job.
        stages: as the run is configured.
        points: with other numbers of workers.
        pays: by stage, the workers up to which most of their time is of use.
        elsewhere: on other machines; empty where a teacher was measured whose size is not known.
        bytes: of storage, by what it holds.
        tokens: training tokens, beside Chinchilla's.
        assumptions: what published peaks are taken times.
        warnings: what the plan cannot know.
    """

    work: Workload
    stages: tuple[Stage, ...]
    points: tuple[Point, ...]
    pays: dict[str, int]
    elsewhere: tuple[Elsewhere, ...]
    bytes: dict[str, float]
    tokens: dict[str, float]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def total(self) -> Stage:
        """All stages one after another."""
        spot = [stage.spot_dollars for stage in self.stages]
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
            spot_dollars=_sum(spot),
        )

    def figures(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self) | {"total": asdict(self.total)}


@dataclass(frozen=True)
class _Placed:
    """A stage's timing on its kind of machine, and how often it runs."""

    timing: Timing
    name: str
    machine: Machine
    times: int = 1

    def hours(self, workers: int) -> float:
        return self.times * self.timing.hours(workers)

    def worker_hours(self, workers: int) -> float:
        return self.times * self.timing.worker_hours(workers)

    def dollars(self, workers: int, spot: bool) -> float | None:
        return self.machine.dollars(self.timing.busy(workers), self.hours(workers), spot)

    def stage(self, workers: int) -> Stage:
        busy, dollars = self.timing.busy(workers), self.dollars(workers, False)
        return Stage(
            name=self.timing.stage if self.times == 1 else f"{self.timing.stage} × {self.times}",
            source=self.timing.source,
            rate=self.timing.rate,
            machine=self.name,
            machines=self.machine.count(busy),
            workers=busy,
            wall_hours=self.hours(workers),
            worker_hours=self.worker_hours(workers),
            dollars=dollars or 0.0,
            spot_dollars=self.dollars(workers, True),
        )


def make_plan(config: ClusterSettings) -> Estimate:
    """The plan of a run; nothing is started, and nothing is read but the task, the prices and a scale.json.

    Raises:
        UserError: one of these is wrong, or the teacher does not fit its machine.
    """
    measured = read_measured(config.plan.scale) if config.plan.scale else None
    config = as_measured(config, measured) if measured else config
    machines, work = read_machines(config.plan.prices), workload_of(config, measured)
    comparable = not (measured and measured.extract) or "teacher_params" in config.plan.model_fields_set
    placed = _place(config, work, machines, measured)
    counts = [config.plan.workers or config.teacher.actors, *[config.plan.workers or config.train.most_workers] * 2]
    return Estimate(
        work=work,
        stages=tuple(each.stage(workers) for each, workers in zip(placed, counts, strict=True)),
        points=tuple(_points(placed, set(counts))),
        pays={each.timing.stage: each.timing.pays(PAYS, FURTHEST) for each in placed},
        elsewhere=tuple(_elsewhere(config, work, name, machine) for name, machine in machines.items()) if comparable else (),
        bytes=_bytes(config, work),
        tokens=_tokens(work),
        assumptions=tuple(_assumptions(config)),
        warnings=tuple(_warnings(config, measured)),
    )


def _assumptions(config: ClusterSettings) -> Iterator[str]:
    plan = config.plan
    yield (
        f"Published peaks count as reached to {100 * plan.prefill_mfu:g} % of FLOP/s in the teacher, "
        f"{100 * plan.train_mfu:g} % in training, and {100 * BANDWIDTH_SHARE:g} % of the memory bandwidth; "
        f"{config.teacher.max_num_seqs} answers share a reading of the weights of {plan.teacher_params:.3g} parameters; "
        f"a stage takes {START_SECONDS:g} s to start."
    )


def _warnings(config: ClusterSettings, measured: Measured | None) -> Iterator[str]:
    """Of what the plan cannot know."""
    yield from differences(config, measured) if measured else ()
    if config.task is None:
        yield "no task was given: lengths in tokens that plan.* does not say are the thesis'"


def _place(config: ClusterSettings, work: Workload, machines: dict[str, Machine], measured: Measured | None) -> list[_Placed]:
    """Each stage on the kind of machine that the plan names for it."""
    usual = CPU_MACHINE if measured and not measured.gpus else GPU_MACHINE
    teachers = config.plan.teacher_machine or usual
    students = config.plan.student_machine or teachers
    return _timings(
        config, work, measured, (teachers, machine_named(machines, teachers)), (students, machine_named(machines, students))
    )


def _timings(
    config: ClusterSettings,
    work: Workload,
    measured: Measured | None,
    teachers: tuple[str, Machine],
    students: tuple[str, Machine],
) -> list[_Placed]:
    extract = extract_timing(config, work, teachers[1], measured)
    train = train_timing(config, work, students[1], measured)
    return [
        _Placed(extract, *teachers),
        _Placed(train, *students, work.trials),
        _Placed(evaluate_timing(train, work), *students, work.trials),
    ]


def _points(placed: list[_Placed], chosen: set[int]) -> Iterator[Point]:
    """With 1, 2, 4, … workers, up to the first count with which the whole run does not pay, and with those chosen."""
    alone = _point(placed, [1] * len(placed))
    for workers in sorted({2**i for i in range(FURTHEST.bit_length())} | chosen):
        point = _point(placed, [workers] * len(placed))
        yield point
        if workers >= max(FEWEST, *chosen) and alone.worker_hours < PAYS * point.worker_hours:
            return


def _point(placed: list[_Placed], counts: list[int]) -> Point:
    stages = {each.timing.stage: each.stage(workers) for each, workers in zip(placed, counts, strict=True)}
    return Point(
        workers={name: stage.workers for name, stage in stages.items()},
        stage_hours={name: stage.wall_hours for name, stage in stages.items()},
        efficiency={each.timing.stage: each.timing.efficiency(workers) for each, workers in zip(placed, counts, strict=True)},
        wall_hours=sum(stage.wall_hours for stage in stages.values()),
        worker_hours=sum(stage.worker_hours for stage in stages.values()),
        dollars=sum(stage.dollars for stage in stages.values()),
        spot_dollars=_sum([stage.spot_dollars for stage in stages.values()]),
    )


def _elsewhere(config: ClusterSettings, work: Workload, name: str, machine: Machine) -> Elsewhere:
    """Retort on one whole machine of a kind, whatever was given or measured on another."""
    plan = config.plan.model_copy(update={"seconds_per_answer": None, "seconds_per_example": None})
    config = config.model_copy(update={"plan": plan})
    if not fits(config, machine):
        return Elsewhere(name, None)
    placed = _timings(config, work, None, (name, machine), (name, machine))
    return Elsewhere(name, _point(placed, [each.timing.quickest(machine.workers) for each in placed]))


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


def _tokens(work: Workload) -> dict[str, float]:
    """What one training reads, how much of it is new, and how much would be compute-optimal for its layers."""
    return {
        "trained": work.passes * work.examples * work.sequence,
        "distinct": float(work.examples * work.sequence),
        "chinchilla": float(CHINCHILLA * work.body),
    }
