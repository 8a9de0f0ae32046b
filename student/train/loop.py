"""A training from its first step to its last, or from where it was saved: one worker's part, without Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import require_same
from student.config import StudentConfig, TrainConfig
from student.data.examples import Batch, Examples, columns_of, open_examples, student_examples
from student.data.unpack import TRAIN, VALIDATION, token_counts
from student.model.checkpoint import WEIGHTS, load_student, load_tensors
from student.model.model import Student, embedding_rows
from student.model.pretrained import load_pretrained, pretrained_folder, reader_shape
from student.model.reader import Pretrained
from student.model.shape import Shape
from student.prune.parent import open_parent, parent_folder
from student.train.average import Average
from student.train.losses import Loss
from student.train.order import Order, parts
from student.train.strategy import State, make_strategy
from student.train.trainer import Sums, Totals, Trainer, means

GRADIENTS_EVERY = 100  # steps between two looks at the gradient of each term, which cost a forward pass
MEASURE_BATCH = 128


@dataclass(frozen=True)
class Training:
    """What every worker needs.

    Attributes:
        shape: of the student.
        rows: int32 [V], the embedding's row of each id.
        config: of the training.
        source: folder of the model that the student's reader was, pretrained.
    """

    shape: Shape
    rows: NDArray[np.int32]
    config: TrainConfig
    source: str | None = None

    def student(self) -> Student:
        """The student before its first step."""
        student = Student(self.shape, self.rows)
        if self.source and isinstance(student.reader, Pretrained):
            load_pretrained(student.reader, self.source)
        if self.config.init:
            student.load_state_dict(load_tensors(storage.join(self.config.init, WEIGHTS)))
        return student

    @staticmethod
    def of(student: StudentConfig, config: TrainConfig, shards: Shards) -> Training:
        """The training of a student on an extraction.

        Raises:
            UserError: the shards hold too little, or the configuration does not fit them.
        """
        Loss(config)  # better refused now than by every worker
        if config.hidden:
            parent_folder(config.init)
        if config.init:
            return Training._from(config.init, student, config, shards)
        compiled = shards.compiled
        source = pretrained_folder(student.reader)
        reader = reader_shape(student, source)
        comments = open_examples(shards, TRAIN, student.sequence).columns["comment"]
        counts = token_counts(comments[:0] if reader else comments, compiled.tokenizer.size)
        rows = embedding_rows(counts, np.union1d(compiled.automaton.tokens, compiled.separator))
        shape = Shape(
            input_vocabulary=compiled.tokenizer.size,
            embeddings=int(rows.max()) + 1,
            output_vocabulary=compiled.watched.size + config.tail,
            context=reader.most_vectors + compiled.automaton.longest - 1 if reader else compiled.context,
            separator=() if reader else None,
            reader=reader,
            **student.sizes(),
        )
        return Training(shape, rows, config.with_batch(source is not None), source)

    @staticmethod
    def _from(folder: str, student: StudentConfig, config: TrainConfig, shards: Shards) -> Training:
        """A training that starts from a student, whose shape it has."""
        model, compiled = load_student(folder)
        require_same(compiled.hashes, shards.compiled.hashes, folder, shards.folder)
        if model.shape.output_vocabulary != compiled.watched.size + config.tail:
            raise UserError(
                f"train.tail is {config.tail}, but the student in {folder} was not made so: leave it as it was there"
            )
        student_examples(shards, TRAIN, model)
        config = config.with_batch(isinstance(model.reader, Pretrained))
        here = config.model_copy(update={"init": storage.absolute(folder)})  # workers run in other folders
        return Training(replace(model.shape, dropout=student.dropout), model.rows.numpy(), here)


@dataclass
class Position:
    """Where a training is.

    Attributes:
        step: steps taken.
        history: the measures of each whole epoch.
        totals: of the epoch under way.
        seconds: spent so far.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    totals: Totals = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingReport:
    """Measures of the steps since the last report; at an epoch's end, of the epoch and the validation split too."""

    step: int
    row: dict[str, float]
    epoch_ended: bool


