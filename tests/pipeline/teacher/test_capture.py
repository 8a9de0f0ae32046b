from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.task.automaton import Automaton, build
from pipeline.teacher.capture import TEMPERATURES, Captured, Census, CensusResult, Constraint, Recorder, log_sum_exp

CPU = torch.device("cpu")
VOCABULARY = 12
END = 9
# "2 3 END", "2 4 END", "2 4 5 END" and "7 END": choices, forced steps and a token with different meanings
AUTOMATON = build([{(way, 1) for way in [(2, 3, END), (2, 4, END), (2, 4, 5, END), (7, END)]}])
WATCHED = np.array([9, 2, 3, 11], np.int32)


def random_logits(rows: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def every_step(answers: list[list[int]]) -> np.ndarray:
    longest = max(map(len, answers), default=0)
    return np.array([[step < len(answer) for step in range(longest)] for answer in answers], bool).reshape(
        len(answers), longest
    )


def drain(recorder: Recorder, answers: list[list[int]]) -> Captured:
    return recorder.drain(answers, every_step(answers))


def states(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def reference_lse(logits: torch.Tensor) -> np.ndarray:
    return np.stack([torch.logsumexp(logits.double() / t, -1).numpy() for t in TEMPERATURES], -1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
@pytest.mark.parametrize("width", [1, 2, 50_000])
def test_log_sum_exp_equals_float64(scale: float, shift: float, width: int) -> None:
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(width)) * scale + shift
    found = log_sum_exp(logits)
    assert (found.shape, found.dtype) == ((3, 3), torch.float32)
    np.testing.assert_allclose(found, reference_lse(logits), rtol=1e-6, atol=1e-5)


def test_log_sum_exp_with_masked_tokens_and_unchanged_input() -> None:
    logits = random_logits(2)
    logits[:, 3:] = -torch.inf
    before = logits.clone()
    np.testing.assert_allclose(log_sum_exp(logits), reference_lse(logits), rtol=1e-6)
    assert torch.equal(logits, before)


@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_log_sum_exp_of_any_row(values: list[float]) -> None:
    logits = torch.tensor([values])
    np.testing.assert_allclose(log_sum_exp(logits), reference_lse(logits), rtol=1e-6, atol=1e-5)


def test_recorder_keeps_the_watched_logits_of_every_step() -> None:
    recorder = Recorder(WATCHED, CPU)
    first, second = random_logits(2, seed=1), random_logits(2, seed=2)
    recorder.observe(first, states(0, 0), ints(1, 0), ints(0, 0))
    recorder.observe(second, states(0, 0), ints(0, -1), ints(1, 7))
    captured = drain(recorder, [[2, END], [7]])
    assert captured.tokens.tolist() == [[2, END], [7, 0]]
    assert captured.lengths.tolist() == [2, 1]
    np.testing.assert_array_equal(captured.logits[1, 0], first[0, WATCHED])
    np.testing.assert_array_equal(captured.logits[0, 0], first[1, WATCHED])
    np.testing.assert_array_equal(captured.logits[0, 1], second[0, WATCHED])
    np.testing.assert_allclose(captured.lse[0, 1], reference_lse(second)[0], rtol=1e-6)
    assert not captured.logits[1, 1].any()


def test_recorder_last_write_wins() -> None:
    recorder = Recorder(WATCHED, CPU)
    for seed in (1, 2, 3):
        recorder.observe(random_logits(1, seed=seed), states(0), ints(0), ints(0))
    captured = drain(recorder, [[7]])
    np.testing.assert_array_equal(captured.logits[0, 0], random_logits(1, seed=3)[0, WATCHED])


def test_recorder_copies_what_it_sees() -> None:
    recorder = Recorder(WATCHED, CPU)
    logits = random_logits(1)
    wanted = logits[0, WATCHED].clone()
    recorder.observe(logits, states(0), ints(0), ints(0))
    logits.fill_(-torch.inf)
    np.testing.assert_array_equal(drain(recorder, [[7]]).logits[0, 0], wanted)


@pytest.mark.parametrize(
    ("seen", "answers"),
    [
        ([(0, 0)], [[7, END]]),  # a token without logits
        ([(0, 1)], [[7, END]]),
        ([(0, 0), (0, 1)], [[7]]),  # logits without a token
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [[7, END], [7]]),
        ([(0, 0), (1, 0)], [[7]]),  # logits without an answer
        ([], [[7]]),
        ([(0, 0)], []),
    ],
)
def test_recorder_refuses_a_mismatch(seen: list[tuple[int, int]], answers: list[list[int]]) -> None:
    recorder = Recorder(WATCHED, CPU)
    for row, step in seen:
        recorder.observe(random_logits(1), states(0), ints(row), ints(step))
    with pytest.raises(RuntimeError, match=r"no captured logits|no token of the answers has"):
        drain(recorder, answers)
    recorder.observe(random_logits(1), states(0), ints(0), ints(0))
    assert drain(recorder, [[7]]).lengths.tolist() == [1]  # what was refused is not seen again


def test_recorder_keeps_only_the_wanted_steps() -> None:
    recorder = Recorder(WATCHED, CPU)
    for step in range(3):
        recorder.observe(random_logits(1, seed=step), states(0), ints(0), ints(step))
    wanted = np.array([[False, True, False]])
    captured = recorder.drain([[2, 4, END]], wanted)
    np.testing.assert_array_equal(captured.kept, wanted)
    np.testing.assert_array_equal(captured.logits[0, 1], random_logits(1, seed=1)[0, WATCHED])
    assert not captured.logits[0, [0, 2]].any()
    assert not captured.lse[0, [0, 2]].any()


def test_recorder_names_what_it_misses_and_can_forget_an_answer() -> None:
    recorder, answers = Recorder(WATCHED, CPU), [[2, 4, END], [7, END]]
    recorder.observe(random_logits(2), states(0, 0), ints(0, 1), ints(0, 0))
    recorder.observe(random_logits(2), states(0, 0), ints(0, 1), ints(2, 1))
    assert recorder.missing(every_step(answers)) == [0]
    assert recorder.missing(np.array([[True, False, True], [True, True, False]])) == []
    recorder.forget([0])
    assert recorder.missing(np.array([[True, False, False], [True, True, False]])) == [0]
    recorder.observe(random_logits(2, seed=5), states(0, 0), ints(0, 0), ints(0, 1))  # a shorter answer, the second time
    assert drain(recorder, [[7, END], [7, END]]).lengths.tolist() == [2, 2]


def test_batches_join_and_rows_are_selected() -> None:
    parts = []
    for answers in ([[2, 4, END]], [[7, END], [7, END]]):
        recorder = Recorder(WATCHED, CPU)
        for row, answer in enumerate(answers):
            for step in range(len(answer)):
                recorder.observe(random_logits(1, seed=row * 10 + step), states(0), ints(row), ints(step))
        parts.append(drain(recorder, answers))
    whole = Captured.join(parts)
    assert whole.tokens.tolist() == [[2, 4, END], [7, END, 0], [7, END, 0]]
    assert whole.kept.tolist() == every_step([[2, 4, END], [7, END], [7, END]]).tolist()
    np.testing.assert_array_equal(whole.logits[2, :2], parts[1].logits[1])
    some = whole.select(np.array([False, True, True]))
    assert some.lengths.tolist() == [2, 2]
    np.testing.assert_array_equal(some.lse[0, :2], parts[1].lse[0])


def test_answers_with_broken_logits_are_found() -> None:
    recorder = Recorder(WATCHED, CPU)
    logits = random_logits(3)
    logits[1, 5], logits[2, 3] = torch.nan, torch.inf  # one outside W, one inside
    recorder.observe(logits, states(0, 0, 0), ints(0, 1, 2), ints(0, 0, 0))
    assert drain(recorder, [[7], [7], [7]]).finite().tolist() == [True, False, False]


def test_recorder_drains_an_empty_batch() -> None:
    captured = drain(Recorder(WATCHED, CPU), [])
    assert captured.tokens.shape == (0, 0)
    assert captured.logits.shape == (0, 0, len(WATCHED))


@given(data=st.data(), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_recorder_in_any_order_with_repeats(data: st.DataObject, lengths: list[int]) -> None:
    """Every (row, step) at least once, in any order, some twice: what was seen last is kept."""
    cells = [(row, step) for row, length in enumerate(lengths) for step in range(length)]
    order = data.draw(st.permutations(cells + data.draw(st.lists(st.sampled_from(cells), max_size=4))))
    recorder = Recorder(WATCHED, CPU)
    last: dict[tuple[int, int], int] = {}
    for seed, (row, step) in enumerate(order):
        recorder.observe(random_logits(2, seed=seed), states(0, 0), ints(row, -1), ints(step, 0))
        last[row, step] = seed
    captured = drain(recorder, [[5] * length for length in lengths])
    for (row, step), seed in last.items():
        np.testing.assert_array_equal(captured.logits[row, step], random_logits(2, seed=seed)[0, WATCHED])


Step = tuple[torch.Tensor, list[int], list[int], list[int]]  # logits, states, rows, steps


def random_walks(seed: int, rows: int = 6, repeat: bool = True) -> list[Step]:
    """Rows that walk the automaton at random, step by step; some steps are shown twice, some rows passed over."""
    rng = np.random.default_rng(seed)
    at, shown = [0] * rows, []
    for step in range(AUTOMATON.longest):
        running = [row for row in range(rows) if at[row] != AUTOMATON.end]
        for again in range(1 + (repeat and step % 2 == 0)):
            logits = random_logits(len(running) + 1, seed=seed * 100 + step * 10 + again)
            shown.append((logits, [at[row] for row in running] + [0], [*running, -1], [step] * len(running) + [0]))
        for row in running:
            at[row] = int(rng.choice(AUTOMATON.next_state[at[row]][AUTOMATON.allowed[at[row]]]))
    return shown


def census_of(shown: list[Step]) -> CensusResult:
    census = Census(AUTOMATON, CPU)
    for logits, at, rows, steps in shown:
        census.observe(logits, torch.tensor(at), ints(*rows), ints(*steps))
    return census.drain()


@pytest.mark.parametrize("seed", range(5))
def test_census_equals_a_float64_computation(seed: int) -> None:
    shown = random_walks(seed)
    last = {}
    for logits, at, rows, steps in shown:
        probabilities = logits.double().softmax(-1).numpy()
        for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
            if row >= 0:
                last[row, step] = at[i], probabilities[i]
    mass = np.zeros(AUTOMATON.states)
    visits = np.zeros(AUTOMATON.states, np.int64)
    rivals = np.zeros((AUTOMATON.states, VOCABULARY))
    choice_sum, choices = np.zeros(VOCABULARY), 0
    for state, probability in last.values():
        allowed = np.zeros(VOCABULARY, bool)
        allowed[AUTOMATON.tokens[AUTOMATON.allowed[state]]] = True
        mass[state] += probability[allowed].sum()
        visits[state] += 1
        outside = np.where(allowed, 0.0, probability)
        rivals[state, outside.argmax()] += outside.max()
        if allowed.sum() > 1:
            choice_sum, choices = choice_sum + probability, choices + 1
    result = census_of(shown)
    np.testing.assert_array_equal(result.visits, visits)
    np.testing.assert_allclose(result.allowed_mass, np.where(visits > 0, mass / np.maximum(visits, 1), 1.0), rtol=1e-5)
    np.testing.assert_allclose(result.mean_probability, choice_sum / choices, rtol=1e-5)
    assert result.preferred == {state: int(rivals[state].argmax()) for state in np.flatnonzero(visits)}


def test_census_counts_a_repeated_step_once_as_last_seen() -> None:
    rows, steps = ints(0), ints(0)
    repeated, once = Census(AUTOMATON, CPU), Census(AUTOMATON, CPU)
    for seed in (1, 2, 3):
        repeated.observe(random_logits(1, seed=seed), states(0), rows, steps)
    once.observe(random_logits(1, seed=3), states(0), rows, steps)
    a, b = repeated.drain(), once.drain()
    assert a.visits.sum() == b.visits.sum() == 1
    np.testing.assert_array_equal(a.mean_probability, b.mean_probability)
    np.testing.assert_array_equal(a.allowed_mass, b.allowed_mass)


def test_census_never_prefers_an_allowed_token() -> None:
    logits = torch.full((1, VOCABULARY), -20.0)
    logits[0, 2], logits[0, 5], logits[0, 11] = 5.0, 3.0, 2.0  # 2 is allowed at the start, 5 only later, 11 never
    result = census_of([(logits, [0], [0], [0])])
    assert result.preferred == {0: 5}


def test_census_keeps_a_row_of_a_choice_step_and_nothing_else_of_it() -> None:
    census, vocabulary, rows = Census(AUTOMATON, CPU), 50_000, 8
    for step, state in enumerate([0, int(np.flatnonzero(AUTOMATON.forced)[0])] * 3):
        logits = torch.randn(rows, vocabulary)
        census.observe(logits, torch.full((rows,), state), np.arange(rows), np.full(rows, step))
        del logits
        wide = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors() if t.shape[-1:] == (vocabulary,)
        }
        assert sum(wide.values()) <= (rows * 4 * (state == 0) + 8) * vocabulary  # and the float64 sum


def _tensors() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]


