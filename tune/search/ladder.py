"""`retort run`'s ladder: students that start differently, the cheapest first, and the one that is worth its time.

Each rung is a folder of its own with its student and report, and leaves what it has finished alone: a ladder that was killed
goes on by the same command. The validation split picks; the pick's student is copied to where a run has its student.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.run import tracked_run
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.shards.manifest import Shards, open_shards
from student.config import PruneConfig, StudentChanges, StudentConfig, student_shape
from student.data.examples import student_examples
from student.data.unpack import VALIDATION
from student.decode.familiarity import FILE as FAMILIARITY
from student.evaluate.evaluate import REPORT, evaluate
from student.evaluate.evidence import EVIDENCE
from student.evaluate.speed import latency_ms
from student.evaluate.verdict import named
from student.model.checkpoint import Trained, load_student
from student.model.pretrained import NGRAMS, OWN, pretrained_folder, reader_shape
from student.prune.prune import prune
from student.prune.source import open_source
from student.train.loop import Loop, Training
from student.train.train import Child, copy_trained, train
from tune.compare.page import PAGE, compare_runs
from tune.config import LadderConfig, TuneSettings

log = logging.getLogger(__name__)

LADDER, RUNG = "ladder.json", "rung.json"  # in the ladder's folder, and in each rung's, written last
TEACHER = "teacher"  # the rung's name
FEW = 20_000  # answers; from more, n-grams were 10 points below the others (docs/starts.md)
TEACHER_SHARE = 0.5  # of the teacher's parameters that its rung keeps
PROBE = 6  # steps that are timed before a rung trains, the second time they are run


@dataclass(frozen=True)
class Rung:
    """A student of the ladder, trained.

    Attributes:
        name: for people: `ngrams`, `own`, `teacher`, or a reader's last name.
        agreement: share of validation comments answered as the teacher does.
        latency_ms: of one comment.
        parameters: its embedding included.
        epochs: it was given.
        seconds: its training took.
        test: share of test comments answered as the teacher does; nothing is picked by it.
        floor: the best floor's share of validation comments.
    """

    name: str
    agreement: float
    latency_ms: float
    parameters: int
    epochs: int
    seconds: float
    test: float
    floor: float = 0.0

    @property
    def clears(self) -> bool:
        """Whether it is above every floor; a student that is not has nothing to offer but its speed."""
        return self.agreement > self.floor

    def score(self, fastest_ms: float, points: float) -> float:
        """Percent of agreement, less some points for each doubling of the time that the fastest takes."""
        return 100 * self.agreement - points * math.log2(self.latency_ms / fastest_ms)

    def __str__(self) -> str:
        """For people."""
        floor = "" if self.clears else f", a floor {100 * self.floor:.1f} %"
        return f"{self.name} ({100 * self.agreement:.1f} % of validation answers, {self.latency_ms:.1f} ms{floor})"


def climb(config: TuneSettings, shards_folder: str, out: str) -> tuple[Trained, str]:
    """Trains the students of the ladder in `out/ladder`, and copies the best to `out/student`.

    Returns:
        Its training, and a sentence that says why it was taken.

    Raises:
        UserError: the shards are unusable, or the folder holds another ladder.
        Stopped: a signal ended it early.
    """
    shards, folder = open_shards(shards_folder), storage.join(out, "ladder")
    rungs = rungs_of(config, shards)
    if not rungs:
        raise UserError(f"the ladder has no rung: {', '.join(config.ladder.rungs)} cannot be trained on these shards")
    identity = {"shards": shards.manifest.digest, "minutes": config.ladder.minutes}

    def start() -> Tracking:
        uri = tracking_uri(config.tracking.uri, config.out or ".")
        return Tracking.start(uri, config.tracking.experiment, "ladder", identity | {"rungs": list(rungs)}, "ladder")

    with tracked_run(folder, "begun.json", identity, "ladder", start) as tracking:
        done = [_train(name, changed, shards_folder, folder, tracking.run_id) for name, changed in rungs.items()]
        compare_runs(tracking.uri, config.tracking.experiment, folder, tracking.run_id, by=["student.reader"])
    ranked = rank(done, config.ladder.points_per_doubling)
    storage.write_json(storage.join(folder, LADDER), {"pick": ranked[0].name, "rungs": [asdict(rung) for rung in done]})
    trained = _copy(storage.join(folder, ranked[0].name), out)
    return trained, f"Of the ladder: {', then '.join(map(str, ranked))}. All are in {storage.join(folder, PAGE)}"


def rank(rungs: list[Rung], points: float) -> list[Rung]:
    """By score, the best first; those that are above every floor before the others."""
    fastest = min(rung.latency_ms for rung in rungs)
    return sorted(rungs, key=lambda rung: (not rung.clears, -rung.score(fastest, points)))


def rungs_of(config: TuneSettings, shards: Shards) -> dict[str, TuneSettings]:
    """The configuration of each rung that can be trained, by name.

    Raises:
        UserError: two would have one name, and so one folder.
    """
    rungs: dict[str, TuneSettings] = {}
    for name, changed in _rungs(config, shards):
        if name in rungs:
            raise UserError(f"two rungs of the ladder are called {name}: give their folders different names")
        rungs[name] = changed
    return rungs


def _rungs(config: TuneSettings, shards: Shards) -> Iterator[tuple[str, TuneSettings]]:
    planned = student_shape(shards.compiled.task, config.student)
    for name in config.ladder.rungs:
        if name == TEACHER and not shards.manifest.teacher.is_here:
            continue
        if name == NGRAMS and shards.manifest.rows > FEW:
            log.info("no rung of n-grams: of %s answers the others learn more", f"{shards.manifest.rows:,}")
            continue
        if name == TEACHER:
            cut = PruneConfig(source=str(shards.manifest.teacher.model), fraction=TEACHER_SHARE)
            changed = StudentChanges(sequence=planned.sequence, dropout=config.student.dropout)
            try:
                open_source(cut, planned.sequence, shards)
            except UserError as error:
                log.info("no rung of the teacher: %s", error)
                continue
            yield name, config.model_copy(update={"prune": cut, "student": changed})
        else:  # a student that starts from another (train.init) is told nothing of its shape
            yield name, config if name == planned.reader else _with_reader(config, name)
    for reader in ladder_readers(config.ladder, planned):
        yield reader.rstrip("/").split("/")[-1], _with_reader(config, reader)


def ladder_readers(ladder: LadderConfig, planned: StudentConfig) -> list[str]:
    """The readers that get a rung of their own: those named for the ladder, and the student's where it has one."""
    named = [*ladder.readers, planned.reader]
    return [reader for reader in dict.fromkeys(named) if reader not in (OWN, *ladder.rungs)]


