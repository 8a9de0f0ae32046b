"""`retort merge`: the shards of several teachers as those of one, whatever their tokenizers.

Each teacher's probabilities along its answer are read as weights of whole answers: its own, and those that differ from it in
one field. A token that several values begin with gives each an equal part, as no shard says more. Weights are added up by text.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.reading import text_key
from pipeline.shards.files import GOLD, ShardTable, write_shard
from pipeline.shards.manifest import Manifest, Shards, Totals, open_shards, write_manifest
from pipeline.shards.shares import capture_votes, greedy
from pipeline.task.automaton import Tokens
from pipeline.task.compiled import compile_for, require_same
from pipeline.task.fitted_tokenizer import fit_tokenizer
from pipeline.task.values import Values

log = logging.getLogger(__name__)

ROWS = 512  # of a shard
SEEN = 1e-6  # a share of less says nothing

Weights = dict[Values, float]  # of whole answers


@dataclass
class _Row:
    """A text, and what the teachers that have it say of it."""

    about: dict[str, Any]
    gold: Values | None
    weights: Weights = field(default_factory=dict)
    teachers: int = 0


def merge(
    folders: Sequence[str], weights: Sequence[float], keep_missing: bool, out: str, note: dict[str, Any] | None = None
) -> Manifest:
    """Writes the mean of several extractions of one task, by weight, to the folder `out`.

    Args:
        weights: one a folder; none for equal ones.
        keep_missing: keep texts that a folder lacks, by the others alone.
        note: what else the manifest says.

    Raises:
        UserError: the folders are unusable, of different tasks, or have no text in common.
    """
    weights = weights or [1.0] * len(folders)
    if len(weights) != len(folders) or len(folders) < 2 or min(weights) <= 0:
        raise UserError(f"{len(folders)} folders, {len(weights)} weights: two folders or more, and a weight above 0 for each")
    if storage.exists(storage.join(out, "manifest.json")):
        raise UserError(f"{out} holds shards already: choose another --out, or delete it")
    extractions = [open_shards(folder) for folder in folders]
    for other in extractions[1:]:
        found, wanted = ({"task": shards.compiled.task.hash} for shards in (other, extractions[0]))
        require_same(found, wanted, other.folder, extractions[0].folder)
    rows = list(_gather(extractions, weights).values())
    whole = [row for row in rows if row.teachers == len(folders)]
    log.info("%s texts, %s of them in all %s folders", f"{len(rows):,}", f"{len(whole):,}", len(folders))
    if not keep_missing and not whole:
        raise UserError("the folders have no text in common: --keep-missing keeps what only some of them have")
    return _write(rows if keep_missing else whole, extractions, weights, out, note or {})


def _gather(extractions: list[Shards], weights: Sequence[float]) -> dict[bytes, _Row]:
    """The weights of every text's answers, in the order in which texts were met."""
    rows: dict[bytes, _Row] = {}
    first = 0
    for teacher, (shards, weight) in enumerate(zip(extractions, weights, strict=True)):
        reader = _Reader(shards)
        for about, gold, answers in itertools.chain.from_iterable(map(reader.read, shards.tables())):
            row = rows.setdefault(text_key(about["text"]), _Row(about | {"file": first + about["file"]}, gold))
            row.teachers += row.teachers == teacher  # a teacher may have several samples of a text
            row.gold = row.gold or gold
            for answer, share in answers.items():
                row.weights[answer] = row.weights.get(answer, 0.0) + weight * share
        first += len(shards.manifest.files)
    return rows


