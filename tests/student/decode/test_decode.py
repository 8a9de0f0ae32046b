from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import CompiledTask
from pipeline.task.task import Task
from pipeline.task.vocabulary import WatchedSet
from student.decode.decode import Decoder
from student.model.model import Student
from student.model.shape import Shape
from tests.student.conftest import DEBUG
from tests.tiny import tiny_task

SEQUENCES = ["full", "choices"]


def make_student(compiled: CompiledTask, seed: int = 0, scale: float = 1.0, tail: bool = False, **changes: Any) -> Student:
    """A student of random weights; scaled, it is sure of what it says and its answers differ."""
    torch.manual_seed(seed)
    ids = compiled.tokenizer.size
    about = DEBUG.sizes() | changes
    shape = Shape(ids, ids, compiled.watched.size + tail, compiled.context, **about)
    student = Student(shape, np.arange(ids, dtype=np.int32)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(scale if parameter.ndim == 2 else 1)
    return student


def prefixes(compiled: CompiledTask, count: int) -> list[np.ndarray]:
    texts = [f"comment {'very ' * (i % 7)}{i}\n\n" for i in range(count)]
    return [np.array(ids, np.int32) for ids in compiled.tokenizer.encode(texts)]


def greedy_reference(model: Student, compiled: CompiledTask, prefix: np.ndarray, free: bool) -> tuple[list[int], float, int]:
    """One comment, one token at a time, the whole sequence anew each time; also how often a token was chosen."""
    automaton, watched, choices_only = compiled.automaton, compiled.watched.size, model.shape.sequence == "choices"
    answer: list[int] = []
    read, state, confidence, asked = prefix.tolist(), 0, 1.0, 0
    while len(answer) < automaton.longest and state != automaton.end:
        allowed = automaton.allowed[state]
        if allowed.sum() == 1 and not (free and not choices_only):  # nothing to ask
            column = int(allowed.argmax())
            answer.append(int(automaton.tokens[column]))
            read += [] if choices_only else answer[-1:]
            state = int(automaton.next_state[state, column])
            continue
        logits = model(torch.tensor([read]))[0, -1, :watched]
        if not free:
            logits = logits[: len(automaton.tokens)].masked_fill(~torch.tensor(allowed), -torch.inf)
        column = int(logits.argmax())
        asked += 1
        confidence *= float(logits.softmax(-1)[column])
        answer.append(int(compiled.watched.tokens[column]))
        read.append(answer[-1])
        if free and not choices_only:
            if answer[-1] == compiled.tokenizer.end_id:
                break
        elif column >= len(automaton.tokens) or not allowed[column]:
            break
        else:
            state = int(automaton.next_state[state, column])
    return answer, confidence, asked


def assert_decodes(model: Student, compiled: CompiledTask, count: int, free: bool) -> None:
    given, decoder = prefixes(compiled, count), Decoder(model, compiled)
    decoded = decoder.free(given) if free else decoder.constrained(given)
    asked = []
    for prefix, answer, confidence in zip(given, decoded.tokens, decoded.confidence, strict=True):
        expected, sure, times = greedy_reference(model, compiled, prefix, free)
        assert answer == expected
        assert confidence == pytest.approx(sure, rel=1e-3)
        asked.append(times)
    assert decoded.calls == max(asked)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("tail", [False, True])
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 8.0]))
@torch.inference_mode()
def test_decoding_equals_a_plain_loop(
    compiled: CompiledTask, free: bool, sequence: str, tail: bool, seed: int, scale: float
) -> None:
    assert_decodes(make_student(compiled, seed, scale, tail, sequence=sequence), compiled, 9, free)


@torch.inference_mode()
def test_random_students_differ_in_what_they_answer(compiled: CompiledTask) -> None:
    """So that equality with the loop above says something."""
    answers = set()
    for seed in range(6):
        decoded = Decoder(make_student(compiled, seed, 8.0, sequence="choices"), compiled).constrained(prefixes(compiled, 9))
        answers |= {tuple(answer) for answer in decoded.tokens}
    assert len(answers) >= 4


@pytest.mark.parametrize("sequence", SEQUENCES)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 30.0]))
def test_an_untrained_student_always_answers_validly(compiled: CompiledTask, sequence: str, seed: int, scale: float) -> None:
    student = make_student(compiled, seed, scale, sequence=sequence)
    for answer in Decoder(student, compiled).constrained(prefixes(compiled, 8)).tokens:
        assert compiled.automaton.walk(answer)[-1] == compiled.automaton.end
        assert compiled.task.parse(compiled.tokenizer.decode(answer)) is not None


def bent(compiled: CompiledTask, column: int, sequence: str, tail: bool = False) -> Student:
    """A student that always prefers one column of its output."""
    student = make_student(compiled, tail=tail, sequence=sequence)
    with torch.no_grad():
        student.embedding.weight[:, 0] = 100.0  # the first dimension is large at every position
        student.head.weight.zero_()
        student.head.weight[column, 0] = 10.0
    return student