def test_census_without_a_step_says_so() -> None:
    passed_over = Census(AUTOMATON, CPU)
    passed_over.observe(random_logits(1), states(0), ints(-1), ints(0))
    for census in (Census(AUTOMATON, CPU), passed_over):
        with pytest.raises(RuntimeError, match="saw no step"):
            census.drain()


def test_census_at_forced_steps_alone_has_no_choice_probability() -> None:
    forced = int(np.flatnonzero(AUTOMATON.forced)[0])
    result = census_of([(random_logits(1), [forced], [0], [0])])
    assert result.visits[forced] == 1
    assert not result.mean_probability.any()


def automata() -> st.SearchStrategy[Automaton]:
    words = st.lists(st.integers(0, VOCABULARY - 2), max_size=4).map(lambda tokens: (*tokens, VOCABULARY - 1))
    return st.sets(words, min_size=1, max_size=8).map(lambda language: build([{(way, 1) for way in language}]))


@given(automaton=automata(), data=st.data())
def test_constraint_leaves_only_what_each_state_allows(automaton: Automaton, data: st.DataObject) -> None:
    at = data.draw(st.lists(st.integers(-1, automaton.end), min_size=1, max_size=6))
    logits = random_logits(len(at))
    constrained = logits.clone()
    Constraint(automaton, CPU).apply(constrained, torch.tensor(at))
    for i, state in enumerate(at):
        allowed = set(automaton.tokens[automaton.allowed[state]].tolist())
        free = state in (-1, automaton.end)
        for token in range(VOCABULARY):
            wanted = logits[i, token] if free or token in allowed else -torch.inf
            assert constrained[i, token] == wanted


