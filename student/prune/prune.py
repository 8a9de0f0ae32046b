"""`retort prune`: a smaller student from the important units of a trained model.

Importance is measured by Ray workers, each with the whole model and a share of the examples; one of them then cuts.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from pipeline.base import storage
from pipeline.base.capacity import require_room
from pipeline.base.errors import UserError
from pipeline.base.run import find_run
from pipeline.base.runtime import start_ray
from pipeline.shards.manifest import open_shards
from student.config import PruneConfig, StudentChanges, TrainConfig
from student.data.unpack import unpack
from student.model.checkpoint import PRUNED
from student.prune.cut import Kept
from student.prune.importance import importance
from student.prune.page import write_page
from student.prune.sizes import Sizes, parameters, target_sizes
from student.prune.source import open_source
from student.prune.workers import measure_all, start_workers

log = logging.getLogger(__name__)


def prune(
    config: PruneConfig,
    train: TrainConfig,
    student: StudentChanges,
    shards_folder: str,
    folder: str,
    whole: int | None = None,
) -> dict[str, Any]:
    """Writes a student cut from a trained model to `folder`; returns what prune.json holds.

    A folder that already holds this very student is left as it is.

    Args:
        train: says how many workers measure, and what each has.
        student: says what a student cut from a Gemma 3 model reads of answers.
        whole: parameters that `fraction` is a share of; by default the source's.

    Raises:
        UserError: the source or the shards are unusable, it has no such sizes, or the folder holds another student.
    """
    if not config.has_target:
        raise UserError(
            "nothing says how small: give --fraction (1 keeps all), --params, or sizes such as --set prune.width=512"
        )
    shards = open_shards(shards_folder)
    source = open_source(config, student.sequence or "full", shards)
    sizes = target_sizes(config, source.shape, whole)
    identity = {
        "source": source.identity,
        "shards": shards.manifest.model_dump(mode="json", include={"hashes", "digest"}),
        "prune": config.recipe() | {"sequence": source.shape.sequence},
        "sizes": vars(sizes),
    }
    done = find_run(folder, PRUNED, identity, "pruned student")
    if done:
        log.info("%s already holds this student", folder)
        return done
    run = source.run
    unpack(shards)  # damaged ones are better refused now
    start_ray()
    require_room("pruning", train.most_workers, train.resources)
    started = time.monotonic()
    workers = start_workers(train, shards_folder, source)
    log.info("measuring what matters in %s on %s examples", source.place, f"{config.examples:,}")
    scores = importance(measure_all(workers, config.examples, shards, source.shape), source.shape.layers)
    scored = time.monotonic() - started
    kept: Kept = ray.get(workers[0].cut.remote(sizes, scores, folder))
    before, after = (parameters(source.shape, some) for some in (Sizes.of(source.shape), sizes))
    about = identity | {
        "kept": kept.as_dict(),
        "parent_run": run,
        "parameters": {"source": before, "student": after},
        "seconds": {"scoring": scored, "all": time.monotonic() - started},
    }
    write_page(folder, about, scores)
    storage.write_json(storage.join(folder, PRUNED), about)
    log.info("cut %s of %s parameters: %s", f"{after / 1e6:,.2f} M", f"{before / 1e6:,.2f} M", describe(sizes))
    return about


def describe(sizes: Sizes) -> str:
    """Sizes for people."""
    return f"{sizes.layers} layers, width {sizes.width}, {sizes.heads} heads, {sizes.mlp} neurons"
