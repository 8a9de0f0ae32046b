"""`retort grow`: ask, learn, choose what to ask next; until the student may answer most texts alone, or the calls are used up.

Each round is a folder of its own, whose stages leave what they have finished alone: a loop that was killed goes on by the same
command, and asks nothing twice. Validation answers end the loop, so the last round's certificate has chosen nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.run import tracked_run
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.comments.plan import find_comments
from pipeline.extract.fitted import compile_fitted
from pipeline.extract.stage import make_shards
from pipeline.shards.join import join
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from pipeline.task.task import Task
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import TextTokenizer, load_teacher_tokenizer
from pipeline.teacher.model_files import absolute_model
from student.config import FloorsConfig
from student.evaluate.certificate import coverage
from student.evaluate.evaluate import evaluate
from student.evaluate.evidence import load_evidence, targets_of
from student.model.checkpoint import load_student
from student.train.train import Child, copy_trained, train
from tune.config import TuneSettings
from tune.grow import page
from tune.grow.pool import Pool, columns_of, keys_in, keys_of, open_pool, write_texts
from tune.grow.select import next_size

log = logging.getLogger(__name__)

BEGUN, PAGE, ROUND, TEXTS = "grow.json", "grow.html", "round.json", "texts.jsonl"
AGREE = 0.95  # asked for where nothing else is


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Attributes:
        calls: texts that the teacher was asked about in it and before.
        agreement: share of test comments that its student answers as the teacher does.
        alone: share of validation comments on which the student's own answers meet the target.
        coverage: share of test comments that it may answer alone, certified; None where nothing can be.
        seconds: its training took.
    """

    calls: int
    agreement: float
    alone: float
    coverage: float | None
    seconds: float


def grow(config: TuneSettings, out: str) -> tuple[list[Round], dict[str, Any]]:
    """Runs the rounds in `out/rounds`; the last one's student, and all shards, are then in `out`.

    Returns:
        The rounds, and what the last student's fidelity.json holds.

    Raises:
        UserError: anything the user can mend, or the folder holds another loop.
        Stopped: a signal or a budget ended it early.
    """
    if config.task is None:
        raise UserError("no task given: name it with --task")
    task = load_task(config.task)
    compiled, tokenizer = _tokenizer(config, task, storage.join(out, "pool"))
    pool = open_pool(config.comments, task, tokenizer, storage.join(out, "pool"))
    asked = config.answer if config.answer.certified else config.answer.model_copy(update={"agree": AGREE})
    tracked = config.tracking.model_copy(update={"uri": tracking_uri(config.tracking.uri, out)})
    config, targets = config.model_copy(update={"tracking": tracked, "answer": asked}), targets_of(asked)
    identity = {"pool": pool.source.model_dump(mode="json"), "targets": targets, "student": config.student.model_dump()}
    identity["teacher"] = config.teacher.model_dump(include={"engine", "url"}) | {"model": config.teacher.model or task.teacher}

    def start() -> Tracking:
        return Tracking.start(str(config.tracking.uri), config.tracking.experiment, "grow", identity, "growth")

    rounds: list[Round] = []
    with tracked_run(out, BEGUN, identity, "growth", start) as tracking:
        while size := _next_size(config, pool, rounds):
            rounds.append(_round(config, pool, compiled, out, len(rounds), size, tracking))
            storage.write_text(storage.join(out, PAGE), page.render(pool.task.name, targets, rounds))
    shards, student = (storage.join(out, name) for name in ("shards", "student"))
    _join_all([storage.join(_folder(out, number), "shards") for number in range(len(rounds))], shards)
    copy_trained(storage.join(_folder(out, len(rounds) - 1), "student"), student)
    return rounds, evaluate(config.floors, config.train, shards, student, storage.join(out, "report"), asked)


def _join_all(folders: list[str], out: str) -> None:
    """All shards in one folder, in place of those that fewer calls had left there."""
    if storage.exists(storage.join(out, "manifest.json")):
        before = getattr(open_shards(out).manifest, "joined", None)
        digests = [open_shards(folder).manifest.digest for folder in folders]
        if before and before != digests and before == digests[: len(before)]:
            storage.delete(out)
    join(folders, out)


def _tokenizer(config: TuneSettings, task: Task, folder: str) -> tuple[CompiledTask | None, TextTokenizer]:
    """The teacher's; where it brings none, one fitted to all texts of the pool, with the task compiled for it."""
    if config.comments.answer is not None or config.teacher.engine == "openai":
        compiled = compile_fitted(config, task, find_comments(config.comments, task), folder)
        return compiled, compiled.tokenizer
    model = config.teacher.model or task.teacher
    if not model:
        raise UserError("no teacher given: name one with --teacher, or in the task, or give answers (--answers)")
    return None, load_teacher_tokenizer(absolute_model(model), config.teacher.revision)


