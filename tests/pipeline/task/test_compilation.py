from __future__ import annotations

import itertools
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.task import automaton as tables
from pipeline.task import compilation as module
from pipeline.task.automaton import Automaton, build
from pipeline.task.compilation import (
    check_sample,
    check_writable,
    compile_automaton,
    compose_answers,
    enumerate_answers,
)
from pipeline.task.task import Task
from pipeline.task.task_file import load_task
from pipeline.task.tokenization import TextTokenizer, load_teacher_tokenizer
from tests.conftest import RealCase

Tokens = tuple[int, ...]
ALPHABET = 'aab12 ",:\\{}é日😀\n▁'
property_test = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])


def make_task(
    fields: dict[str, Any], lists: dict[str, Any] | None = None, optional: list[str] | None = None, **format_: Any
) -> Task:
    content = {"name": "t", "instruction": "Judge.", "fields": fields, "lists": lists or {}, "optional": optional or []}
    content |= {"format": format_}
    return Task.model_validate(content | {"comments": {"min_tokens": 1, "max_tokens": 25}})


def nested_prefixes(word: str) -> list[Any]:
    return [word[: i + 1] for i in range(len(word))]


def kind_and_value(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value


scalars = st.one_of(
    st.text(ALPHABET, max_size=5),
    st.sampled_from(["positive", "negative", "neutral", "none", "joy", "love", "anger"]),
    st.integers(-3, 130),
    st.booleans(),
    st.none(),
    st.sampled_from([0.5, -1.5, 1e20]),
)
value_lists = st.one_of(
    st.lists(scalars, min_size=1, max_size=4, unique_by=kind_and_value),
    st.sampled_from(["abcd", "1234", "positive", 'a"b"c', "日本語"]).map(nested_prefixes),
    st.sampled_from([[1, 12, 123], [True, "true", 1, "1"], [False, None, "null"], ["e", "e ", "e\n"]]),
)
field_names = st.one_of(st.sampled_from(["sentiment", "tone", "a", "ab"]), st.text(ALPHABET, min_size=1, max_size=3))
formats = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from(["", "", "```json\n", " "]),
        "suffix": st.sampled_from(["", "", "\n```", "}"]),
        "indent": st.sampled_from([None, None, 0, 2]),
        "item_separator": st.sampled_from([", ", ",", " ,\n"]),
        "key_separator": st.sampled_from([": ", ":", " : "]),
    }
)
rules = st.fixed_dictionaries(
    {"min": st.integers(0, 1), "max": st.sampled_from([None, 1, 2, 3]), "order": st.sampled_from(["listed", "any"])}
)


@st.composite
def composed_tasks(draw: st.DrawFn) -> Task:
    fields = draw(st.dictionaries(field_names, value_lists, min_size=1, max_size=3))
    listed = [name for name in fields if draw(st.integers(0, 3)) == 0]
    optional = [name for name in fields if name not in listed and draw(st.integers(0, 3)) == 0]
    optional = optional[: len(fields) - 1]  # an object always has a member
    fields |= {name: [*fields[name], *[None] * (None not in fields[name])] for name in optional}
    return make_task(fields, {name: draw(rules) for name in listed}, optional, **draw(formats))


tasks = composed_tasks().filter(lambda task: task.outputs <= 300)


def brute_force(task: Task, tokenizer: TextTokenizer) -> set[Tokens]:
    """Every answer rendered and encoded by itself."""
    return {(*tokenizer.encode([task.render(answer)])[0], tokenizer.end_id) for answer in task.answers()}


def language_from(automaton: Automaton, state: int) -> set[Tokens]:
    """All ways from a state to the end, read off the tables alone."""
    if state == automaton.end:
        return {()}
    ways = [(int(t), int(s)) for t, s in zip(automaton.tokens, automaton.next_state[state], strict=True) if s >= 0]
    return {(token, *rest) for token, target in ways for rest in language_from(automaton, target)}


def same(a: Automaton, b: Automaton) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.next_state, b.next_state)