def require_readers(ladder: LadderConfig, planned: StudentConfig) -> None:
    """Refuses readers that cannot be had: better now than after an extraction.

    Raises:
        UserError: naming the first one.
    """
    for reader in ladder_readers(ladder, planned):
        reader_shape(planned.model_copy(update={"reader": reader}), pretrained_folder(reader))


def _with_reader(config: TuneSettings, reader: str) -> TuneSettings:
    return config.model_copy(update={"student": config.student.model_copy(update={"reader": reader})})


def _train(name: str, config: TuneSettings, shards_folder: str, folder: str, run: str) -> Rung:
    """Trains and measures one rung, or finds that it was."""
    place = storage.join(folder, name)
    done = storage.join(place, RUNG)
    student, report = storage.join(place, "student"), storage.join(place, "report")
    log.info("rung %s of the ladder", name)
    if name == TEACHER:
        pruned = storage.join(place, "pruned")
        prune(config.prune, config.train, config.student, shards_folder, pruned)
        config = config.model_copy(
            update={
                "train": config.train.model_copy(update={"init": pruned}),
                "student": StudentChanges(dropout=config.student.dropout),
            }
        )
    epochs = min(config.train.epochs, _epochs(config, shards_folder, storage.join(place, "epochs.json")))
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})
    trained = train(config, shards_folder, student, Child(name, run))
    if storage.exists(done):
        return Rung(**storage.read_json(done))
    figures = evaluate(config.floors, config.train, shards_folder, student, report)
    model, compiled = load_student(student)
    rung = Rung(
        name,
        trained.epochs[trained.best_epoch - 1]["validation_answer_accuracy"],
        latency_ms(model, compiled, student_examples(open_shards(shards_folder), VALIDATION, model)),
        figures["sizes"]["student"],
        epochs,
        trained.epochs[-1]["seconds"],
        figures["student"]["whole"],
        max((floor[VALIDATION] for floor in named(figures["floors"]).values()), default=0.0),
    )
    storage.write_json(done, asdict(rung))
    return rung


def _copy(rung: str, out: str) -> Trained:
    """The pick's student, what certifies it, and its report, to where a run has them."""
    trained = copy_trained(storage.join(rung, "student"), storage.join(out, "student"))
    for file in (f"student/{EVIDENCE}", f"student/{FAMILIARITY}", *(f"report/{name}" for name in REPORT)):
        storage.write_bytes(storage.join(out, file), storage.read_bytes(storage.join(rung, file)))
    return trained


def _epochs(config: TuneSettings, shards_folder: str, path: str) -> int:
    """How many epochs the rung's minutes allow; what was found once stays so."""
    if not storage.exists(path):
        shards = open_shards(shards_folder)
        training = Training.of(student_shape(shards.compiled.task, config.student), config.train, shards)
        seconds = Loop(training, shards).seconds_an_epoch(PROBE) / config.train.most_workers
        epochs = max(1, int(60 * config.ladder.minutes / seconds))
        storage.write_json(path, {"epochs": epochs, "seconds_an_epoch": seconds})
    return int(storage.read_json(path)["epochs"])
