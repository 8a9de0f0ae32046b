from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.reading import SCHEMA as ROWS
from pipeline.shards import manifest
from pipeline.shards.files import ROW_COLUMNS, committed_units, read_shard, shard_path, write_shard
from pipeline.shards.manifest import open_shards, read_footer, read_footers, write_manifest
from pipeline.task.compiled import CompiledTask
from pipeline.task.tokenization import TextTokenizer
from pipeline.teacher.capture import TEMPERATURES, Captured
from tests.pipeline.task.test_compiled import make_compiled

FIELDS = {"sample": pa.field("sample", pa.int32())}
HASHES = {"task": "t", "tokenizer": "k", "watched set": "w"}
ABOUT = {"hashes": HASHES, "seconds": 0.5}
MANIFEST = {
    "hashes": HASHES,
    "files": ["a.jsonl", "b.jsonl"],
    "task_name": "t",
    "teacher": {"model": "none", "engine": None, "parameters": None, "spent": None},
    "comments": {"source": {"answer": None}},
}


def make_comments(rows: int, rng: np.random.Generator) -> pa.Table:
    content = [
        {
            "file": row % 2,
            "row": 2**40 + row,
            "sample": row % 3,
            "id": "" if row % 3 else f"é{row}",
            "text": f"text\x00\n {row} 😀",
            "tokens": rng.integers(0, 262_144, rng.integers(0, 6)).tolist(),
        }
        for row in range(rows)
    ]
    return pa.Table.from_pylist(content, schema=pa.schema([FIELDS.get(name) or ROWS.field(name) for name in ROW_COLUMNS]))


def make_captured(
    lengths: list[int], width: int, rng: np.random.Generator, scale: float = 10.0, share: float = 1.0
) -> Captured:
    shape = (len(lengths), max(lengths))
    inside = np.arange(shape[1]) < np.array(lengths)[:, None]
    logits = (rng.normal(size=(*shape, width)) * scale).astype(np.float32)
    lse = np.stack([np.logaddexp.reduce(logits.astype(float) / t, axis=-1) + 0.1 for t in TEMPERATURES], -1)
    kept = inside & (rng.random(shape) < share)
    return Captured(
        tokens=np.where(inside, rng.integers(1, 262_144, shape), 0).astype(np.int32),
        lengths=np.array(lengths, np.int32),
        kept=kept,
        logits=logits * kept[..., None],
        lse=lse.astype(np.float32) * kept[..., None],
    )


def one_step(logits: list[float], lse: list[float]) -> Captured:
    arrays = np.array([[logits]], np.float32), np.array([[lse]], np.float32)
    return Captured(np.array([[5]], np.int32), np.array([1], np.int32), np.ones((1, 1), bool), *arrays)


def write(folder: Path, unit: int = 0, lengths: tuple[int, ...] = (3, 1), width: int = 5, **about: Any) -> int:
    rng = np.random.default_rng(unit)
    comments = make_comments(len(lengths), rng)
    return write_shard(str(folder), unit, comments, make_captured(list(lengths), width, rng), ABOUT | about)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    width=st.integers(1, 9),
    scale=st.sampled_from([0.1, 10.0, 1000.0]),
    share=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], width: int, scale: float, share: float, seed: int
) -> None:
    folder, rng = str(tmp_path_factory.getbasetemp() / "shards"), np.random.default_rng(seed)
    comments, captured = make_comments(len(lengths), rng), make_captured(lengths, width, rng, scale, share)
    size = write_shard(folder, 3, comments, captured, ABOUT)
    assert size == Path(shard_path(folder, 3)).stat().st_size
    table = read_shard(shard_path(folder, 3))
    steps = [(row, step) for row, length in enumerate(lengths) for step in range(length)]
    rows, at = map(np.array, zip(*steps, strict=True))
    assert (table.keys.dtype, table.answers.dtype, table.logprobs.dtype, table.lse.dtype) == (
        np.int64,
        np.int32,
        np.float16,
        np.float32,
    )
    assert table.keys.tolist() == [[row % 2, 2**40 + row, row % 3] for row in range(len(lengths))]
    assert (table.ids, table.texts) == (comments["id"].to_pylist(), comments["text"].to_pylist())
    assert [tokens.tolist() for tokens in table.comments] == comments["tokens"].to_pylist()
    assert table.lengths.tolist() == lengths
    np.testing.assert_array_equal(table.answers, captured.tokens[rows, at])
    np.testing.assert_array_equal(table.kept, captured.kept[rows, at])
    rows, at = rows[table.kept], at[table.kept]
    np.testing.assert_array_equal(table.lse, captured.lse[rows, at])
    exact = captured.logits[rows, at].astype(float) - captured.lse[rows, at, :1]
    bound = np.maximum(np.abs(exact) * 2.0**-11, 2.0**-24) + np.abs(captured.logits[rows, at]) * 2.0**-22
    assert table.logprobs.shape == (len(rows), width)
    assert (np.abs(table.logprobs.astype(float) - exact) <= bound).all()


