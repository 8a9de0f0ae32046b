from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.base import storage
from pipeline.task.automaton import build
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.vocabulary import WatchedSet, choose_watched

AUTOMATON = build([{((5, 3, 9), 1), ((7, 9), 1)}])
REQUIRED = [3, 5, 7, 9]


def probabilities(size: int = 12, **by_token: float) -> np.ndarray:
    mean = np.zeros(size)
    for token, probability in by_token.items():
        mean[int(token[1:])] = probability
    return mean


def test_required_tokens_stand_first_then_the_likeliest_others() -> None:
    mean = probabilities(t3=0.0, t5=0.9, t1=0.01, t11=0.05, t0=0.02, t2=0.001)
    watched = choose_watched(AUTOMATON, mean, auxiliary=3)
    assert watched.tokens.tolist() == [*REQUIRED, 11, 0, 1]
    assert (watched.required, watched.size) == (4, 7)
    assert watched.tokens.dtype == np.int32
    assert mean[5] == 0.9  # the caller's array is left as it was


def test_equally_likely_tokens_come_by_id() -> None:
    watched = choose_watched(AUTOMATON, probabilities(t10=0.1, t1=0.1, t4=0.1), auxiliary=2)
    assert watched.tokens[4:].tolist() == [1, 4]


@pytest.mark.parametrize(("auxiliary", "expected"), [(0, []), (1, [2]), (100, [2, 8])])
def test_only_tokens_with_some_probability_are_added(auxiliary: int, expected: list[int]) -> None:
    watched = choose_watched(AUTOMATON, probabilities(t2=0.2, t8=0.1), auxiliary)
    assert watched.tokens[4:].tolist() == expected


@pytest.mark.parametrize("size", [10, 12, 640])
def test_the_teachers_vocabulary_may_be_smaller_or_padded(size: int) -> None:
    watched = choose_watched(AUTOMATON, probabilities(size, t2=0.2), auxiliary=5)
    assert watched.tokens.tolist() == [*REQUIRED, 2]


def test_no_token_is_watched_twice() -> None:
    rng = np.random.default_rng(0)
    watched = choose_watched(AUTOMATON, rng.random(50), auxiliary=46)
    assert sorted(watched.tokens.tolist()) == list(range(50))


def test_the_hash_tells_tokens_order_and_the_required_share() -> None:
    tokens = np.array([3, 5, 9, 1], np.int32)
    variants = [
        WatchedSet(tokens, 3),
        WatchedSet(tokens, 4),
        WatchedSet(tokens[[0, 1, 3, 2]], 3),
        WatchedSet(tokens[:3], 3),
        WatchedSet(np.array([3, 5, 9, 2], np.int32), 3),
    ]
    assert len({watched.hash for watched in variants}) == len(variants)
    assert WatchedSet(tokens.astype(np.int64), 3).hash == variants[0].hash


def test_save_and_load(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    watched = WatchedSet(np.array([5, 300, 7, 100_000], np.int32), 2)
    path = str(tmp_path / "vocabulary.json")
    watched.save(path, tokenizer)
    loaded = WatchedSet.load(path)
    assert loaded.tokens.tolist() == watched.tokens.tolist()
    assert loaded.tokens.dtype == np.int32
    assert (loaded.required, loaded.hash) == (2, watched.hash)
    assert storage.read_json(path)["required"][1] == {"id": 300, "token": tokenizer.token(300)}
