"""`retort prune --chain`: a family of ever smaller students, each cut from the one before it, trained and evaluated.

The links are folders of their own, and each of a link's stages leaves what it has finished alone: a chain that was killed
goes on by the same command.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

from pipeline.base import storage
from pipeline.base.run import tracked_run
from pipeline.base.tracking import Tracking, tracking_uri
from pipeline.shards.manifest import open_shards
from student.config import StudentChanges
from student.evaluate.evaluate import evaluate
from student.prune.prune import prune
from student.prune.sizes import Sizes, parameters, target_sizes
from student.prune.source import open_source
from student.train.train import Child, train
from tune.config import TuneSettings

log = logging.getLogger(__name__)

CHAIN = "chain.json"  # in the chain's folder: what it is, and its run in MLflow
DONE = "link.json"  # in a link's folder, written last


def run_chain(config: TuneSettings, shards_folder: str, folder: str) -> str:
    """Prunes, trains and evaluates every link; returns the chain's run in MLflow.

    Args:
        config: of the run; `prune.chain` has the links' shares of the source's parameters.
        folder: gets a folder for each link, with `pruned`, `student` and `report`.

    Raises:
        UserError: the source or the shards are unusable, the smallest link cannot be cut, or the folder holds another chain.
        Stopped: a signal ended it early.
    """
    source = open_source(config.prune, config.student.sequence or "full", open_shards(shards_folder))
    whole = parameters(source.shape, Sizes.of(source.shape))
    for share in config.prune.chain:  # better refused now than after the links before
        target_sizes(config.prune.model_copy(update={"chain": (), "fraction": share}), source.shape)
    identity: dict[str, Any] = {"source": source.identity, "prune": config.prune.recipe(), "train": config.train.recipe()}
    settings = identity | {"links": list(config.prune.chain)}  # a chain that was begun may have had fewer

    def start() -> Tracking:
        uri = tracking_uri(config.tracking.uri, config.out or ".")
        return Tracking.start(uri, config.tracking.experiment, "chain", settings, "chain")

    with tracked_run(folder, CHAIN, identity, "chain", start) as tracking:
        place = source.place
        for share in config.prune.chain:
            place = _link(config, shards_folder, folder, place, share, whole, tracking.run_id)
        return tracking.run_id


def _link(config: TuneSettings, shards: str, folder: str, source: str, share: float, whole: int, run: str) -> str:
    """One link; returns its student's folder."""
    name = str(Fraction(share).limit_denominator(1000))
    link = storage.join(folder, name.replace("/", "-"))
    pruned, student, report, done = (storage.join(link, part) for part in ("pruned", "student", "report", DONE))
    log.info("link %s of %s parameters", name, f"{whole:,}")
    cut = config.prune.model_copy(update={"source": source, "chain": (), "fraction": share})
    prune(cut, config.train, config.student, shards, pruned, whole)
    training = config.model_copy(
        update={
            "train": config.train.model_copy(update={"init": pruned}),
            "student": StudentChanges(dropout=config.student.dropout),
        }
    )
    train(training, shards, student, Child(name, run))
    if not storage.exists(done):
        figures = evaluate(config.floors, config.train, shards, student, report)
        storage.write_json(done, {"whole": figures["student"]["whole"], "parameters": figures["sizes"]["student"]})
    return student
