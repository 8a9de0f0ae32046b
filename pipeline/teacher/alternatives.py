"""How likely each value was, from the alternatives that an endpoint lists beside each token of its answer.

Tokens are met as bytes alone: whatever the endpoint's tokenizer, an alternative stands for the values that go on like it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.task.task import Task
from pipeline.task.values import Scalar, Values

TINY = 1e-30  # in place of a probability of 0, which may be what an exponential gives


@dataclass(frozen=True)
class Step:
    """A token of an answer.

    Attributes:
        token: its bytes.
        alternatives: probabilities of the likeliest tokens in its place, its own among them.
    """

    token: bytes
    alternatives: Mapping[bytes, float]


def value_shares(task: Task, values: Values, steps: Sequence[Step]) -> list[list[float]]:
    """The probability of each value of each field, given the text and the values before it as they were answered.

    Where the answer's text is not found among its tokens, the value that was given has all of it; a list has no shares.
    """
    text = b"".join(step.token for step in steps)
    shares, behind = list[list[float]](), 0
    for (name, allowed), value in zip(task.fields.items(), values, strict=True):
        if isinstance(value, tuple):
            shares.append([])
            continue
        key = task.path(name)[-1]  # which two objects may both have, so the next one is looked for first
        place = _place(text, behind, key, value) or _place(text, 0, key, value)
        behind = place[0] if place else behind
        found = _shares(text, place, allowed, value, steps) if place else [float(_same(other, value)) for other in allowed]
        shares.append([share / sum(found) for share in found])
    return shares


def _same(a: Scalar, b: Scalar) -> bool:
    return type(a) is type(b) and a == b


def _place(text: bytes, behind: int, name: str, value: Scalar) -> tuple[int, bool] | None:
    """Where a field's value begins in the answer behind some place, and whether it is written in ASCII alone."""
    for ascii_ in (False, True):
        key, written = (re.escape(json.dumps(part, ensure_ascii=ascii_).encode()) for part in (name, value))
        found = re.search(rb"[{,]\s*" + key + rb"\s*:\s*(" + written + rb")\s*[,}]", text[behind:])
        if found:
            return behind + found.start(1), ascii_
    return None


def _shares(
    text: bytes, place: tuple[int, bool], allowed: Sequence[Scalar], value: Scalar, steps: Sequence[Step]
) -> list[float]:
    """Walks the tokens of a value until no other begins like it."""
    start, ascii_ = place
    written = [json.dumps(other, ensure_ascii=ascii_).encode() for other in allowed]
    mine = next(i for i, other in enumerate(allowed) if _same(other, value))
    rest = text[start + len(written[mine]) :]
    texts = [text[:start] + other + rest for other in written]
    shares, reached, offset = [0.0] * len(allowed), 1.0, 0
    for step in steps:
        alive = {i: other[offset:] for i, other in enumerate(texts) if other.startswith(text[:offset])}
        offset += len(step.token)
        if offset > start:
            if len(alive) == 1:
                break
            own, others = _chances(step, alive, mine)
            for i, chance in others.items():
                shares[i] += reached * chance
            reached *= own
    shares[mine] += reached
    return shares


def _chances(step: Step, alive: Mapping[int, bytes], mine: int) -> tuple[float, dict[int, float]]:
    """The probability of a step's own token, and of the values that part from the answer there; together 1.

    A listed token stands in equal parts for the values that go on like it, but for the answer's own, which has another. What is
    not listed is less likely than all that is: a value that no listed token fits has no more than the least of them.

    Args:
        alive: the text from there on with each value that begins as the answer does.
        mine: the answer's value.
    """
    fits = {token: [i for i, rest in alive.items() if _fits(token, rest)] for token in step.alternatives}
    unseen, left = set(alive).difference(*fits.values()), max(0.0, 1 - sum(step.alternatives.values()))
    others = {i: min(left / len(unseen), *step.alternatives.values()) for i in unseen}
    for token in fits.keys() - {step.token}:
        some = [i for i in fits[token] if i != mine]
        others |= {i: others.get(i, 0.0) + step.alternatives[token] / len(some) for i in some}
    total = max(TINY, step.alternatives[step.token] + sum(others.values()))  # the rest is no answer of the task
    return step.alternatives[step.token] / total, {i: chance / total for i, chance in others.items()}


def _fits(token: bytes, rest: bytes) -> bool:
    """Whether a text can go on with a token; what comes after the text is not known."""
    return bool(token) and (rest.startswith(token) or token.startswith(rest))