@given(automaton=automata())
def test_constraint_advances_along_the_tables(automaton: Automaton) -> None:
    ways = [
        (state, int(token), int(automaton.next_state[state, column]))
        for state in range(automaton.states)
        for column, token in enumerate(automaton.tokens)
        if automaton.next_state[state, column] >= 0
    ]
    before, tokens, after = (torch.tensor(column) for column in zip(*ways, strict=True))
    assert torch.equal(Constraint(automaton, CPU).advance(before, tokens), after)


def test_following_the_constraint_always_ends_in_an_answer() -> None:
    constraint = Constraint(AUTOMATON, CPU)
    at, walked = torch.zeros(50, dtype=torch.int64), [[] for _ in range(50)]
    for step in range(AUTOMATON.longest):
        logits = random_logits(50, seed=step)
        constraint.apply(logits, at)
        tokens = logits.argmax(1)
        running = at != AUTOMATON.end
        for answer, token, go in zip(walked, tokens.tolist(), running.tolist(), strict=True):
            answer += [token] if go else []
        at = constraint.advance(at, tokens.where(running, END)).where(running, at)
    assert bool((at == AUTOMATON.end).all())
    assert {tuple(answer) for answer in walked} == {(2, 3, END), (2, 4, END), (2, 4, 5, END), (7, END)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_logits_still_lead_to_an_allowed_token(value: float) -> None:
    logits = torch.full((AUTOMATON.states, VOCABULARY), value)
    at = torch.arange(AUTOMATON.states)
    Constraint(AUTOMATON, CPU).apply(logits, at)
    for state, token in enumerate(logits[: AUTOMATON.end].argmax(1).tolist()):
        assert AUTOMATON.allowed[state, AUTOMATON.column[token]]
