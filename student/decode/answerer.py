"""Kept comments through a student to answers: what prediction, the service and the MLflow model have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.comments.reading import Comment
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Scalar, Value, Values
from student.decode.decode import Decoder, Prefixes
from student.decode.familiarity import Familiarity
from student.model.checkpoint import load_student, load_temperatures
from student.model.model import Student

BATCH, VECTORS = 256, 1024  # comments decoded together; the second where a reader makes one vector of each (docs/log.md)
# names of thresholds beside the fields': the confidence in all, in a field with those before it, and how familiar a text is
WHOLE, UP_TO, FAMILIARITY = "whole answer", "answer up to ", "familiarity of the text"
TOLERANCE = 1e-9  # of thresholds, which are made from rounded confidences


def confidences(by_field: NDArray[np.float64], fields: list[str]) -> dict[str, NDArray[np.float64]]:
    """The confidence in each field, in it together with those before it, and in the whole answer, by name: float64 [N] each.

    Args:
        by_field: [N, F], of each field given those before it. Confidences are rounded to six digits.
    """
    together = by_field.cumprod(1)
    named = {UP_TO + name: together[:, i] for i, name in enumerate(fields)} | {WHOLE: together[:, -1]}
    return {name: shares.round(6) for name, shares in (dict(zip(fields, by_field.T, strict=True)) | named).items()}


def prefixes_of(model: Student, compiled: CompiledTask, rows: list[Comment]) -> Prefixes:
    """What a student reads of rows that `filter_rows` kept."""
    if model.reader is not None:
        return model.reader.encode([row.text for row in rows])
    separator = compiled.separator if model.shape.separator is None else list(model.shape.separator)
    return [np.array(row.tokens + separator, np.int32) for row in rows]


@dataclass(frozen=True)
class Answer:
    """A valid answer of the task.

    Attributes:
        values: by field.
        confidence: product of the probabilities of the choices made, to six digits.
        value_probabilities: by field, of each allowed value in the task's order, to four digits, given the fields before it as
            answered; of a list, of each label to be in it; None where they were not asked for.
        unsure: whether the confidence in the whole answer, or in a field, or the text's familiarity, is below its threshold.
        familiarity: see `Familiarity.of`, to four digits; None where it has no threshold.
    """

    values: dict[str, Value]
    confidence: float
    value_probabilities: dict[str, list[float]] | None = None
    unsure: bool = False
    familiarity: float | None = None

    def probabilities(self, fields: dict[str, list[Scalar]]) -> dict[str, list[dict[str, Scalar]]] | None:
        """The probabilities beside their values: a list for each field, as JSON's keys could not tell true from "true"."""
        if self.value_probabilities is None:
            return None
        return {
            name: [
                {"value": value, "share": share} for value, share in zip(values, self.value_probabilities[name], strict=True)
            ]
            for name, values in fields.items()
        }


class Answerer:
    """Decodes answers under the automaton. One thread may use it at a time.

    Args:
        model: in evaluation mode.

    Attributes:
        thresholds: the least confidence with which an answer is not unsure, by its name, see `confidences`; and the least
            familiarity, which then is what it is measured by.
    """

    def __init__(
        self,
        model: Student,
        compiled: CompiledTask,
        temperatures: dict[str, float] | None = None,
        thresholds: dict[str, float] | None = None,
        familiarity: Familiarity | None = None,
    ) -> None:
        self.compiled = compiled
        self.thresholds, self._familiarity = thresholds or {}, familiarity
        self._decoder = Decoder(model, compiled, temperatures)
        self._model = model
        self._known: dict[tuple[int, ...], Values] = {}

    @staticmethod
    def load(folder: str, weights: str = "float32", thresholds: dict[str, float] | None = None) -> Answerer:
        """A student's, calibrated if it was evaluated; on a GPU where there is one.

        Args:
            weights: `float32` or `bf16`.
            thresholds: see `Answerer`.

        Raises:
            UserError: there is no student in the folder, or it is damaged; or nothing says how familiar texts are to it.
        """
        familiarity = Familiarity.load(folder) if FAMILIARITY in (thresholds or {}) else None
        model, compiled = load_student(folder, "cuda" if torch.cuda.is_available() else "cpu")
        model = model.halved() if weights == "bf16" else model
        return Answerer(model, compiled, load_temperatures(folder, compiled.task), thresholds, familiarity)

    def answer(self, rows: list[Comment], value_probabilities: bool = False) -> list[Answer]:
        """The answers to rows that `filter_rows` kept, in their order."""
        answers: dict[int, Answer] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # alike in length, they need little padding
        reader = self._model.shape.reader
        size = VECTORS if reader is not None and reader.pools else BATCH
        for start in range(0, len(rows), size):
            part = order[start : start + size]
            answers |= zip(part, self._answer([rows[i] for i in part], value_probabilities), strict=True)
        return [answers[i] for i in range(len(rows))]

    def _answer(self, rows: list[Comment], value_probabilities: bool) -> list[Answer]:
        decoded = self._decoder.constrained(prefixes_of(self._model, self.compiled, rows), value_probabilities)
        values = [dict(zip(self.compiled.task.fields, self._read(tokens), strict=True)) for tokens in decoded.tokens]
        sure = confidences(decoded.by_field, list(self.compiled.task.fields))
        if self._familiarity:
            sure[FAMILIARITY] = self._familiarity.of([row.text for row in rows], sure[WHOLE]).round(4)
        familiar: list[float | None] = sure[FAMILIARITY].tolist() if self._familiarity else [None] * len(rows)
        unsure = np.zeros(len(rows), np.bool_)
        for name, least in self.thresholds.items():
            unsure |= sure[name] < least - TOLERANCE
        each: list[dict[str, list[float]] | None] = [None] * len(rows)
        if decoded.value_probabilities is not None:
            by_value = {name: share.round(4).tolist() for name, share in decoded.value_probabilities.items()}
            each = [{name: share[i] for name, share in by_value.items()} for i in range(len(rows))]
        return [Answer(*parts) for parts in zip(values, sure[WHOLE].tolist(), each, unsure.tolist(), familiar, strict=True)]

    def _read(self, tokens: list[int]) -> Values:
        key = tuple(tokens)
        if key not in self._known:  # comments are many, answers few
            values = self.compiled.task.parse(self.compiled.tokenizer.decode(tokens))
            if values is None:
                raise AssertionError("an answer decoded under the automaton does not fit the task")
            self._known[key] = values
        return self._known[key]