def compile_or_check_refusal(task: Task, tokenizer: TextTokenizer) -> Automaton | None:
    """The automaton, or None where some text of the task really does not survive the tokenizer."""
    try:
        return compile_automaton(task, tokenizer)
    except UserError:
        marks = [mark for name in task.lists for mark in task.list_marks(name)]
        texts = task.literals() + marks + list(itertools.chain.from_iterable(task.value_texts()))
        back = [tokenizer.decode(ids) for ids in tokenizer.encode(texts)]
        assert any(a.strip() != b.strip() for a, b in zip(texts, back, strict=True))
        return None


@property_test
@given(task=tasks, kind=st.sampled_from(["gemma", "byte_level", "metaspace"]))
def test_language_is_exactly_the_tokenizations_of_the_answers(
    tokenizers: dict[str, TextTokenizer], task: Task, kind: str
) -> None:
    automaton = compile_or_check_refusal(task, tokenizers[kind])
    event(f"{kind} {'compiled' if automaton else 'refused'}")
    if automaton is not None:
        language = brute_force(task, tokenizers[kind])
        assert language_from(automaton, 0) == language
        assert set(automaton.tokens.tolist()) == set(itertools.chain.from_iterable(language))


@property_test
@given(task=tasks, kind=st.sampled_from(["gemma", "byte_level", "metaspace"]))
def test_states_are_minimal_and_described_rightly(tokenizers: dict[str, TextTokenizer], task: Task, kind: str) -> None:
    automaton = compile_or_check_refusal(task, tokenizers[kind])
    if automaton is None:
        return
    languages = [frozenset(language_from(automaton, state)) for state in range(automaton.states)]
    assert len(set(languages)) == automaton.states  # no two states mean the same
    assert set(automaton.next_state[automaton.next_state >= 0].tolist()) == set(range(1, automaton.states))  # all reachable
    for state, language in enumerate(languages):
        assert automaton.forced[state] == (len({way[0] for way in language if way}) == 1)
        assert automaton.remaining[state] == max(map(len, language))
        targets = automaton.next_state[state][automaton.allowed[state]]
        assert (targets > state).all()
    assert automaton.longest == max(map(len, languages[0]))
    assert languages[automaton.end] == {()}


@property_test
@given(task=tasks, kind=st.sampled_from(["gemma", "byte_level"]))
def test_composing_gives_the_identical_automaton_or_advice(tokenizers: dict[str, TextTokenizer], task: Task, kind: str) -> None:
    tokenizer = tokenizers[kind]
    if compile_or_check_refusal(task, tokenizer) is None:
        return
    try:
        composed = build(compose_answers(task, tokenizer))
    except UserError as error:
        event(f"{kind} refused")
        assert "list fewer values" in str(error)  # noqa: PT017
        return
    event(f"{kind} composed {len(task.fields)} fields, {len(task.lists)} of them lists, {len(task.optional)} optional")
    whole = build([enumerate_answers(task, tokenizer)])
    assert language_from(composed, 0) == language_from(whole, 0)
    assert composed.states == whole.states  # so it is minimal too


@pytest.mark.parametrize("format_", [{}, {"item_separator": ",", "key_separator": ":"}, {"prefix": "```json\n", "indent": 2}])
def test_a_usual_task_composes_in_every_bpe(bpe_tokenizer: TextTokenizer, format_: dict[str, Any]) -> None:
    task = make_task(
        {
            "sentiment": ["positive", "negative", "neutral"],
            "tone": ["joy", "anger", "neutral"],
            "emotion": ["love", "anger", "e"],
            "safe": [True, False, None],
        },
        **format_,
    )
    composed = build(compose_answers(task, bpe_tokenizer))
    assert same(composed, compile_automaton(task, bpe_tokenizer))


@pytest.mark.parametrize("values", [["a"], ["a", "ab", "abc"]])
def test_a_task_of_one_field_composes(bpe_tokenizer: TextTokenizer, values: list[Any]) -> None:
    task = make_task({"a": values})
    assert same(build(compose_answers(task, bpe_tokenizer)), compile_automaton(task, bpe_tokenizer))