class _Reader:
    """Reads one extraction's shards as weights of answers."""

    def __init__(self, shards: Shards) -> None:
        self._compiled = shards.compiled
        self._known: dict[Tokens, tuple[Values, dict[tuple[int, int], list[Values]]]] = {}

    def read(self, table: ShardTable) -> list[tuple[dict[str, Any], Values | None, Weights]]:
        """Of each example: where it stands and its text, people's label, and the weights."""
        automaton, ends = self._compiled.automaton, np.cumsum(table.lengths)[:-1]
        answers, kept = np.split(table.answers, ends), np.split(table.kept, ends)
        states = np.split(automaton.states_before(answers), ends)
        logprobs = np.split(table.logprobs[:, : len(automaton.tokens)], np.cumsum([some.sum() for some in kept])[:-1])
        found = []
        for i, answer in enumerate(answers):
            choice = ~automaton.forced[states[i][kept[i]]]
            steps = np.flatnonzero(kept[i])[choice]
            shares_SR = np.exp(logprobs[i][choice].astype(np.float64)) * automaton.allowed[states[i][steps]]
            shares_SR /= shares_SR.sum(1, keepdims=True)
            about = dict(zip(("file", "row"), table.keys[i, :2].tolist(), strict=True))
            about |= {"id": table.ids[i], "text": table.texts[i]}
            gold = self._others(tuple(table.gold[i].tolist()))[0] if len(table.gold[i]) else None
            found.append((about, gold, self._weights(tuple(answer.tolist()), steps, shares_SR)))
        return found

    def _weights(self, answer: Tokens, steps: NDArray[np.int64], shares_SR: NDArray[np.float64]) -> Weights:
        column = self._compiled.automaton.column
        values, others = self._others(answer)
        row = {int(step): i for i, step in enumerate(steps)}
        own = np.array([shares_SR[i, column[answer[step]]] for step, i in row.items()])
        reached = np.concatenate([[1.0], np.cumprod(own)])
        weights: Weights = defaultdict(float)
        for (step, token), some in others.items():
            share = reached[row[step]] * shares_SR[row[step], column[token]] / len(some)
            if share > SEEN:
                for other in some:
                    weights[other] += share
        weights[values] += max(float(reached[-1]), SEEN)
        return dict(weights)

    def _others(self, answer: Tokens) -> tuple[Values, dict[tuple[int, int], list[Values]]]:
        """An answer's values; and by step and token, the answers that part from it there and differ in one field."""
        if answer not in self._known:
            task, tokenizer = self._compiled.task, self._compiled.tokenizer
            values = task.parse(tokenizer.decode(list(answer)))
            if values is None:
                raise UserError(f"the shards hold an answer that is none of the task's: {tokenizer.decode(list(answer))!r}")
            near = task.near(values)
            parted = defaultdict[tuple[int, int], list[Values]](list)
            for other, ids in zip(near, tokenizer.encode([task.render(other) for other in near]), strict=True):
                tokens = (*ids, tokenizer.end_id)
                step = next(i for i, (a, b) in enumerate(zip(answer, tokens, strict=False)) if a != b)
                parted[step, tokens[step]].append(other)
            self._known[answer] = values, parted
        return self._known[answer]


def _write(rows: list[_Row], extractions: list[Shards], weights: Sequence[float], out: str, note: dict[str, Any]) -> Manifest:
    """The shards, for a tokenizer fitted to their texts."""
    task = extractions[0].compiled.task
    compiled = compile_for(task, fit_tokenizer((row.about["text"] for row in rows), task))
    tokenizer, automaton = compiled.tokenizer, compiled.automaton
    known: dict[Values, Tokens] = {}

    def tokens(values: Values) -> Tokens:
        if values not in known:
            known[values] = compiled.tokens(values)
        return known[values]

    for unit, start in enumerate(range(0, len(rows), ROWS)):
        some = rows[start : start + ROWS]
        votes = [{tokens(values): weight for values, weight in row.weights.items()} for row in some]
        columns = {name: [row.about[name] for row in some] for name in ("file", "row", "id", "text")}
        columns |= {"sample": [0] * len(some), "tokens": tokenizer.encode(columns["text"])}
        columns |= {GOLD.name: [list(tokens(row.gold)) if row.gold else [] for row in some]}
        facts = {"hashes": compiled.hashes, "seconds": 0.0}
        write_shard(out, unit, _table(columns), capture_votes([greedy(one) for one in votes], votes, automaton), facts)
    compiled.save(out)
    given = [shards for shards in extractions if shards.manifest.answers == "given"]
    about = (given or extractions)[0].manifest.model_dump(mode="json", exclude=set(Totals.model_fields))
    teachers = [shards.manifest.teacher.model_dump(mode="json") for shards in extractions]
    about |= {"hashes": compiled.hashes, "files": [file for shards in extractions for file in shards.manifest.files]}
    about |= {"teacher": {"model": _names(teachers), "engine": "merged", "merged": teachers, "weights": list(weights)}}
    return write_manifest(out, -(-len(rows) // ROWS), about | note)


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    kinds = {"file": pa.int32(), "row": pa.int64(), "sample": pa.int32(), "tokens": pa.list_(pa.int32()), GOLD.name: GOLD.type}
    return pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()})


def _names(teachers: list[dict[str, Any]]) -> str | None:
    """The models' names together; None where all answers were given."""
    names = [teacher["model"] for teacher in teachers if teacher["model"]]
    return " + ".join(names) or None