class Loop:
    """One worker's training."""

    def __init__(
        self, training: Training, shards: Shards, rank: int = 0, workers: int = 1, device: torch.device | None = None
    ) -> None:
        config, self.device = training.config, device or torch.device("cpu")
        self._config, self._rank, self._workers = config, rank, workers
        torch.manual_seed(config.seed)
        student = training.student()
        self._train = student_examples(shards, TRAIN, student)
        self.validation = student_examples(shards, VALIDATION, student)
        self.constants = {
            name: buffer for name, buffer in student.state_dict().items() if buffer.dtype in (torch.int32, torch.uint8)
        }
        self._order = Order(self._train.lengths, config)
        self._strategy = make_strategy(student, config, self.device)
        parent = open_parent(config.init, student, shards) if config.hidden else None
        loss = Loss(config, token_weights(self._train, config.balance, self.device))
        steps = self._order.steps * config.epochs
        self._average = Average(steps)
        self._trainer = Trainer(self._strategy, config, training.shape, steps, self.device, loss, parent)
        self.position = Position()
        self._counted = time.perf_counter()

    def go_on_from(self, state: State, position: Position) -> None:
        """Takes up a training where it was saved."""
        self._strategy.load(state, position.step)
        if position.step >= self._average.every:
            self._average.weights = {name: mean.clone() for name, mean in state.average.items()}
        self.position, self._trainer.step_index = position, position.step

    def state(self) -> State:
        """Weights, their average and moments; all workers must ask."""
        state = self._strategy.state()
        return replace(state, average=self._average.weights or state.weights)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student has the average of its latest weights; all workers must ask."""
        own = {name: weight.clone() for name, weight in self._strategy.weights().items()}
        self._strategy.put(self._average.weights or own)
        yield
        self._strategy.put(own)

    def seconds_an_epoch(self, steps: int) -> float:
        """What an epoch takes here, by its first few steps; they are taken, so that the loop is of no further use."""
        weight, some = self._config.forced_weight, list(itertools.islice(self._order.epoch(1), steps))
        for _ in range(2):  # kernels are made for each length when it is first seen: the second time counts
            started = time.perf_counter()
            for indices in some:
                batch = self._train.batch(indices).to(self.device)
                float(self._trainer.step([batch], self._train.weight(indices, weight), Sums()))
        return self._order.steps * (time.perf_counter() - started) / len(some)

    def run(self) -> Iterator[TrainingReport]:
        """Trains to the end. Between two reports the training may be saved, or left."""
        while len(self.position.history) < self._config.epochs:
            yield from self._epoch(len(self.position.history) + 1)

    def _epoch(self, epoch: int) -> Iterator[TrainingReport]:
        """What is left of one epoch, and the measures of the validation split."""
        steps, started, window = self._order.steps, time.perf_counter(), _Window()
        done = self.position.step - (epoch - 1) * steps
        for indices, share in self._batches(epoch, done):
            norm = self._trainer.step(share, self._train.weight(indices, self._config.forced_weight), window.sums)
            window.examples += len(indices)
            self.position.step += 1
            if self.position.step % self._average.every == 0:
                self._average.look(self.position.step, self._strategy.weights())
            if self.position.step == epoch * steps:
                break
            if self.position.step % self._config.log_every == 0:
                yield TrainingReport(self.position.step, self._window_ended(window, share[0], norm), epoch_ended=False)
                window = _Window()
        last = self._window_ended(window, share[0], norm)
        speed = {"epoch_examples_per_second": (steps - done) * self._config.step_examples / (time.perf_counter() - started)}
        row = {"epoch": float(epoch)} | speed | {f"train_{name}": value for name, value in means(self.position.totals).items()}
        with self.averaged():
            row |= {f"validation_{name}": value for name, value in self._trainer.measure(self._held_out()).items()}
        row["seconds"] = self._count_seconds()
        self.position.history.append(dict(row))
        self.position.totals = {}
        yield TrainingReport(self.position.step, last | row, epoch_ended=True)

    def _window_ended(self, window: _Window, batch: Batch, norm: torch.Tensor) -> dict[str, float]:
        """The measures of the steps since the last report, which join the epoch's."""
        self._count_seconds()
        totals, trainer = window.sums.totals(), self._trainer
        self.position.totals = {name: self.position.totals.get(name, 0.0) + value for name, value in totals.items()}
        row = means(totals) | trainer.schedule | {"gradient_norm": float(norm)} | window.speed()
        if self.position.step % GRADIENTS_EVERY < self._config.log_every:
            row |= trainer.term_gradients(batch)
        return row

    def _count_seconds(self) -> float:
        """What the training has taken so far."""
        before, self._counted = self._counted, time.perf_counter()
        self.position.seconds += self._counted - before
        return self.position.seconds

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[NDArray[np.int64], list[Batch]]]:
        """Each step's examples, and this worker's share of them; made and moved to the device while the step before runs."""

        def make(indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Batch]]:
            share = parts(indices, self._rank, self._workers, self._config.accumulation)
            return indices, [self._train.batch(part).to(self.device) for part in share]

        with ThreadPoolExecutor(1, "batches") as pool:
            coming = (pool.submit(make, indices) for indices in itertools.islice(self._order.epoch(epoch), done, None))
            following = next(coming, None)
            while following is not None:
                current, following = following, next(coming, None)
                yield current.result()

    def _held_out(self) -> Iterator[Batch]:
        """This worker's share of the validation split; with fewer examples than workers, some are shared.

        Every worker has as many batches: under ZeRO-3 they gather weights together for each.
        """
        mine = np.arange(self._rank % len(self.validation), len(self.validation), self._workers)
        mine = mine[np.argsort(self.validation.lengths[mine], kind="stable")]
        count = -(-len(self.validation) // (self._workers * MEASURE_BATCH))
        for part in np.array_split(mine, count):
            yield self.validation.batch(part).to(self.device)


class _Window:
    """The steps since the last report."""

    def __init__(self) -> None:
        self.sums, self.examples, self._started = Sums(), 0, time.perf_counter()

    def speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        return {"examples_per_second": self.examples / seconds, "seconds_per_example": seconds / self.examples}


def token_weights(examples: Examples, balance: float, device: torch.device) -> torch.Tensor | None:
    """The weight of each watched token in cross-entropy: a power of its inverse frequency among the teacher's choices.

    Args:
        balance: the power; 0 weighs all alike, 1 gives every token the same sum of weights.

    Returns:
        float32 [W], with a mean of 1 over the choices; 1 for tokens never chosen. None where all weigh alike.
    """
    if not balance:
        return None
    automaton, watched = examples.compiled.automaton, examples.compiled.watched.size
    chosen = examples.columns["answer"][~automaton.forced[examples.columns["state"]]]
    counts_W = np.bincount(columns_of(examples.compiled, chosen), minlength=watched)
    weights_W = np.where(counts_W > 0, np.maximum(counts_W, 1.0) ** -balance, 0)
    weights_W *= counts_W.sum() / (weights_W @ counts_W)
    return torch.tensor(np.where(counts_W > 0, weights_W, 1), dtype=torch.float32, device=device)
