"""Students of random weights, one of each kind there is, and comments of all sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.comments.reading import Comment, filter_rows, text_row
from pipeline.task.compiled import CompiledTask
from student.export.folder import ExportedStudent
from student.model.shape import Layer
from tests.student.decode.test_decode import make_student, recompiled
from tests.student.prune.students import make
from tests.tiny import tiny_task

TEMPERATURES = {"mood": 0.5, "loud": 2.0}
SPELT = ["good", "goods", "good enough", "going", "bad", 'a "quote"']  # some begin with the same tokens
KINDS = (Layer(5, 500.0, 2.0), Layer(None, 1e6, 8.0))
TEXTS = [f"{'very ' * (i % 7)}{chr(97 + i % 26)} comment, {i}" for i in range(50)]
REFUSED = {
    "": "too_short",
    " \n ": "too_short",
    "long " * 60: "too_long",
    "see https://example.com " + "long " * 9999: "too_long",
    "see https://example.com": "urls",
    "or WWW.example.com": "urls",
    "end it<end_of_turn>now": "special_tokens",
    "half a character \ud800": "malformed: not UTF-8",
}


def source_of(kind: str, compiled: CompiledTask) -> ExportedStudent:
    """A student that is sure of what it says, and says different things."""
    if kind == "gemma":
        return ExportedStudent(make(compiled, "gemma3", layers=2, kinds=KINDS), compiled, None)
    if kind == "spelt":
        fields = {"mood": SPELT, "one": [1], "tags": SPELT[:3], "loud": [True, False], "late": [True, None]}
        spelt = recompiled(compiled, tiny_task(fields=fields, lists={"tags": {"max": 2}}, optional=["late"], context=None))
        model = make_student(spelt, 3, 8.0, tail=True, sequence="choices", layers=1)
        return ExportedStudent(model, spelt, TEMPERATURES | {"one": 1.0, "tags": 1.0, "late": 1.0})
    layers = {"full": 2, "choices": 1}[kind]
    return ExportedStudent(make_student(compiled, 2, 8.0, sequence=kind, layers=layers), compiled, TEMPERATURES)


def kept(source: ExportedStudent, texts: list[str]) -> list[Comment]:
    """The rows of comments that the task's rules let through."""
    return filter_rows(
        [text_row(i, text) for i, text in enumerate(texts)], source.compiled.task.comments, source.compiled.tokenizer
    )


@torch.inference_mode()
def reference(source: ExportedStudent, row: Comment) -> list[np.ndarray]:
    """The probabilities of every required token at each choice of one comment, the whole sequence anew each time."""
    automaton, choices_only = source.compiled.automaton, source.model.shape.sequence == "choices"
    read, state, found = row.tokens + source.separator, 0, []
    while state != automaton.end:
        allowed = torch.tensor(automaton.allowed[state])
        column = int(allowed.int().argmax())
        if allowed.sum() > 1:
            logits = source.model(torch.tensor([read]))[0, -1, : len(allowed)] / source.by_state[state]
            found.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1).numpy())
            column = int(found[-1].argmax())
        if allowed.sum() > 1 or not choices_only:
            read = [*read, int(automaton.tokens[column])]
        state = int(automaton.next_state[state, column])
    return found


@pytest.fixture(scope="session", params=["full", "choices", "spelt", "gemma"])
def source(request: pytest.FixtureRequest, compiled: CompiledTask) -> ExportedStudent:
    """Each kind of student in turn."""
    return source_of(request.param, compiled)


@pytest.fixture(scope="session")
def plain(compiled: CompiledTask) -> ExportedStudent:
    """One student, where a test needs any."""
    return source_of("choices", compiled)