def _next_size(config: TuneSettings, pool: Pool, rounds: list[Round]) -> int | None:
    """Texts asked about by the end of the next round; None where the last one was enough, or nothing is left."""
    calls = rounds[-1].calls if rounds else 0
    size = next_size(calls, config.grow, len(pool.records))
    return None if size <= calls or (rounds and rounds[-1].alone >= config.grow.coverage) else size


def select(config: TuneSettings, student: str, budget: int, asked: Sequence[str], out: str) -> int:
    """Writes the texts that a student would have its teacher asked about to `out/texts.jsonl`; returns how many.

    Args:
        asked: folders of shards whose texts are left out.

    Raises:
        UserError: anything the user can mend.
    """
    _, compiled = load_student(student)
    pool = open_pool(config.comments, compiled.task, compiled.tokenizer, storage.join(out, "pool"))
    known = set().union(*map(keys_of, asked))
    records = pool.choose(budget, known, student, [config.grow.seed])
    write_texts(storage.join(out, TEXTS), records)
    return len(records)


def _folder(out: str, number: int) -> str:
    return storage.join(out, "rounds", f"{number:02d}")


def _round(
    config: TuneSettings,
    pool: Pool,
    compiled: CompiledTask | None,
    out: str,
    number: int,
    size: int,
    tracking: Tracking,
) -> Round:
    """Runs one round, or what is missing of it."""
    place, before = _folder(out, number), [_folder(out, earlier) for earlier in range(number)]
    done, texts, student = (storage.join(place, name) for name in (ROUND, TEXTS, "student"))
    if storage.exists(done):
        return Round(**storage.read_json(done))
    if not storage.exists(texts):
        asked = {key for folder in before for key in keys_in(storage.join(folder, TEXTS))}
        teacher = storage.join(before[-1], "student") if before else None
        write_texts(texts, pool.choose(size - len(asked), asked, teacher, [config.grow.seed, number]))
    log.info("round %s: %s texts in all", number + 1, f"{size:,}")
    _extract(config, compiled, place, before)
    folders = [storage.join(folder, "shards") for folder in (*before, place)]
    shards = storage.join(place, "asked") if before else folders[0]
    if before:
        join(folders, shards)
    trained = train(config, shards, student, Child(f"{size:,} calls", tracking.run_id))
    figures = evaluate(FloorsConfig(examples=0), config.train, shards, student, storage.join(place, "report"), config.answer)
    targets = targets_of(config.answer)
    certificate = figures["certificates"][-1]["certificate"]
    found = Round(
        calls=size,
        agreement=figures["student"]["whole"],
        alone=coverage(targets, load_evidence(student, pool.task).evidence(list(pool.task.fields), targets)[0]),
        coverage=certificate["coverage"] if certificate else None,
        seconds=trained.epochs[-1]["seconds"],
    )
    log.info("%s", page.sentence(found))
    tracking.log([(size, {name: float(value or 0) for name, value in asdict(found).items()})])
    storage.write_json(done, asdict(found))
    return found


def _extract(config: TuneSettings, compiled: CompiledTask | None, place: str, before: list[str]) -> None:
    """Asks about a round's texts, under the task as the first round has compiled it and within what is left to spend."""
    shards = storage.join(place, "shards")
    if not storage.exists(storage.join(shards, "compiled.json")):
        compiled = CompiledTask.load(storage.join(before[0], "shards")) if before else compiled
        if compiled:
            compiled.save(shards)
    spent = [open_shards(storage.join(folder, "shards")).manifest.teacher.spent for folder in before]
    left: dict[str, Any] = {}
    if config.teacher.max_cost is not None:
        left["max_cost"] = config.teacher.max_cost - sum(one.cost or 0 for one in spent if one)
    if config.teacher.max_calls is not None:
        left["max_calls"] = config.teacher.max_calls - sum(one.calls for one in spent if one)
    if any(amount <= 0 for amount in left.values()):
        raise UserError("the budget is used up by the rounds before: raise --max-cost or --max-calls, or lower --calls")
    make_shards(
        config.model_copy(
            update={
                "out": place,
                "comments": columns_of(config.comments, storage.join(place, TEXTS)),
                "teacher": config.teacher.model_copy(update=left),
            }
        )
    )
