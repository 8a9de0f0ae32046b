"""What an export answers to the test comments, each form run as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.comments.reading import Comment
from pipeline.task.task import Task
from pipeline.task.values import Values
from student.data.answers import parse_all
from student.decode.answerer import Answerer
from student.export.folder import ExportedStudent, numbered_answers
from student.export.onnx import run_onnx

TOLERANCE = 1e-4  # of probabilities

START = """
import json, sys
from pathlib import Path
model, given, got = sys.argv[1:]
comments = json.loads(Path(given).read_text())
"""
PORTABLE = """
sys.path.insert(0, model)
sys.modules.update(dict.fromkeys(("pipeline", "cluster", "tune", "pydantic", "pyarrow")))  # importing them fails
import answer
student = answer.load(model)
def each(comment):
    try:
        return student.answer(comment)
    except answer.RefusedError:
        return None
answers = list(map(each, comments))
"""
PYFUNC = """
import mlflow.pyfunc, pandas
found = mlflow.pyfunc.load_model(model).predict(pandas.DataFrame({"text": comments}, dtype=object))
pairs = zip(found["answer"], found["confidence"])
answers = [text and {"answer": json.loads(text), "confidence": confidence} for text, confidence in pairs]
"""
END = """
Path(got).write_text(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answered:
    """N answers.

    Attributes:
        values: None for a comment that was refused.
        confidence: float64 [N].
        margin: float64 [N], how far the second likeliest token was behind at the closest choice; None where it is not told.
    """

    values: list[Values | None]
    confidence: NDArray[np.float64]
    margin: NDArray[np.float64] | None = None


def by_pytorch(source: ExportedStudent, rows: list[Comment]) -> Answered:
    """What Retort itself answers."""
    answers = Answerer(source.model, source.compiled, source.temperatures).answer(rows)
    return Answered([tuple(a.values.values()) for a in answers], np.array([a.confidence for a in answers]))


def by_folder(folder: str, texts: list[str], task: Task) -> Answered:
    """What `answer.py` answers, in a process that cannot import Retort."""
    return _elsewhere(PORTABLE, folder, texts, task)


def by_mlflow(folder: str, texts: list[str], task: Task) -> Answered:
    """What MLflow's generic Python model answers, in a process of its own."""
    return _elsewhere(PYFUNC, folder, texts, task)


def _elsewhere(script: str, model: str, texts: list[str], task: Task) -> Answered:
    with tempfile.TemporaryDirectory() as scratch:
        given, got = f"{scratch}/given.json", f"{scratch}/got.json"
        with open(given, "w") as file:
            json.dump(texts, file)
        command = [sys.executable, "-P", "-c", START + script + END, model, given, got]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)  # noqa: S603
        if ended.returncode:
            raise UserError(f"the export does not run by itself:\n{ended.stderr.strip()}")
        with open(got) as file:
            return _read(task, json.load(file))


def _read(task: Task, answers: list[dict[str, Any] | None]) -> Answered:
    values = [None if answer is None else task.fit(answer["answer"]) for answer in answers]
    return Answered(values, np.array([0.0 if answer is None else answer["confidence"] for answer in answers]))


def by_onnx(path: str, source: ExportedStudent, rows: list[Comment], batch_size: int) -> Answered:
    """What ONNX Runtime answers.

    Raises:
        UserError: the graph numbers an answer otherwise than the list.
    """
    numbered = [source.compiled.task.fit(answer) for answer in numbered_answers(source)] if source.numbered else []
    values: list[Values | None] = []
    confidence, margin = [], []
    for found in run_onnx(path, source.prefixes(rows), batch_size):
        batch = parse_all(source.compiled, [source.choices.spell(trail) for trail in found.trails])
        if found.numbers is not None and batch != [numbered[number] for number in found.numbers]:
            raise UserError("the ONNX graph numbers answers otherwise than their list")
        values += batch
        confidence.append(found.confidence)
        margin.append(found.margin)
    return Answered(values, np.concatenate(confidence), np.concatenate(margin))


def verify(student: Answered, graph: Answered) -> None:
    """Refuses a graph that does not answer as the student does.

    Where two tokens are as likely to the last digits, either answer is right.

    Raises:
        UserError: with how many answers or probabilities are off.
    """
    same = np.array([one == other for one, other in zip(student.values, graph.values, strict=True)], bool)
    wrong = ~same if graph.margin is None else ~same & (graph.margin > TOLERANCE)
    off = same & (np.abs(student.confidence - graph.confidence) > TOLERANCE)
    if wrong.any() or off.any():
        raise UserError(
            f"the ONNX graph is not the student: of {len(same):,} test comments {wrong.sum():,} are answered otherwise, and "
            f"{off.sum():,} with a confidence more than {TOLERANCE} off"
        )