def test_a_logprob_near_zero_keeps_its_precision(tmp_path: Path) -> None:
    """Large raw logits would lose in float16 what their difference from the log-sum-exp keeps."""
    captured = one_step([1000.0, 1000.0 - 1 / 64], [1000.0 + 1 / 128, 500.0, 250.0])
    write_shard(str(tmp_path), 0, make_comments(1, np.random.default_rng(0)), captured, ABOUT)
    assert read_shard(shard_path(str(tmp_path), 0)).logprobs.tolist() == [[-1 / 128, -3 / 128]]


def test_writing_a_unit_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, lengths=(2, 2, 2))
    write(tmp_path, lengths=(4,))
    assert committed_units(str(tmp_path)) == [0]
    assert read_shard(shard_path(str(tmp_path), 0)).lengths.tolist() == [4]


def test_committed_units_are_those_with_a_shard(tmp_path: Path) -> None:
    assert committed_units(str(tmp_path / "absent")) == []
    for unit in (12, 3):
        write(tmp_path, unit)
    for name in ("shard-000007.parquet.tmp", "shard-x.parquet", ".writing-shard-000001.parquet", "manifest.json"):
        (tmp_path / name).write_text("")
    assert committed_units(str(tmp_path)) == [3, 12]


def test_the_manifest_adds_up_the_shards(tmp_path: Path) -> None:
    sizes = [write(tmp_path, unit, lengths) for unit, lengths in enumerate([(3, 1), (2,), (1, 1, 1)])]
    manifest = write_manifest(str(tmp_path), 3, MANIFEST)
    assert manifest.model_dump() == MANIFEST | {
        "format_version": 3,
        "units": 3,
        "rows": 6,
        "set_aside": 0,
        "steps": 9,
        "kept_steps": 9,
        "bytes": sum(sizes),
        "digest": manifest.digest,
        "teacher_seconds": 1.5,
        "codec": {"shards": {"float16": 3}, "kl": {}},
    }
    assert storage.read_json(str(tmp_path / "manifest.json")) == manifest.model_dump()


def test_footers_come_in_order_read_side_by_side_and_never_all_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in range(9):
        write(tmp_path, unit)
    monkeypatch.setattr(manifest, "THREADS", 3)
    monkeypatch.setattr(manifest, "FOOTERS", 3)
    together, asked = threading.Barrier(3, timeout=10), []

    def read(folder: str, unit: int) -> manifest.Footer:
        asked.append(unit)
        together.wait()
        return read_footer(folder, unit)

    monkeypatch.setattr(manifest, "read_footer", read)
    footers = read_footers(str(tmp_path), range(9))
    assert next(footers).unit == 0
    assert sorted(asked) == [0, 1, 2]
    assert [footer.unit for footer in footers] == list(range(1, 9))


def test_the_manifest_tells_extractions_of_equal_sizes_apart(tmp_path: Path) -> None:
    digests = []
    for name, units in {"one": (0, 1), "same": (0, 1), "other": (0, 2)}.items():
        for place, seed in enumerate(units):
            rng = np.random.default_rng(seed)
            write_shard(str(tmp_path / name), place, make_comments(2, rng), make_captured([3, 1], 5, rng), ABOUT)
        digests.append(write_manifest(str(tmp_path / name), 2, MANIFEST).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_missing_unit_is_named(tmp_path: Path) -> None:
    for unit in (0, 2):
        write(tmp_path, unit)
    with pytest.raises(UserError, match=r"2 of 4 units have no shard .* the first 1: run again"):
        write_manifest(str(tmp_path), 4, MANIFEST)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", list(HASHES))
def test_a_shard_of_other_hashes_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, hashes=HASHES | {name: "other"})
    with pytest.raises(UserError, match=rf"shard-000001\.parquet does not fit the manifest: another {name} \(other there"):
        write_manifest(str(tmp_path), 2, MANIFEST)


