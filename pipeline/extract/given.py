"""`retort import`: texts with answers that someone has given already, to shards. No model runs.

A log, the labels of people, another model's answers: a text that stands there several times is one example, and the share of
each of its answers is how likely it is. `--probabilities` takes how likely other values were.
"""

from __future__ import annotations

import json
import logging
from operator import itemgetter

import pyarrow as pa

from pipeline.base import storage
from pipeline.base.console import progress
from pipeline.base.errors import UserError
from pipeline.comments.plan import read_unit
from pipeline.comments.reading import text_key
from pipeline.config import PipelineSettings
from pipeline.extract.fitted import Fitted, fit
from pipeline.extract.votes import weights
from pipeline.shards.files import shard_exists, write_shard
from pipeline.shards.manifest import Manifest, write_manifest
from pipeline.shards.shares import Votes, capture_votes, greedy
from pipeline.task.automaton import Tokens
from pipeline.task.compiled import CompiledTask

log = logging.getLogger(__name__)


def import_answers(config: PipelineSettings) -> Manifest:
    """Runs the whole stage in `config.out` and returns the manifest. What is already there is not done again.

    Raises:
        UserError: anything the user can mend.
    """
    if config.comments.answer is None:
        raise UserError("an import needs the columns of the answers (--answers)")
    fitted = fit(config)
    _write(fitted)
    manifest = write_manifest(fitted.shards, fitted.plan.units, fitted.about() | {"teacher": {"model": None}})
    storage.sweep(fitted.shards)
    log.info("%s texts with answers; %s rows repeat a text", f"{manifest.rows:,}", f"{fitted.plan.kept - manifest.rows:,}")
    return manifest


def _write(fitted: Fitted) -> None:
    """A shard for each unit: of each text, the row where it stands first."""
    votes, seen, units = _votes(fitted), set[bytes](), fitted.plan.units
    about = {"hashes": fitted.compiled.hashes, "seconds": 0.0}
    with progress("importing", units) as (bar, task):
        for unit in range(units):
            rows = read_unit(fitted.comments, unit)
            keys = {text_key(text): i for i, text in reversed(list(enumerate(rows["text"].to_pylist())))}
            first = {key: i for key, i in sorted(keys.items(), key=itemgetter(1)) if key not in seen}
            seen.update(first)
            if not shard_exists(fitted.shards, unit):
                some = [votes[key] for key in first]
                captured = capture_votes([greedy(one) for one in some], some, fitted.compiled.automaton)
                kept = rows.take(pa.array(first.values(), pa.int64())).append_column(
                    "sample", pa.array([0] * len(first), pa.int32())
                )
                write_shard(fitted.shards, unit, kept, captured, about)
            bar.advance(task)


def _votes(fitted: Fitted) -> dict[bytes, Votes]:
    """The weights of each text's answers: how often it has each, and how likely the others were where that is given."""
    votes: dict[bytes, Votes] = {}
    known: dict[tuple[Tokens, str], Votes] = {}  # texts are many, different answers few
    for unit in range(fitted.plan.units):
        rows = read_unit(fitted.comments, unit).select(["text", "answer", "shares"])
        for text, answer, shares in zip(*(column.to_pylist() for column in rows.columns), strict=True):
            key, said = text_key(text), (tuple(answer), shares)
            before, one = votes.get(key), known.get(said) or _weights(fitted.compiled, *said)
            if not shares:
                known[said] = one
            votes[key] = {some: before.get(some, 0) + one.get(some, 0) for some in {**before, **one}} if before else one
    return votes


def _weights(compiled: CompiledTask, answer: Tokens, shares: str) -> Votes:
    if not shares:
        return {answer: 1}
    values = compiled.task.parse(compiled.tokenizer.decode(list(answer)))
    if values is None:
        raise AssertionError("a plan holds answers of its task alone")
    return weights(compiled, values, json.loads(shares))
