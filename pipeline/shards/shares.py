"""What is known of a text's answers without a teacher's logits, as a shard holds it: votes for whole answers.

A token's probability is the weight of the answers that pass through it, over the weight of those that pass through the state
before it. Along a tree of tokens that is the distribution of the values themselves, whatever the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.task.automaton import Automaton, Tokens
from pipeline.teacher.capture import TEMPERATURES, Captured, log_sum_exp

NEVER = -30.0  # nats, in place of the logarithm of 0: finite in float16, and nothing beside the rest at any temperature

Votes = Mapping[Tokens, float]  # weights, by the tokens of whole answers


def greedy(votes: Votes) -> Tokens:
    """The answer that a decoder would find: at each token the one with the most weight; of several, the one that came first."""
    step = 0
    while len(votes) > 1:
        weights = dict.fromkeys((answer[step] for answer in votes), 0.0)
        for answer, weight in votes.items():
            weights[answer[step]] += weight
        best = max(weights, key=lambda token: weights[token])
        votes = {answer: weight for answer, weight in votes.items() if answer[step] == best}
        step += 1
    return next(iter(votes))


def capture_votes(answers: Sequence[Tokens], votes: Sequence[Votes], automaton: Automaton) -> Captured:
    """An answer to each text, and at its choice steps the logarithms of the shares of the required tokens, which are all of W.

    Each answer has to be among its votes.
    """
    lengths = np.array([len(answer) for answer in answers], np.int32)
    shape = (len(answers), int(lengths.max(initial=0)))
    tokens, kept = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logits = np.zeros((*shape, len(automaton.tokens)), np.float32)
    for row, (answer, some) in enumerate(zip(answers, votes, strict=True)):
        tokens[row, : len(answer)] = answer
        for step, state in enumerate(automaton.walk(answer)[:-1]):
            if not automaton.forced[state]:
                kept[row, step] = True
                logits[row, step] = _log_shares(some, step, automaton)
                some = {other: weight for other, weight in some.items() if other[step] == answer[step]}
    lse = np.zeros((*shape, len(TEMPERATURES)), np.float32)
    lse[kept] = log_sum_exp(torch.from_numpy(logits[kept])).numpy()
    return Captured(tokens, lengths, kept, logits, lse)


def _log_shares(votes: Votes, step: int, automaton: Automaton) -> NDArray[np.float32]:
    """Of the tokens that the votes have at a step, which they all reach by the same ones: float32 [W], nats."""
    weights: Counter[int] = Counter()
    for answer, weight in votes.items():
        weights[automaton.column[answer[step]]] += weight  # type: ignore[assignment]
    shares = np.full(len(automaton.tokens), NEVER, np.float32)
    shares[list(weights)] = np.log(np.fromiter(weights.values(), float) / sum(weights.values()))
    return shares
