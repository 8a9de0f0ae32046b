"""How likely each value was, from the alternatives that an endpoint lists beside each token of its answer.

Tokens are met as bytes alone: whatever the endpoint's tokenizer, an alternative stands for the values that go on like it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.task.task import Scalar, Task, Values

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

    Where the answer's text is not found among its tokens, the value that was given has all of it.
    """
    text = b"".join(step.token for step in steps)
    shares = []
    for (name, allowed), value in zip(task.fields.items(), values, strict=True):
        place = _place(text, name, value)
        found = _shares(text, place, allowed, value, steps) if place else [float(_same(other, value)) for other in allowed]
        shares.append([share / sum(found) for share in found])
    return shares


def _same(a: Scalar, b: Scalar) -> bool:
    return type(a) is type(b) and a == b


def _place(text: bytes, name: str, value: Scalar) -> tuple[int, bool] | None:
    """Where a field's value begins in the answer, and whether it is written in ASCII alone."""
    for ascii_ in (False, True):
        key, written = (re.escape(json.dumps(part, ensure_ascii=ascii_).encode()) for part in (name, value))
        found = re.search(rb"[{,]\s*" + key + rb"\s*:\s*(" + written + rb")\s*[,}]", text)
        if found:
            return found.start(1), ascii_
    return None


def _shares(
    text: bytes, place: tuple[int, bool], allowed: Sequence[Scalar], value: Scalar, steps: Sequence[Step]
) -> list[float]:
    """Walks the tokens of a value until no other begins like it.

    An alternative's probability goes to the values that it fits, in equal parts. What is left at a step is known to be of
    tokens that are each less likely than the last alternative: a value that no alternative fits has no more than that.
    """
    start, ascii_ = place
    written = [json.dumps(other, ensure_ascii=ascii_).encode() for other in allowed]
    mine = next(i for i, other in enumerate(allowed) if _same(other, value))
    rest = text[start + len(written[mine]) :]
    texts = [text[:start] + other + rest for other in written]
    shares, reached, offset = [0.0] * len(allowed), 1.0, 0
    for step in steps:
        after = offset + len(step.token)
        if after <= start:
            offset = after
            continue
        alive = [i for i, other in enumerate(texts) if other.startswith(text[:offset])]
        if alive == [mine]:
            break
        fitting = {token: fits for token in step.alternatives if (fits := [i for i in alive if _fits(texts[i], offset, token)])}
        unseen = set(alive).difference(*fitting.values())
        left = max(0.0, 1 - sum(step.alternatives.values()))
        each = min(left / len(unseen), *step.alternatives.values()) if unseen else 0.0
        inside = sum(step.alternatives[token] for token in fitting) + each * len(unseen)
        possible = max(inside, TINY)  # the rest is no answer of the task
        for token in fitting.keys() - {step.token}:
            for i in fitting[token]:
                shares[i] += reached * step.alternatives[token] / possible / len(fitting[token])
        for i in unseen:
            shares[i] += reached * each / possible
        reached *= step.alternatives[step.token] / possible
        offset = after
    shares[mine] += reached
    return shares


def _fits(text: bytes, offset: int, token: bytes) -> bool:
    """Whether a token can stand at some place of a text."""
    end = text[offset : offset + len(token)]
    return bool(token) and (end == token or (offset + len(end) == len(text) and token.startswith(end)))
