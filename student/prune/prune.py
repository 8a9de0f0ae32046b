"""`retort prune`: a smaller student from the important units of a trained model.

Importance is measured by Ray workers, each with the whole model and a share of the examples; one of them then cuts.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import ray
import torch

from cluster.room import ray_options, require_room
from cluster.runtime import MALLOC, start_ray
from cluster.version import VARIABLE, check_code_version, code_version
from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import open_shards
from student.checkpoint import save_student
from student.examples import open_examples
from student.prune.config import PRUNED, PruneConfig
from student.prune.cut import choose, cut
from student.prune.importance import LEAVE_OUT, Importance, Sums, importance, measure
from student.prune.page import write_page
from student.prune.sizes import Sizes, parameters, target_sizes
from student.prune.source import Source, open_source
from student.unpack import TRAIN

log = logging.getLogger(__name__)

IMPORTANCE = "importance.safetensors"


def prune(config: PruneConfig, shards_folder: str, folder: str, whole: int | None = None) -> dict[str, Any]:
    """Writes a student cut from a trained model to `folder`; returns what prune.json holds.

    A folder that already holds this very student is left as it is.

    Args:
        config: of the pruning.
        shards_folder: whose training examples importance is measured on.
        folder: where the student goes, with its importance.
        whole: parameters that `fraction` is a share of; by default the source's.

    Raises:
        UserError: the source or the shards are unusable, it has no such sizes, or the folder holds another student.
    """
    shards = open_shards(shards_folder)
    source = open_source(config, shards)
    sizes = target_sizes(config, source.shape, whole)
    identity = {
        "source": source.identity,
        "shards": {key: shards.manifest[key] for key in ("hashes", "digest")},
        "prune": config.recipe(),
        "sizes": vars(sizes),
    }
    done = _found(storage.join(folder, PRUNED), identity, folder)
    if done:
        log.info("%s already holds this student", folder)
        return done
    start_ray()
    require_room("pruning", config.workers, config.resources)
    started = time.monotonic()
    scores = importance(_score(config, shards_folder, source), config.over_batch, source.shape.layers)
    scored = time.monotonic() - started
    before, after = (parameters(source.shape, some) for some in (Sizes.of(source.shape), sizes))
    facts: dict[str, Any] = {"parent_run": source.run}
    facts |= ray.get(_task(_cut, config).remote(config, shards_folder, source, sizes, scores, folder))
    about = identity | facts | {"parameters": {"source": before, "student": after}, "seconds": {"scoring": scored}}
    about["seconds"]["all"] = time.monotonic() - started
    write_page(folder, about, scores)
    storage.write_json(storage.join(folder, PRUNED), about)
    log.info("cut %s of %s parameters: %s", f"{after / 1e6:,.2f} M", f"{before / 1e6:,.2f} M", describe(sizes))
    return about


def describe(sizes: Sizes) -> str:
    """Sizes for people."""
    return f"{sizes.layers} layers, width {sizes.width}, {sizes.heads} heads, {sizes.mlp} neurons"


def _found(path: str, identity: dict[str, Any], folder: str) -> dict[str, Any] | None:
    if not storage.exists(path):
        return None
    found: dict[str, Any] = storage.read_json(path)
    differ = [name for name in identity if found.get(name) != identity[name]]
    if differ:
        raise UserError(
            f"{folder} holds a student cut otherwise (its {', '.join(differ)} differ): choose another --out, or delete it"
        )
    return found


def _score(config: PruneConfig, shards_folder: str, source: Source) -> list[Sums]:
    log.info("measuring what matters in %s on %s examples", source.place, f"{config.examples:,}")
    task = _task(_measure, config)
    parts: list[Sums] = ray.get([task.remote(config, shards_folder, source, rank) for rank in range(config.workers)])
    return parts


def _task(function: Any, config: PruneConfig) -> Any:
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    environment = MALLOC | {VARIABLE: code_version(), "OMP_NUM_THREADS": str(threads)}
    return ray.remote(**ray_options(config.resources), runtime_env={"env_vars": environment}, max_retries=2)(function)


def _measure(config: PruneConfig, shards_folder: str, source: Source, rank: int) -> Sums:
    """One worker's share of the examples, spread evenly over the training split."""
    check_code_version()
    shards, shape = open_shards(shards_folder), source.shape
    examples = open_examples(shards, TRAIN, shape.sequence, shape.separator)
    chosen = np.unique(np.linspace(0, len(examples) - 1, config.examples).astype(np.int64))[rank :: config.workers]
    model = source.load(shards.compiled.watched.tokens).to("cuda" if torch.cuda.is_available() else "cpu")
    leave_out = -(-LEAVE_OUT // config.workers)
    over = {"over_sequence": config.over_sequence, "over_batch": config.over_batch}
    return measure(model, examples, chosen, leave_out, config.batch_size, **over)


def _cut(
    config: PruneConfig, shards_folder: str, source: Source, sizes: Sizes, scores: Importance, folder: str
) -> dict[str, Any]:
    """Writes the student; returns which units it kept."""
    check_code_version()
    compiled = open_shards(shards_folder).compiled
    ranks = scores.shuffled(config.seed) if config.rank == "random" else scores
    kept = choose(ranks, source.shape, sizes, config.rank_layers)
    save_student(folder, cut(source.load(compiled.watched.tokens), kept, scores), compiled)
    scores.save(storage.join(folder, IMPORTANCE))
    return {"kept": kept.as_dict()}
