from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.shards.jsonl import export, import_
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import CompiledTask
from tests.student.conftest import compiled, made_up_shards  # noqa: F401 - a fixture


def test_shards_come_back_as_they_were(tmp_path: Path, compiled: CompiledTask) -> None:  # noqa: F811
    shards = made_up_shards(tmp_path / "shards", compiled, 300)
    assert export(shards.folder, str(tmp_path / "jsonl")) == 3
    files = sorted((tmp_path / "jsonl").glob("examples-*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in files] == [128, 128, 44]
    manifest = import_(str(tmp_path / "jsonl"), str(tmp_path / "again"))
    assert (manifest.rows, manifest.steps) == (300, shards.manifest.steps)
    again = list(open_shards(str(tmp_path / "again")).tables())
    (table,) = shards.tables()
    for name in ("keys", "answers", "lengths", "kept", "logprobs", "lse"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in again]), getattr(table, name))
    assert [text for part in again for text in part.texts] == table.texts
    assert [ids.tolist() for part in again for ids in part.comments] == [ids.tolist() for ids in table.comments]


def test_a_line_is_readable_by_itself(tmp_path: Path, compiled: CompiledTask) -> None:  # noqa: F811
    shards = made_up_shards(tmp_path / "shards", compiled, 3)
    export(shards.folder, str(tmp_path / "jsonl"))
    line = json.loads((tmp_path / "jsonl/examples-000000.jsonl").read_text().splitlines()[1])
    assert compiled.task.parse(line["answer"]) is not None
    assert np.array(line["logits"]).shape == (len(line["answer_tokens"]), compiled.watched.size)
    logits, lse = np.array(line["logits"]), np.array(line["lse"])
    np.testing.assert_allclose(np.log(np.exp(logits).sum(1)), lse[:, 0], atol=2e-2)  # the made-up mass is all on W


@pytest.mark.parametrize("broken", ["{", '{"answer_tokens": [1], "row": 0}'])
def test_broken_lines_are_named(tmp_path: Path, compiled: CompiledTask, broken: str) -> None:  # noqa: F811
    shards = made_up_shards(tmp_path / "shards", compiled, 3)
    export(shards.folder, str(tmp_path / "jsonl"))
    (tmp_path / "jsonl/examples-000000.jsonl").write_text(broken + "\n")
    with pytest.raises(UserError, match=r"line 1 is not JSON|row 0 does not fit the task"):
        import_(str(tmp_path / "jsonl"), str(tmp_path / "again"))
