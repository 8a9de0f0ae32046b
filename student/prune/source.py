"""What students are cut from: a student, or a Gemma 3 model with the watched tokens alone for its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask, require_same
from pipeline.task.tokenization import load_teacher_tokenizer
from pipeline.teacher.model_files import absolute_model, fingerprint
from student.config import PruneConfig
from student.data.unpack import TRAIN, token_counts, unpack
from student.model.checkpoint import TRAINED, WEIGHTS, is_student, load_student, load_training
from student.model.gemma import gemma_shape, load_gemma
from student.model.model import Student, embedding_rows
from student.model.shape import Shape


@dataclass(frozen=True)
class PruneSource:
    """A trained model, without its weights.

    Attributes:
        place: a student's folder, or a Gemma 3 model by name or path.
        shape: as a student.
        revision: of a model on the Hub.
        rows_V: int32, the embedding's row of each id; None for a student, which has its own.
    """

    place: str
    shape: Shape
    revision: str | None = None
    rows_V: NDArray[np.int32] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Which model it is."""
        if self.rows_V is None:
            return {"student": self.place, "content": storage.fingerprint(storage.join(self.place, WEIGHTS))}
        return {"model": self.place, "content": fingerprint(self.place), "revision": self.revision}

    @property
    def run(self) -> str | None:
        """Of a trained student, its run in MLflow."""
        if self.rows_V is not None or not storage.exists(storage.join(self.place, TRAINED)):
            return None
        return load_training(self.place).mlflow.run

    def load(self, watched_W: NDArray[np.int32]) -> Student:
        """Its weights too, in float32 and evaluation mode."""
        if self.rows_V is None:
            return load_student(self.place)[0]
        return load_gemma(self.place, self.shape, self.rows_V, watched_W, self.revision)


def open_source(config: PruneConfig, sequence: str, shards: Shards) -> PruneSource:
    """The configured source.

    Raises:
        UserError: there is no such model, or it does not fit the shards.
    """
    if config.source is None:
        raise UserError("nothing to cut from: name a student's folder, or a Gemma 3 model, with --from")
    folder = storage.absolute(config.source)
    if is_student(folder):
        model, compiled = load_student(folder)
        require_same(compiled.hashes, shards.compiled.hashes, config.source, shards.folder)
        if model.reader is not None:
            raise UserError(f"the student in {config.source} has a reader of its own: only students without one can be cut")
        return PruneSource(folder, model.shape)
    return _gemma(config, sequence, shards)


def _gemma(config: PruneConfig, sequence: str, shards: Shards) -> PruneSource:
    """A Gemma 3 model, whose embedding keeps the rows of the ids in the training comments, the prompt and the answers."""
    model, compiled = absolute_model(str(config.source)), shards.compiled
    opening, separator = _prompt(config, model, compiled)
    counts = token_counts(unpack(shards)[TRAIN]["comment"], compiled.tokenizer.size)
    always = np.unique([*compiled.automaton.tokens, *opening, *separator]).astype(np.int32)
    rows_V = embedding_rows(counts, always, least=1)
    shape = gemma_shape(
        model,
        config.revision,
        input_vocabulary=compiled.tokenizer.size,
        embeddings=int(rows_V.max()) + 1,
        output_vocabulary=compiled.watched.size,
        context=len(opening) + compiled.task.comments.max_tokens + len(separator) + compiled.automaton.longest - 1,
        sequence=sequence,
        opening=tuple(opening),
        separator=tuple(separator),
    )
    return PruneSource(model, shape, config.revision, rows_V)


def _prompt(config: PruneConfig, model: str, compiled: CompiledTask) -> tuple[list[int], list[int]]:
    """Ids before every comment, and between it and the answer.

    Raises:
        UserError: the model has another tokenizer than the teacher.
    """
    tokenizer = load_teacher_tokenizer(model, config.revision)
    require_same({"tokenizer": tokenizer.hash}, {"tokenizer": compiled.tokenizer.hash}, model, "the shards")
    if config.prompt == "bare":
        return [], compiled.separator
    prompt = tokenizer.prompt(compiled.task)
    before, after = tokenizer.encode([prompt.before, prompt.after])
    return prompt.head + before, after + prompt.tail
