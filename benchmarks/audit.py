"""Whether an audited service notices that its texts are of another kind, and keeps quiet where they are not.

A student answers what it is certified to answer alone, in the product's own service; the teacher's answers are known from two
extractions, one of texts like those it was certified on, one of others. Each run sends texts of the first in a random order;
in half of the runs the others follow. An alarm before these is a false one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.results import keep
from pipeline.shards.manifest import open_shards
from pipeline.task.values import Scalar
from student.config import AnswerConfig, ServeConfig
from student.data.answers import teacher_answers
from student.data.examples import open_examples
from student.data.unpack import SPLIT_TENTHS, TEST, unpack
from student.decode.answerer import Answerer
from student.evaluate.evidence import thresholds_of
from student.model.checkpoint import load_student
from student.serve.service import Service

CHUNK = 32  # texts of a request

Known = dict[str, dict[str, Scalar]]


class Stored:
    """A teacher whose answers are known."""

    state, name = "ready", "stored"

    def __init__(self, known: Known) -> None:
        self._known = known

    def answer(self, texts: list[str]) -> list[dict[str, Scalar] | None]:
        """What it said."""
        return [self._known.get(text) for text in texts]

    def close(self) -> None:
        """Nothing to end."""


def known_answers(folder: str, splits: Iterator[str] | list[str]) -> Known:
    """The teacher's answers of some splits, by text."""
    shards, found = open_shards(folder), {}
    for split in splits:
        if len(unpack(shards)[split].get("choice_starts", [0])) > 1:
            examples = open_examples(shards, split, "choices")
            for i, values in enumerate(teacher_answers(examples)):
                found[examples.text(i)] = dict(zip(shards.compiled.task.fields, values, strict=True))
    return found


async def texts_until_alarm(service: Service, texts: list[str]) -> int | None:
    """How many texts were answered when the alarm came; None where it did not."""
    for start in range(0, len(texts), CHUNK):
        await service.classify(texts[start : start + CHUNK])
        await asyncio.gather(*service._audits)
        if service.audit and service.audit.alarm:
            return start + CHUNK
    return None


@click.command(help=__doc__)
@click.option("--student", required=True, metavar="DIR", help="Trained on the shards, and evaluated.")
@click.option("--shards", required=True, metavar="DIR", help="Whose test texts are sent first.")
@click.option("--others", required=True, metavar="DIR", help="Shards of the same task with texts of another kind.")
@click.option("--agree", default=0.9, show_default=True, help="What is certified.")
@click.option("--audit", "share", default=0.2, show_default=True, help="Share that is audited: high, as test texts are few.")
@click.option("--runs", default=20, show_default=True, help="Of each kind.")
def main(student: str, shards: str, others: str, agree: float, share: float, runs: int) -> None:
    """Prints and keeps what came of the runs."""
    like, unlike = known_answers(shards, [TEST]), known_answers(others, list(SPLIT_TENTHS))
    task = load_student(student)[1].task
    thresholds, found = thresholds_of(AnswerConfig(teacher="stored", agree=agree), student, task)
    rows: list[dict[str, Any]] = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        for turns in (False, True):
            service = Service(
                Answerer.load(student, thresholds=thresholds), ServeConfig(audit=share), Stored(like | unlike), found
            )
            first = rng.permutation(list(like)).tolist()
            sent = first + (rng.permutation([text for text in unlike if text not in like]).tolist() if turns else [])
            alarm = asyncio.run(texts_until_alarm(service, sent))
            service.close()
            rows.append({"seed": seed, "turns": turns, "alarm": alarm, "like": len(first), "sent": len(sent)})
            print(rows[-1], flush=True)
    keep("audit", {"agree": agree, "share": share, "coverage": found.coverage if found else None, "rows": rows})
    false = sum(row["alarm"] is not None and row["alarm"] <= row["like"] for row in rows)
    raised = [row["alarm"] - row["like"] for row in rows if row["turns"] and row["alarm"] and row["alarm"] > row["like"]]
    median = f", after a median of {np.median(raised):,.0f} of them" if raised else ""
    Console().print(f"{false} false alarms in {len(rows)} runs; {len(raised)} of {runs} turns to other texts noticed{median}")


if __name__ == "__main__":
    main()