def test_a_free_student_of_choices_breaks_off_where_it_leaves_the_automaton(compiled: CompiledTask) -> None:
    automaton, auxiliary = compiled.automaton, compiled.watched.size - 1
    for column in (auxiliary, automaton.column[compiled.tokenizer.end_id]):
        decoded = Decoder(bent(compiled, column, "choices"), compiled).free(prefixes(compiled, 5))
        assert decoded.calls == 1
        for answer in decoded.tokens:
            assert answer[-1] == compiled.watched.tokens[column]
            states = automaton.walk(answer[:-1])
            assert not automaton.forced[states[-1]]
            assert automaton.forced[states[:-1]].all()
            with pytest.raises(ValueError, match="not allowed"):
                automaton.walk(answer)


def test_a_free_student_of_whole_answers_goes_on_to_the_longest(compiled: CompiledTask) -> None:
    decoded = Decoder(bent(compiled, compiled.watched.size - 1, "full"), compiled).free(prefixes(compiled, 3))
    assert decoded.calls == compiled.automaton.longest
    assert [len(answer) for answer in decoded.tokens] == [compiled.automaton.longest] * 3


def test_a_free_student_of_whole_answers_stops_at_the_end_token(compiled: CompiledTask) -> None:
    end = compiled.automaton.column[compiled.tokenizer.end_id]
    decoded = Decoder(bent(compiled, end, "full"), compiled).free(prefixes(compiled, 3))
    assert (decoded.calls, decoded.tokens) == (1, [[compiled.tokenizer.end_id]] * 3)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_the_tail_is_never_chosen_and_takes_no_part_in_confidence(compiled: CompiledTask, sequence: str, free: bool) -> None:
    student = bent(compiled, compiled.watched.size, sequence, tail=True)
    prefix = torch.tensor(prefixes(compiled, 1)[0][None].astype(np.int64))
    assert student(prefix)[0, -1].argmax() == compiled.watched.size  # it would be
    twin = make_student(compiled, sequence=sequence)
    twin.load_state_dict({k: v[: compiled.watched.size] if k == "head.weight" else v for k, v in student.state_dict().items()})
    found, expected = (
        (decoder.free if free else decoder.constrained)(prefixes(compiled, 4))
        for decoder in (Decoder(student, compiled), Decoder(twin, compiled))
    )
    assert found.tokens == expected.tokens
    assert found.confidence == pytest.approx(expected.confidence)
    assert set(np.concatenate(found.tokens)) <= set(compiled.watched.tokens.tolist())


def recompiled(compiled: CompiledTask, task: Task) -> CompiledTask:
    automaton = compile_automaton(task, compiled.tokenizer)
    return CompiledTask(task, compiled.tokenizer, automaton, WatchedSet(automaton.tokens, len(automaton.tokens)))


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_language_of_one_answer_costs_no_model_call(compiled: CompiledTask, sequence: str) -> None:
    single = recompiled(compiled, tiny_task(fields={"mood": ["good"]}))
    decoded = Decoder(make_student(single, sequence=sequence), single).constrained(prefixes(single, 3))
    assert decoded.calls == 0
    assert [single.tokenizer.decode(answer) for answer in decoded.tokens] == ['{"mood": "good"}'] * 3


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_choices_are_few_model_calls(compiled: CompiledTask, sequence: str) -> None:
    decoded = Decoder(make_student(compiled, sequence=sequence), compiled).constrained(prefixes(compiled, 4))
    assert decoded.calls <= 4 < min(map(len, decoded.tokens))


@torch.inference_mode()
def test_a_student_of_choices_reads_no_forced_token(compiled: CompiledTask) -> None:
    """Unlike one of whole answers with the same weights, it answers alike whatever the forced tokens look like to it."""
    student = make_student(compiled, 3, 8.0, sequence="choices")
    whole = make_student(compiled, 3, 8.0, sequence="full")
    assert whole.shape == replace(student.shape, sequence="full")
    automaton = compiled.automaton
    chosen = {int(automaton.tokens[c]) for s in np.flatnonzero(~automaton.forced) for c in np.flatnonzero(automaton.allowed[s])}
    given = prefixes(compiled, 9)
    never_chosen = [int(t) for t in automaton.tokens if t not in chosen | {int(i) for prefix in given for i in prefix}]
    assert never_chosen
    before = [Decoder(model, compiled).constrained(given).confidence for model in (student, whole)]
    for model in (student, whole):
        model.embedding.weight[never_chosen] = 50.0 * torch.randn(len(never_chosen), model.shape.width)
    after = [Decoder(model, compiled).constrained(given).confidence for model in (student, whole)]
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.allclose(before[1], after[1])
