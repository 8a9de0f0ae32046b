"""What an evaluation needs of the student itself, in parts: each is one file that is there whole or not at all.

A few are done in this process; many, or any on a cluster, by actors of Ray. What a killed evaluation has left to do is the
parts without a file. Their folder is named by what they are parts of, so that those of another are never taken for these.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import DTypeLike, NDArray
from ray.util import ActorPool
from safetensors.numpy import save

from pipeline.base import storage
from pipeline.base.capacity import fitting, ray_options, require_room
from pipeline.base.console import progress
from pipeline.base.runtime import MALLOC, start_ray
from pipeline.base.version import VARIABLE, check_code_version, code_version
from pipeline.comments.reading import filter_rows, text_row
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from student.config import TrainConfig
from student.data.examples import Examples, student_examples
from student.data.unpack import TEST, VALIDATION
from student.decode.answerer import prefixes_of
from student.decode.decode import Decoded, Decoder, Prefixes
from student.evaluate.calibrate import fit_temperatures
from student.evaluate.fidelity import close_answers, step_sums
from student.evaluate.speed import latency_ms
from student.model.checkpoint import TRAINED, WEIGHTS, load_student
from student.model.model import Student

ANSWERS, FREE, STEPS = "answers", "free", "steps"  # kinds of parts: decoded under the automaton, freely; over given answers
OTHERS = "others"  # in place of a split: texts that certify instead of the test split
BATCH_SIZE = 128  # answers the student decodes together
PART = 16 * BATCH_SIZE  # comments of a part
CALIBRATED_ON = 50_000  # validation comments that temperatures are fitted on, at most
TEMPERATURES = "temperatures.json"
DECODED: dict[str, tuple[DTypeLike, int]] = {  # distinct answers one after another, which of them each comment has, and
    "answer": (np.int32, 1),
    "tokens": (np.int32, 1),
    "lengths": (np.int32, 1),
    "by_field": (np.float64, 2),
    "cost": (np.float64, 1),  # calls of the model and seconds
}
MEASURED: dict[str, tuple[DTypeLike, int]] = {"sums": (np.float64, 2), "close": (np.int64, 1)}


@dataclass(frozen=True)
class Work:
    """What parts are parts of.

    Attributes:
        shards: their folder.
        student: its folder.
        folder: of the report.
        others: the folder of shards whose texts certify, if any.
    """

    shards: str
    student: str
    folder: str
    others: str | None

    @cached_property
    def parts(self) -> str:
        """The folder of the parts."""
        shards = [open_shards(folder).manifest.digest for folder in (self.shards, self.others) if folder]
        files = [storage.fingerprint(storage.join(self.student, name)) for name in (WEIGHTS, TRAINED)]
        identity = json.dumps([shards, files, code_version()])
        return storage.join(self.folder, "parts", hashlib.sha256(identity.encode()).hexdigest()[:16])

    def path(self, part: Part) -> str:
        """A part's file."""
        return storage.join(self.parts, part.file)

    def forget(self) -> None:
        """Deletes all parts beside the report, others' too."""
        storage.delete(storage.join(self.folder, "parts"))


@dataclass(frozen=True)
class Part:
    """Comments of a split from `start` to before `stop`, and what to do with them; `texts` are those of `OTHERS`."""

    kind: str
    split: str
    start: int
    stop: int
    texts: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.kind}-{self.split}-{self.start:09d}.safetensors"


def parts_of(kind: str, split: str, count: int, texts: Sequence[str] = ()) -> list[Part]:
    """The parts of so many comments, in order."""
    starts = range(0, count, PART)
    return [Part(kind, split, i, min(i + PART, count), tuple(texts[i : i + PART])) for i in starts]


def carry_out(work: Work, parts: Sequence[Part], train: TrainConfig | None) -> dict[str, Any]:
    """Fits the temperatures and does the parts that have no file yet; returns what `Worker.speed` does.

    Args:
        train: the training whose workers' machines do it; None does it in this process.

    Raises:
        UserError: student and shards do not fit, or a file of them is damaged.
    """
    there = set(storage.list_files(work.parts))
    todo = [part for part in parts if part.file not in there]
    workers = _Actors(work, len(todo), train) if train else _Here(work)
    if TEMPERATURES not in there:
        workers.one("fit_temperatures")
    total, left = (sum(part.stop - part.start for part in some) for some in (parts, todo))
    with progress("decoding", total) as (bar, task):
        bar.advance(task, total - left)
        for rows in workers.each(todo):
            bar.advance(task, rows)
    speed: dict[str, Any] = workers.one("speed")
    return speed


class _Here:
    """One worker, in this process."""

    def __init__(self, work: Work) -> None:
        self._worker = Worker(work)

    def one(self, method: str) -> Any:
        return getattr(self._worker, method)()

    def each(self, parts: list[Part]) -> Iterator[int]:
        return map(self._worker.part, parts)


class _Actors:
    """As many workers as the cluster has room for; they end with this object."""

    def __init__(self, work: Work, parts: int, train: TrainConfig) -> None:
        start_ray()
        resources = resources_of(train, ray.cluster_resources())
        require_room("evaluation", 1, resources)
        environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(int(resources["CPU"]))}
        options = ray_options(resources) | {"runtime_env": {"env_vars": environment}}
        actor = ray.remote(max_restarts=2, max_task_retries=2, **options)(Worker)
        self._actors = [actor.remote(work) for _ in range(max(1, min(parts, fitting(resources, {}))))]

    def one(self, method: str) -> Any:
        return ray.get(getattr(self._actors[0], method).remote())

    def each(self, parts: list[Part]) -> Iterator[int]:
        done: Iterator[int] = ActorPool(self._actors).map_unordered(lambda actor, part: actor.part.remote(part), parts)
        return done


