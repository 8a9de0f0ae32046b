from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.automaton import compile_automaton
from pipeline.compiled import CompiledTask
from pipeline.task import Task
from pipeline.vocabulary import WatchedSet
from student.decode import Decoder
from student.model import Shape, Student
from tests.student.conftest import DEBUG
from tests.tiny import tiny_task


def prefixes(compiled: CompiledTask, count: int) -> list[np.ndarray]:
    texts = [f"comment {'very ' * (i % 7)}{i}\n\n" for i in range(count)]
    return [np.array(ids, np.int32) for ids in compiled.tokenizer.encode(texts)]


def greedy_reference(model: Student, compiled: CompiledTask, prefix: np.ndarray, free: bool) -> tuple[list[int], float]:
    """One comment, one token at a time, the whole sequence anew each time."""
    automaton, answer, state, confidence = compiled.automaton, [], 0, 1.0
    while len(answer) < automaton.longest and state != automaton.end:
        tokens = torch.tensor([[*prefix.tolist(), *answer]])
        logits = model(tokens)[0, -1]
        if not free:
            logits = logits[: len(automaton.tokens)].masked_fill(~torch.tensor(automaton.allowed[state]), -torch.inf)
        column = int(logits.argmax())
        confidence *= float(logits.softmax(-1)[column])
        answer.append(int(compiled.watched.tokens[column]))
        if free and answer[-1] == compiled.tokenizer.end_id:
            break
        if not free:
            state = int(automaton.next_state[state, column])
    return answer, confidence


@pytest.mark.parametrize("free", [False, True])
@torch.inference_mode()
def test_decoding_equals_a_plain_loop(model: Student, compiled: CompiledTask, free: bool) -> None:
    given = prefixes(compiled, 12)
    decoder = Decoder(model, compiled)
    decoded = decoder.free(given) if free else decoder.constrained(given)
    for prefix, answer, confidence in zip(given, decoded.tokens, decoded.confidence, strict=True):
        expected, sure = greedy_reference(model, compiled, prefix, free)
        assert answer == expected
        assert confidence == pytest.approx(sure, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 30.0]))
def test_an_untrained_student_always_answers_validly(compiled: CompiledTask, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    shape = Shape.of(DEBUG, compiled.tokenizer.size, compiled.watched.size, compiled.task.context)
    student = Student(shape).eval()
    with torch.no_grad():
        student.head.weight.mul_(scale)
    for answer in Decoder(student, compiled).constrained(prefixes(compiled, 8)).tokens:
        assert compiled.automaton.walk(answer)[-1] == compiled.automaton.end
        assert compiled.task.parse(compiled.tokenizer.decode(answer)) is not None


def recompiled(compiled: CompiledTask, task: Task) -> CompiledTask:
    automaton = compile_automaton(task, compiled.tokenizer)
    return CompiledTask(task, compiled.tokenizer, automaton, WatchedSet(automaton.tokens, len(automaton.tokens)))


def test_a_language_of_one_answer_costs_no_model_call(compiled: CompiledTask) -> None:
    single = recompiled(compiled, tiny_task(fields={"mood": ["good"]}))
    student = Student(Shape.of(DEBUG, single.tokenizer.size, single.watched.size, 90)).eval()
    decoded = Decoder(student, single).constrained(prefixes(single, 3))
    assert decoded.calls == 0
    assert [single.tokenizer.decode(answer) for answer in decoded.tokens] == ['{"mood": "good"}'] * 3


def test_choices_are_few_model_calls(model: Student, compiled: CompiledTask) -> None:
    decoded = Decoder(model, compiled).constrained(prefixes(compiled, 4))
    assert decoded.calls <= 4 < min(map(len, decoded.tokens))