@pytest.fixture
def finished(tokenizer: TextTokenizer, tmp_path: Path) -> tuple[Path, CompiledTask]:
    compiled = make_compiled(tokenizer)
    compiled.save(str(tmp_path))
    for unit, lengths in enumerate([(3, 1), (2,)]):
        write(tmp_path, unit, lengths, compiled.watched.size, hashes=compiled.hashes)
    write_manifest(str(tmp_path), 2, MANIFEST | {"hashes": compiled.hashes})
    return tmp_path, compiled


def test_a_finished_extraction_opens(finished: tuple[Path, CompiledTask]) -> None:
    folder, compiled = finished
    shards = open_shards(str(folder))
    assert shards.compiled.hashes == compiled.hashes
    assert [table.lengths.tolist() for table in shards.tables()] == [[3, 1], [2]]
    assert shards.manifest.rows == 3


def test_without_a_manifest_nothing_opens(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"no manifest\.json .*holds no finished extraction"):
        open_shards(str(tmp_path))


def test_another_format_is_named(finished: tuple[Path, CompiledTask]) -> None:
    path = str(finished[0] / "manifest.json")
    storage.write_json(path, storage.read_json(path) | {"format_version": 1})
    with pytest.raises(UserError, match="has format 1, this Retort reads 3"):
        open_shards(str(finished[0]))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"instruction": "Another."}, "another task"), ({"fields": {"a": ["x"]}}, "another task .*, watched set")],
)
def test_another_task_is_named(
    finished: tuple[Path, CompiledTask], tokenizer: TextTokenizer, change: dict[str, Any], named: str
) -> None:
    make_compiled(tokenizer, **change).save(str(finished[0]))
    with pytest.raises(UserError, match=f"does not fit the compiled task beside it: {named}"):
        open_shards(str(finished[0]))


def test_another_tokenizer_is_named(finished: tuple[Path, CompiledTask], tokenizer: TextTokenizer) -> None:
    folder, compiled = finished
    other = TextTokenizer(tokenizer.serialized + "\n", tokenizer.end_id)
    dataclasses.replace(compiled, tokenizer=other).save(str(folder))
    with pytest.raises(UserError, match=r"another tokenizer \("):
        open_shards(str(folder))


def test_logprobs_far_below_zero_stay_finite(tmp_path: Path) -> None:
    captured = one_step([-60_000.0, 0.0], [0.0, 0.0, 0.0])
    write_shard(str(tmp_path), 0, make_comments(1, np.random.default_rng(0)), captured, ABOUT)
    assert all(math.isfinite(x) for x in read_shard(shard_path(str(tmp_path), 0)).logprobs[0])


def test_set_aside_rows_are_committed_with_the_shard_and_listed_beside_the_manifest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    poison = {"file": 1, "row": 41, "id": "é", "reason": "the engine died"}
    write_shard(str(tmp_path), 0, make_comments(2, rng), make_captured([2, 1], 5, rng), ABOUT, [poison])
    nothing = make_captured([1], 5, rng).select(np.array([False]))
    write_shard(str(tmp_path), 1, make_comments(1, rng)[:0], nothing, ABOUT, [poison | {"row": 42}])
    manifest = write_manifest(str(tmp_path), 2, MANIFEST)
    assert (manifest.rows, manifest.set_aside) == (2, 2)
    lines = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    assert lines == [{"file": "b.jsonl", "line": n, "id": "é", "reason": "the engine died"} for n in (42, 43)]
    empty = read_shard(shard_path(str(tmp_path), 1))
    assert (len(empty.keys), len(empty.answers), empty.comments, empty.texts) == (0, 0, [], [])
