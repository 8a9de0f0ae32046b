"""Calibration: a sample of comments through the teacher, before any extraction.

It chooses the auxiliary tokens, and stops where the teacher is not at home in the task's format: logits captured off a
teacher's own path say little.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.task.automaton import Automaton
from pipeline.task.tokenization import TextTokenizer
from pipeline.teacher.capture import CensusResult

log = logging.getLogger(__name__)

ENOUGH_VISITS = 16  # a mean of fewer says little


@dataclass(frozen=True)
class StateMass:
    """How much of the teacher's raw probability falls on what one state allows.

    Attributes:
        written: an example of the text before the state.
        mass: mean raw probability of the allowed tokens.
        visits: answers it is a mean of.
        rival: the text of the disallowed token the teacher likes best there.
    """

    written: str
    mass: float
    visits: int
    rival: str


def masses(result: CensusResult, automaton: Automaton, tokenizer: TextTokenizer) -> list[StateMass]:
    """The visited states, least mass first."""
    paths = _shortest_paths(automaton)
    visited = np.flatnonzero(result.visits)
    found = [
        StateMass(
            written=tokenizer.decode(paths[state]),
            mass=float(result.allowed_mass[state]),
            visits=int(result.visits[state]),
            rival=tokenizer.decode([result.preferred[state]]) or tokenizer.token(result.preferred[state]),
        )
        for state in visited.tolist()
    ]
    return sorted(found, key=lambda state: state.mass)


def _shortest_paths(automaton: Automaton) -> list[list[int]]:
    """For each state, the tokens of one shortest way there."""
    paths: list[list[int] | None] = [None] * automaton.states
    paths[0] = []
    for state in range(automaton.states):  # steps lead to higher states, so each is complete when its turn comes
        so_far = paths[state] or []
        for column in np.flatnonzero(automaton.allowed[state]):
            target = int(automaton.next_state[state, column])
            known = paths[target]
            if known is None or len(known) > len(so_far) + 1:
                paths[target] = [*so_far, int(automaton.tokens[column])]
    return [path or [] for path in paths]


def check_format(states: list[StateMass], floor: float, given: bool) -> None:
    """Stops where the teacher would rather write another format: its mean mass on what a state allows is under the floor.

    Args:
        given: whether the teacher only scores given answers, which are worth keeping; then it is a warning.

    Raises:
        UserError: naming what the teacher would rather write, and the `format` that would allow it.
    """
    low = [state for state in states if state.visits >= ENOUGH_VISITS and state.mass < floor]
    if not low:
        return
    first = min(low, key=lambda state: len(state.written))
    problem = (
        f"the teacher is not at home in the task's format: after {first.written!r} only {first.mass:.3f} of its probability "
        f"is on tokens the task allows (floor {floor}), and it would rather write {first.rival!r}. {suggest(first)} "
        f"{len(low)} states are under the floor; extract.calibration_floor sets it"
    )
    if not given:
        raise UserError(problem)
    log.warning(
        "the given answers are kept, but the teacher's logits along them say little: train with --set "
        "train.objective=hard-label. For %s",
        problem,
    )


def suggest(state: StateMass) -> str:
    """The change of `format` or `instruction` that would let the teacher write what it prefers."""
    before, rival = state.written, state.rival
    if not before and rival.startswith("`"):
        return "It fences its answers: set format.prefix to '```json\\n', format.suffix to '\\n```' and format.indent to 2."
    if not before:
        return f"Set format.prefix to what it opens its answers with ({rival!r}), or ask for bare JSON in `instruction`."
    if before.rfind("[") > before.rfind("]"):
        return (
            "In a list it would write other labels: set `order: any` in `lists` if it has an order of its own, or raise `max`."
        )
    if before[-1] in "{," and "\n" in rival:
        return "It writes a field on each line: set format.indent to 2 (or to the spaces it uses)."
    if before[-1] == ":" or (before[-1] == '"' and rival.strip() == ":"):
        return f"Set format.key_separator to what it writes there ({rival!r})."
    if before[-1] == "}":
        return f"Set format.suffix to what it ends its answers with ({rival!r})."
    return "It would choose another value: name the fields and all their values in `instruction`, spelt as in `fields`."


def report(states: list[StateMass], rows: int) -> dict[str, Any]:
    """What calibration found, for the manifest's folder."""
    return {"rows": rows, "states": [vars(state) for state in states]}
