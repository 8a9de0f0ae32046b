"""Several folders of shards of one task as one to train on: what was asked at different times, each text once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.reading import text_key
from pipeline.shards.files import GOLD, ShardTable, write_shard
from pipeline.shards.manifest import Manifest, Shards, Totals, open_shards, write_manifest
from pipeline.shards.merge import merge
from pipeline.task.compiled import require_same
from pipeline.teacher.capture import Captured

log = logging.getLogger(__name__)


def join(folders: Sequence[str], out: str) -> Manifest:
    """Writes the examples of several extractions of one task to the folder `out`, or finds that they are there.

    A text that several folders have is that of the first. Where their tokenizers or watched tokens differ, probabilities go
    over by value, see `pipeline.shards.merge`, and a text has the mean of them.

    Raises:
        UserError: the folders are unusable, of different tasks, or `out` holds other shards.
    """
    extractions = [open_shards(folder) for folder in folders]
    digests = [shards.manifest.digest for shards in extractions]
    if storage.exists(storage.join(out, "manifest.json")):
        found = open_shards(out).manifest
        if getattr(found, "joined", None) != digests:
            raise UserError(f"{out} holds other shards: choose another --out, or delete it")
        return found
    for other in extractions[1:]:
        wanted = extractions[0].compiled.task.hash
        require_same({"task": other.compiled.task.hash}, {"task": wanted}, other.folder, extractions[0].folder)
    if any(shards.compiled.hashes != extractions[0].compiled.hashes for shards in extractions):
        return merge(folders, [], True, out, {"joined": digests})
    return _write(extractions, out, {"joined": digests})


def _write(extractions: list[Shards], out: str, about: dict[str, Any]) -> Manifest:
    compiled, units = extractions[0].compiled, 0
    for rows, captured, seconds in _new(extractions):
        write_shard(out, units, rows, captured, {"hashes": compiled.hashes, "seconds": seconds})
        units += 1
    compiled.save(out)
    manifests = [shards.manifest for shards in extractions]
    like = next((one for one in manifests if one.answers == "given"), manifests[0])
    files = [file for manifest in manifests for file in manifest.files]
    about |= like.model_dump(mode="json", exclude=set(Totals.model_fields)) | {"files": files}
    manifest = write_manifest(out, units, about)
    log.info("%s examples of %s folders in %s", f"{manifest.rows:,}", len(extractions), out)
    return manifest


def _new(extractions: list[Shards]) -> Iterator[tuple[pa.Table, Captured, float]]:
    """Each shard's examples whose texts stand in no folder before, as they were captured, and the seconds these took."""
    before, first = set[bytes](), 0
    for shards in extractions:
        mine = set[bytes]()
        for table in shards.tables():
            keys = [text_key(text) for text in table.texts]
            new = np.array([key not in before for key in keys])
            mine.update(keys)
            if new.any():
                rows = _rows(table, first).filter(pa.array(new))
                yield rows, captured_of(table).select(new), table.facts["seconds"] * new.mean()
        before |= mine
        first += len(shards.manifest.files)


def _rows(table: ShardTable, first_file: int) -> pa.Table:
    file, row, sample = table.keys.T
    columns = {"file": pa.array(file + first_file, pa.int32()), "row": row, "sample": pa.array(sample, pa.int32())}
    columns |= {"id": table.ids, "text": table.texts}
    columns |= {
        name: pa.array(ids, pa.list_(pa.int32())) for name, ids in (("tokens", table.comments), (GOLD.name, table.gold))
    }
    return pa.table(columns)


def captured_of(table: ShardTable) -> Captured:
    """A shard's answers as the engine gave them, to the precision that is stored: float64 keeps the float16 they came from."""
    inside = np.arange(table.lengths.max()) < table.lengths[:, None]
    tokens, kept = np.zeros(inside.shape, np.int32), np.zeros(inside.shape, np.bool_)
    tokens[inside], kept[inside] = table.answers, table.kept
    lse: Any = _spread(kept, table.lse.astype(np.float64))
    logits: Any = _spread(kept, table.logprobs.astype(np.float64) + table.lse[:, :1].astype(np.float64))
    return Captured(tokens, table.lengths.astype(np.int32), kept, logits, lse)


def _spread(kept: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of kept steps at their places: [N, T, ...]."""
    spread = np.zeros((*kept.shape, *values.shape[1:]))
    spread[kept] = values
    return spread