def test_merges_of_the_test_tokenizer_cross_field_boundaries(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["gemma"]
    text = '{"sentiment": "positive", "tone": "joy"}'
    tokens = [tokenizer.decode([id_]) for id_ in tokenizer.encode([text])[0]]
    assert any('": "' in token for token in tokens)
    assert any('"' in token and "," in token for token in tokens)


def test_walk_follows_the_tables_and_refuses_the_rest(any_tokenizer: TextTokenizer) -> None:
    task = make_task({"a": ["a", "ab", "abc"], "b": [True, None]})
    automaton = compile_automaton(task, any_tokenizer)
    for path in language_from(automaton, 0):
        states = automaton.walk(path)
        assert len(states) == len(path) + 1
        assert (states[0], states[-1]) == (0, automaton.end)
        for token, (before, after) in zip(path, itertools.pairwise(states), strict=True):
            assert automaton.next_state[before, automaton.column[token]] == after
        with pytest.raises(ValueError, match="not allowed after 0 tokens"):
            automaton.walk([any_tokenizer.end_id, *path])
        with pytest.raises(ValueError, match=f"not allowed after {len(path)} tokens"):
            automaton.walk([*path, path[0]])
        with pytest.raises(ValueError, match="token 999999 "):
            automaton.walk([999999])


def test_save_and_load(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    automaton = compile_automaton(make_task({"a": ["a", "ab"], "b": [1, 12]}), tokenizer)
    automaton.save(str(tmp_path / "automaton.safetensors"))
    loaded = Automaton.load(str(tmp_path / "automaton.safetensors"))
    assert same(automaton, loaded)
    assert loaded.next_state.dtype == np.int32


def test_control_tokens_in_values_are_refused(any_tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="<eos>"):
        compile_automaton(make_task({"a": ["x", "<eos>"]}), any_tokenizer)
    with pytest.raises(UserError, match="<end_of_turn>"):
        compile_automaton(make_task({"a": ["a"]}, suffix="<end_of_turn>"), any_tokenizer)


def test_a_value_the_tokenizer_cannot_write_is_refused(tokenizers: dict[str, TextTokenizer]) -> None:
    with pytest.raises(UserError, match="cannot write '\"Ж\"'"):
        check_writable(make_task({"a": ["a", "Ж"]}), tokenizers["metaspace"])


def large_task(fields: int = 12) -> Task:
    names = ["sentiment", "tone", "emotion", "toxicity", "safe", "score", "topic", "a", "b", "urgency", "irony", "formality"]
    values = [
        ["positive", "negative", "neutral"],
        ["joy", "anger", "neutral", "love", "sad"],
        ["love", "lovely", "lov", "anger", "angry"],
        ["none", "low", "medium", "high"],
        [True, False, None],
        list(range(13)),
    ]
    return make_task({name: values[i % len(values)] for i, name in enumerate(names[:fields])})


def test_twelve_fields_compile_in_seconds(bpe_tokenizer: TextTokenizer) -> None:
    task = large_task()
    started = time.perf_counter()
    automaton = compile_automaton(task, bpe_tokenizer)
    assert time.perf_counter() - started < 10
    assert count_answers(automaton) == task.outputs


def test_twelve_fields_compile_for_the_small_real_teacher(real_case: RealCase) -> None:
    task = large_task()
    automaton = compile_automaton(task, load_teacher_tokenizer(str(real_case.teacher)))
    assert count_answers(automaton) == task.outputs


def count_answers(automaton: Automaton) -> int:
    """Number of paths, by exact integers from the end back."""
    ways = [0] * automaton.states
    ways[automaton.end] = 1
    for state in range(automaton.states - 2, -1, -1):
        ways[state] = sum(ways[target] for target in automaton.next_state[state][automaton.allowed[state]])
    return ways[0]


def test_languages_too_large_are_refused_with_advice_unless_bpe(tokenizers: dict[str, TextTokenizer]) -> None:
    with pytest.raises(UserError, match=r"not BPE.*list fewer values, or split the task"):
        compile_automaton(large_task(), tokenizers["metaspace"])


def test_twelve_fields_of_two_hundred_values_compile_in_seconds(bpe_tokenizer: TextTokenizer) -> None:
    values = [f"{first} {second}" for first in ("refund", "of a", "card", "to") for second in range(50)]
    task, started = make_task({f"field {i}": values for i in range(12)}), time.process_time()
    automaton = compile_automaton(task, bpe_tokenizer)
    assert time.process_time() - started < 10
    assert count_answers(automaton) == task.outputs == 200**12
    assert automaton.next_state.nbytes < 1 << 30


@pytest.mark.parametrize(
    ("fields", "values"),
    [(1500, ["yes", "no"]), (3000, ["a", "b", "c"])],
    ids=["many fields", "very many fields"],
)
def test_a_language_too_long_to_write_is_refused_before_it_is_written(
    tokenizer: TextTokenizer, fields: int, values: list[str]
) -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=r"30,000,000 characters are handled: list fewer values, or split the task"):
        compile_automaton(make_task({f"f{i}": values for i in range(fields)}), tokenizer)
    assert time.process_time() - started < 10


def test_tables_that_do_not_fit_in_memory_are_refused(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_CELLS", 10)
    with pytest.raises(UserError, match=r"states over \d+ tokens, too many: list fewer values"):
        compile_automaton(make_task({"a": ["positive", "negative", "neutral"]}), tokenizer)


def test_ten_to_the_thirty_answers_compile(bpe_tokenizer: TextTokenizer) -> None:
    automaton = compile_automaton(make_task({f"f{i}": list("abcdefghij") for i in range(30)}), bpe_tokenizer)
    assert count_answers(automaton) == 10**30


def test_a_language_just_too_large_to_list_is_composed(bpe_tokenizer: TextTokenizer) -> None:
    pairs = [a + b for a, b in itertools.product(string.ascii_lowercase[:10], repeat=2)][:50]
    task = make_task({"a": pairs, "b": list(range(50)), "tone": [*pairs[:40], True]})
    assert task.outputs > module.ENUMERATED
    automaton = compile_automaton(task, bpe_tokenizer)
    assert count_answers(automaton) == task.outputs
    part = make_task({"a": pairs[20:24], "b": [9, 10], "tone": [True, "aa"]})
    assert all(automaton.walk(path)[-1] == automaton.end for path in brute_force(part, bpe_tokenizer))


@pytest.mark.slow
def test_a_hundred_thousand_outputs_compile_in_seconds(bpe_tokenizer: TextTokenizer) -> None:
    words = ["positive", "negative", "neutral", "joy", "anger", "love", "none", "high", "a", "ab"]
    task = make_task(dict.fromkeys(("sentiment", "tone", "emotion", "a", "b"), words))
    assert task.outputs == module.ENUMERATED
    started = time.perf_counter()
    automaton = compile_automaton(task, bpe_tokenizer)
    assert time.perf_counter() - started < 60
    assert count_answers(automaton) == task.outputs


def test_an_automaton_that_misses_an_answer_fails_the_sample(tokenizer: TextTokenizer) -> None:
    narrow, wide = make_task({"a": ["a"], "b": [1]}), make_task({"a": ["a", "joy"], "b": [1]})
    with pytest.raises(UserError, match="reach across fields"):
        check_sample(compile_automaton(narrow, tokenizer), wide, tokenizer)


def test_too_many_states_are_refused(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_STATES", 3)
    with pytest.raises(UserError, match=r"more than 3 states.*list fewer values"):
        compile_automaton(make_task({"a": ["a", "joy"]}), tokenizer)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_tasks_of_the_repository_compile(bpe_tokenizer: TextTokenizer, path: Path) -> None:
    task = load_task(str(path))
    automaton = compile_automaton(task, bpe_tokenizer)
    assert language_from(automaton, 0) == brute_force(task, bpe_tokenizer)
