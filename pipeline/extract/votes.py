"""What is known of one text's answer, as weights of whole answers: the one that was given, and those near it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline.shards.shares import Votes
from pipeline.task.automaton import Tokens
from pipeline.task.compiled import CompiledTask
from pipeline.task.values import Values

SEEN = 1e-6  # a share of less says nothing


def weights(compiled: CompiledTask, values: Values, shares: Sequence[Sequence[float]] | None) -> Votes:
    """An answer's weight, and those of the answers that differ from it in one field; together 1.

    Args:
        shares: of each value of each field, given the text and the answer's values of the fields before; none for a list,
            whose own labels are all that is known, and None for the answer alone.
    """
    found, reached = defaultdict[Tokens, float](float), 1.0
    for field, (allowed, some) in enumerate(zip(compiled.task.fields.values(), shares or [], strict=False)):
        own = SEEN if some else 1.0
        for value, share in zip(allowed if some else [], some, strict=True):
            other = (*values[:field], value, *values[field + 1 :])
            if type(value) is type(values[field]) and value == values[field]:
                own = max(share, SEEN)
            elif share > SEEN and compiled.task.fit(dict(zip(compiled.task.fields, other, strict=True))):
                found[compiled.tokens(other)] += reached * share
        reached *= own
    found[compiled.tokens(values)] += reached
    return found


def answer_and_votes(compiled: CompiledTask, replies: list[dict[str, Any]]) -> tuple[Tokens, Votes] | None:
    """The answer that most replies have, and the weights of all that they find possible; None where none has an answer."""
    task, votes, answers = compiled.task, defaultdict[Tokens, float](float), Counter[Tokens]()
    for reply in replies:
        if reply["values"] is not None and (values := task.fit(dict(zip(task.fields, reply["values"], strict=True)))):
            answers[compiled.tokens(values)] += 1
            for answer, weight in weights(compiled, values, reply["shares"]).items():
                votes[answer] += weight
    return (answers.most_common(1)[0][0], votes) if answers else None
