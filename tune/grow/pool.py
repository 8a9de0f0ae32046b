"""Texts that a teacher could be asked about, and which of them are."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base import storage
from pipeline.comments.plan import CommentSource, Plan, describe_source, find_comments, find_plan, make_plan, read_unit
from pipeline.comments.reading import KEPT, comment_tables, filter_rows, text_key, text_row
from pipeline.config import CommentsConfig
from pipeline.shards.manifest import open_shards
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from student.data.unpack import SPLIT_TENTHS, TRAIN, split_of
from student.decode.answerer import Answerer
from tune.grow.select import draw_unsure, shares_of

log = logging.getLogger(__name__)

ROWS_PER_UNIT = 8192
MOST_TEXTS = 200_000  # of a pool that are looked at; which ones, the hash of the text decides
CANDIDATES = 20  # texts that the student reads for each one that is asked about, at most
TEXT, ID, ANSWER, PROBABILITIES, GOLD = "body", "id", "answer", "probabilities", "gold"  # columns of a round's file

Key = bytes  # of a text
Record = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """What may be asked.

    Attributes:
        source: of the texts.
        task: that they are of.
        records: what a round's file would hold of each text; several where one has several given answers.
    """

    source: CommentSource
    task: Task
    records: dict[Key, list[Record]]

    def choose(self, count: int, asked: set[Key], student: str | None, seed: list[int]) -> list[Record]:
        """The records of so many texts that were not asked before: see `tune.grow.select`.

        Args:
            student: folder of the one that is to learn from them; None draws all at random.
        """
        rng = np.random.default_rng(seed)
        new: dict[str, list[Key]] = {split: [] for split in SPLIT_TENTHS}
        for key, records in self.records.items():
            if key not in asked:
                new[split_of(records[0][TEXT])].append(key)
        wanted, chosen = shares_of(count, {split: len(keys) for split, keys in new.items()}), []
        for split, keys in new.items():
            keys = [keys[i] for i in rng.permutation(len(keys))]
            if split == TRAIN and student is not None:
                keys = self._unsure(keys[: CANDIDATES * wanted[split]], wanted[split], student, rng)
            chosen += keys[: wanted[split]]
        return [record for key in chosen for record in self.records[key]]

    def _unsure(self, keys: list[Key], count: int, student: str, rng: np.random.Generator) -> list[Key]:
        answerer = Answerer.load(student)
        rows = [text_row(i, self.records[key][0][TEXT]) for i, key in enumerate(keys)]
        kept = [row for row in filter_rows(rows, self.task.comments, answerer.compiled.tokenizer) if row.status == KEPT]
        confidence = np.array([answer.confidence for answer in answerer.answer(kept)])
        return [keys[kept[i].row] for i in draw_unsure(confidence, count, rng)]


def open_pool(config: CommentsConfig, task: Task, tokenizer: TextTokenizer, folder: str) -> Pool:
    """Reads and filters the texts, once: what a folder holds of that stays.

    Raises:
        UserError: anything the user can mend.
    """
    paths = find_comments(config, task)
    source = describe_source(config, paths, task, tokenizer, ROWS_PER_UNIT)
    plan = find_plan(folder, source)
    if plan is None:
        plan = make_plan(folder, source, config, comment_tables(paths, source.columns(task), task, tokenizer))
    log.info("pool: %s", plan.summary())
    return Pool(source, task, _records(folder, plan, task, tokenizer))


def _records(folder: str, plan: Plan, task: Task, tokenizer: TextTokenizer) -> dict[Key, list[Record]]:
    """By text, in the order of the files."""
    share, found = MOST_TEXTS / plan.kept, defaultdict[Key, list[Record]](list)

    def values(tokens: list[int]) -> Record | None:
        read = task.parse(tokenizer.decode(tokens)) if tokens else None
        return dict(zip(task.fields, read, strict=True)) if read else None

    for unit in range(plan.units):
        for row in read_unit(folder, unit).to_pylist():
            key = text_key(row["text"])
            if int.from_bytes(key[8:16], "big") < share * 2**64 and (plan.source.answer or key not in found):
                given = {ANSWER: values(row["answer"]), GOLD: values(row["gold"])}
                given[PROBABILITIES] = json.loads(row["shares"]) if row["shares"] else None
                found[key].append({ID: row["id"], TEXT: row["text"]} | given)
    return dict(found)


def write_texts(path: str, records: Iterable[Record]) -> None:
    """A round's file."""
    known = ({name: value for name, value in record.items() if value is not None} for record in records)
    storage.write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in known))


def keys_in(path: str) -> set[Key]:
    """The texts in a round's file."""
    return {text_key(json.loads(line)[TEXT]) for line in storage.read_text(path).splitlines()}


def keys_of(shards_folder: str) -> set[Key]:
    """The texts in a folder of shards."""
    return {text_key(text) for table in open_shards(shards_folder).tables() for text in table.texts}


def columns_of(config: CommentsConfig, path: str) -> CommentsConfig:
    """How an extraction reads a round's file."""
    return CommentsConfig(
        paths=[path],
        text=TEXT,
        id=ID,
        answer=ANSWER if config.answer else None,
        probabilities=PROBABILITIES if config.probabilities else None,
        gold=GOLD if config.gold else None,
    )
