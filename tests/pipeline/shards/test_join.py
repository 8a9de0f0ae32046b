from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.comments.reading import text_key
from pipeline.shards.files import read_shard
from pipeline.shards.join import join
from pipeline.shards.manifest import Shards, open_shards
from pipeline.task.compiled import CompiledTask
from tests.pipeline.shards.test_merge import ONE, TWO, shards, shares
from tests.student.conftest import compiled, made_up_shards  # noqa: F401 - a fixture


def _examples(shards: Shards) -> dict[bytes, list[tuple[object, ...]]]:
    """What is stored of each text."""
    found: dict[bytes, list[tuple[object, ...]]] = {}
    for table in shards.tables():
        steps, kept = np.cumsum(table.lengths)[:-1], np.split(table.kept, np.cumsum(table.lengths)[:-1])
        logits = np.cumsum([some.sum() for some in kept])[:-1]
        parts = [np.split(table.answers, steps), kept, np.split(table.logprobs, logits), np.split(table.lse, logits)]
        for text, comment, *arrays in zip(table.texts, table.comments, *parts, strict=True):
            found.setdefault(text_key(text), []).append((text, comment.tobytes(), *(array.tobytes() for array in arrays)))
    return found


def test_each_text_is_there_once_and_to_the_bit(tmp_path: Path, compiled: CompiledTask) -> None:  # noqa: F811
    one, two = (made_up_shards(tmp_path / name, compiled, 200, seed) for seed, name in enumerate(("one", "two")))
    manifest = join([one.folder, two.folder], str(tmp_path / "both"))
    first, second, found = _examples(one), _examples(two), _examples(open_shards(str(tmp_path / "both")))
    assert found == second | first
    assert manifest.rows == sum(map(len, found.values()))
    assert manifest.files == [*one.manifest.files, *two.manifest.files]
    (table,) = two.tables()
    last = read_shard(str(tmp_path / "both" / "shard-000001.parquet"))
    assert [manifest.files[file] for file in last.keys[:, 0]] == [two.manifest.files[0]] * len(last.keys)
    assert set(map(tuple, last.keys[:, 1:].tolist())) <= set(map(tuple, table.keys[:, 1:].tolist()))


def test_the_same_command_finds_its_shards_and_another_is_refused(tmp_path: Path, compiled: CompiledTask) -> None:  # noqa: F811
    one, two = (made_up_shards(tmp_path / name, compiled, 20, seed) for seed, name in enumerate(("one", "two")))
    out = str(tmp_path / "both")
    assert join([one.folder, two.folder], out) == join([one.folder, two.folder], out)
    with pytest.raises(UserError, match="holds other shards"):
        join([two.folder, one.folder], out)


def test_of_other_tokenizers_values_are_joined(tmp_path: Path) -> None:
    folders = [shards(tmp_path / "one", ONE), shards(tmp_path / "two", TWO)]
    manifest = join(folders, str(tmp_path / "both"))
    assert manifest.rows == 4
    assert set(shares(tmp_path / "both")) == {"a", "b", "only here", "only there"}
    assert join(folders, str(tmp_path / "both")).digest == manifest.digest