def resources_of(train: TrainConfig, cluster: dict[str, float]) -> dict[str, float]:
    """What a worker reserves, by Ray's names: as one of a training, but a whole CPU, and a GPU where there is any.

    Args:
        cluster: all there is. Machines that are named may be others than those with GPUs: there it is as for a training.
    """
    gpus = train.gpus_per_worker or float(train.machines is None and cluster.get("GPU", 0) >= 1)
    return train.resources | {"CPU": max(1.0, train.cpus_per_worker), "GPU": gpus}


class Worker:
    """Holds the student, on a GPU where it sees one."""

    def __init__(self, work: Work) -> None:
        check_code_version()
        self._work = work
        self._examples = cache(self._open)

    @cached_property
    def _student(self) -> tuple[Student, CompiledTask]:  # not at once: what an actor's start raises, Ray wraps
        return load_student(self._work.student, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(*self._student, storage.read_json(storage.join(self._work.parts, TEMPERATURES)))

    def _open(self, split: str) -> Examples:
        return student_examples(open_shards(self._work.shards), split, self._student[0])

    def fit_temperatures(self) -> None:
        """Writes the temperatures, by field."""
        examples = self._examples(VALIDATION)
        rows = np.linspace(0, len(examples) - 1, min(CALIBRATED_ON, len(examples))).astype(int)
        found = fit_temperatures(*self._student, examples.batches(rows, BATCH_SIZE))
        storage.write_json(storage.join(self._work.parts, TEMPERATURES), found)

    def part(self, part: Part) -> int:
        """Does a part and writes its file; returns its comments."""
        arrays = self._measured(part) if part.kind == STEPS else self._decoded(part)
        storage.write_bytes(self._work.path(part), save(arrays))
        return part.stop - part.start

    def speed(self) -> dict[str, Any]:
        """How long an answer takes alone, and on what: `latency_ms` and `student_device`."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() or "CPU"
        return {
            "latency_ms": latency_ms(*self._student, self._examples(TEST)),
            "student_device": f"{device}, {torch.get_num_threads()} threads",
        }

    def _measured(self, part: Part) -> dict[str, NDArray[Any]]:
        """What a student makes of the answers in the shards."""
        model, compiled = self._student
        examples, rows = self._examples(part.split), np.arange(part.start, part.stop)
        close = close_answers(compiled, examples.batches(rows, BATCH_SIZE))
        return {"sums": step_sums(model, examples.batches(rows, BATCH_SIZE)), "close": np.array([close])}

    def _decoded(self, part: Part) -> dict[str, NDArray[Any]]:
        decode = self._decoder.free if part.kind == FREE else self._decoder.constrained
        prefixes, started = self._prefixes(part), time.perf_counter()
        found = [decode(prefixes[start : start + BATCH_SIZE]) for start in range(0, len(prefixes), BATCH_SIZE)]
        cost = np.array([sum(some.calls for some in found), time.perf_counter() - started])
        places: dict[tuple[int, ...], int] = {}
        answer = [places.setdefault(tuple(tokens), len(places)) for some in found for tokens in some.tokens]
        return {
            "answer": np.array(answer, np.int32),
            "tokens": np.array([token for tokens in places for token in tokens], np.int32),
            "lengths": np.array([len(tokens) for tokens in places], np.int32),
            "by_field": np.concatenate([some.by_field for some in found]),
            "cost": cost,
        }

    def _prefixes(self, part: Part) -> Prefixes:
        if part.split != OTHERS:
            return [self._examples(part.split).prefix(i) for i in range(part.start, part.stop)]
        model, compiled = self._student
        rows = [text_row(i, text) for i, text in enumerate(part.texts)]
        return prefixes_of(model, compiled, list(filter_rows(rows, compiled.task.comments, compiled.tokenizer)))


def read_decoded(work: Work, parts: Sequence[Part]) -> tuple[Decoded, float]:
    """What parts have decoded, and the seconds that it took one worker; equal answers are one and the same list."""
    known: dict[tuple[int, ...], list[int]] = {}
    tokens, by_field, cost = [], [], np.zeros(2)
    for part in parts:
        found = storage.read_tensors(work.path(part), DECODED)
        each = [row.tolist() for row in np.split(found["tokens"], np.cumsum(found["lengths"])[:-1])]
        answers = [known.setdefault(tuple(answer), answer) for answer in each]
        tokens += [answers[place] for place in found["answer"]]
        by_field.append(found["by_field"])
        cost += found["cost"]
    return Decoded(tokens, np.concatenate(by_field), int(cost[0])), float(cost[1])


def read_measured(work: Work, parts: Sequence[Part]) -> tuple[NDArray[np.float64], int]:
    """The sums of all parts, see `step_sums`, and how many of the answers in the shards are close, see `close_answers`."""
    found = [storage.read_tensors(work.path(part), MEASURED) for part in parts]
    return np.sum([some["sums"] for some in found], 0), int(sum(some["close"][0] for some in found))
