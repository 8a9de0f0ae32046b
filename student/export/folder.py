"""The folder that answers without Retort: the student's own files, three of its modules, and a plain loader."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.comments.reading import Comment
from pipeline.task.compiled import CompiledTask
from student.decode.choices import Choices
from student.decode.decode import Prefixes
from student.decode.fields import Fields
from student.export.graph import answers_before, choice_states
from student.model.checkpoint import load_student, load_temperatures, save_student, save_temperatures
from student.model.model import Student

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "model/__init__.py",
    "model/model.py",
    "model/cache.py",
    "model/reader.py",
    "model/shape.py",
)
ANSWER, RULES, ANSWERS = "answer.py", "rules.json", "answers.json"
LISTED = 100_000  # answers: a task of more has no list of them


@dataclass(frozen=True)
class ExportedStudent:
    """What is exported.

    Attributes:
        model: the student, in evaluation mode, on the CPU.
        compiled: the task it was trained for.
        temperatures: by field; None where it was not calibrated.
    """

    model: Student
    compiled: CompiledTask
    temperatures: dict[str, float] | None

    @staticmethod
    def load(folder: str) -> ExportedStudent:
        """Reads a student's folder.

        Raises:
            UserError: there is no student in the folder, or it is damaged.
        """
        model, compiled = load_student(folder)
        return ExportedStudent(model, compiled, load_temperatures(folder, compiled.task))

    def save(self, folder: str) -> None:
        """Writes the student's own files."""
        save_student(folder, self.model, self.compiled)
        if self.temperatures is not None:
            save_temperatures(folder, self.temperatures)

    @property
    def separator(self) -> list[int]:
        """Ids that the student reads between comment and answer."""
        given = self.model.shape.separator
        return self.compiled.separator if given is None else list(given)

    def prefixes(self, rows: list[Comment]) -> Prefixes:
        """What the student reads of comments: their tokens and the separator, or its reader's ids."""
        if self.model.reader is not None:
            return self.model.reader.encode([row.text for row in rows])
        return [np.array(row.tokens + self.separator, np.int32) for row in rows]

    @cached_property
    def choices(self) -> Choices:
        """The automaton's, as the student reads answers."""
        return Choices(self.compiled, forced_read=self.model.shape.sequence == "full")

    @cached_property
    def by_state(self) -> NDArray[np.float32]:
        """What the logits at each state are divided by: [S]."""
        return Fields(self.compiled, self.choices).temperatures(self.temperatures)

    @property
    def numbered(self) -> bool:
        """Whether the task's answers are few enough to be listed."""
        return self.compiled.task.outputs <= LISTED


def write_folder(folder: str, source: ExportedStudent) -> None:
    """Writes all that `answer.py` reads, and `answer.py`, to a folder on a disk."""
    source.save(folder)
    storage.write_json(f"{folder}/{RULES}", rules(source))
    storage.write_text(f"{folder}/{ANSWER}", (ROOT / "export" / ANSWER).read_text("utf-8"))
    for name in ("__init__.py", *MODULES):
        storage.write_text(f"{folder}/student/{name}", (ROOT / name).read_text("utf-8"))
    if source.numbered:
        storage.write_json(f"{folder}/{ANSWERS}", numbered_answers(source))


def rules(source: ExportedStudent) -> dict[str, Any]:
    """What `answer.py` knows of the task beside its files; temperatures by state, where they are not 1."""
    task = source.compiled.task
    return task.comments.model_dump() | {
        "max_characters": task.comments.max_tokens * source.compiled.tokenizer.characters_per_token,
        "separator": source.separator,
        "prefix": task.format.prefix,
        "suffix": task.format.suffix,
        "temperatures": {str(state): value for state, value in enumerate(source.by_state.tolist()) if value != 1},
    }


def numbered_answers(source: ExportedStudent) -> list[dict[str, Any]]:
    """Every answer of the task by field, at its number in the ONNX graph, see `answers_before`."""
    compiled, states = source.compiled, choice_states(source.choices)
    before = dict(zip(states.tolist(), answers_before(source.choices, states), strict=True))
    answers = list(compiled.task.answers())
    texts = compiled.tokenizer.encode([compiled.task.render(values) for values in answers])
    numbered: list[dict[str, Any]] = [{}] * len(answers)
    for values, ids in zip(answers, texts, strict=True):
        tokens = [*ids, compiled.tokenizer.end_id]
        passed = zip(compiled.automaton.walk(tokens), tokens, strict=False)  # the last state has no token
        number = sum(int(before[state][compiled.automaton.column[token]]) for state, token in passed if state in before)
        numbered[number] = compiled.task.nested(dict(zip(compiled.task.fields, values, strict=True)))
    return numbered
