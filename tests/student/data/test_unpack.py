from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.files import ShardTable
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.data.unpack import SPLIT_TENTHS, TEST, TRAIN, VALIDATION, Columns, split_of, token_counts, unpack
from tests.student.extraction import make_up, write_extraction
from tests.tiny import ROOT

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


def pieces(columns: Columns, starts: str, name: str) -> list[np.ndarray]:
    """The values of each example."""
    edges = columns[starts]
    assert edges[0] == 0
    assert edges[-1] == len(columns[name])
    return [columns[name][edges[i] : edges[i + 1]] for i in range(len(edges) - 1)]


def texts_of(columns: Columns) -> list[str]:
    return [text.tobytes().decode() for text in pieces(columns, "text_starts", "text")]


def leftovers(cache: Path) -> list[str]:
    """What a cache holds beside whole extractions and their locks."""
    return [path.name for path in (cache / "shards").iterdir() if path.name.startswith(".")]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def extraction(compiled: CompiledTask, tmp_path: Path) -> Shards:
    units = [make_up(compiled, [f"comment {unit} {i}" for i in range(20)], unit) for unit in range(3)]
    return write_extraction(tmp_path / "extraction", compiled, units)


def test_splits_share_nothing_and_cover_everything(shards: Shards) -> None:
    splits = {split: texts_of(columns) for split, columns in unpack(shards).items()}
    assert set(splits) == {TRAIN, VALIDATION, TEST}
    assert sum(map(len, splits.values())) == shards.manifest.rows
    assert len(set().union(*splits.values())) == sum(len(set(texts)) for texts in splits.values())
    assert len(splits[TRAIN]) > 0.7 * shards.manifest.rows
    for split, texts in splits.items():
        assert {split_of(text) for text in texts} == {split}


def test_splits_are_eight_one_and_one_tenths() -> None:
    drawn = [split_of(f"comment {i}") for i in range(4000)]
    shares = [drawn.count(split) / 4000 for split in (TRAIN, VALIDATION, TEST)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert sorted(tenth for tenths in SPLIT_TENTHS.values() for tenth in tenths) == list(range(10))


@given(text=st.text())
def test_case_and_spacing_do_not_move_a_comment_to_another_split(text: str) -> None:
    assert split_of(f"  {text} \n") == split_of(text)
    assert split_of("Hello  THERE") == split_of("hello there")


def test_repeated_comments_stay_in_one_split(compiled: CompiledTask, tmp_path: Path) -> None:
    texts = [f"comment {i}" for i in range(30)]
    again = [text.upper() for text in texts] + [f" {text}\n" for text in texts]
    shards = write_extraction(tmp_path, compiled, [make_up(compiled, texts, 0), make_up(compiled, again, 1)])
    for columns in unpack(shards).values():
        normal = [" ".join(text.lower().split()) for text in texts_of(columns)]
        assert all(normal.count(text) == 3 for text in normal)


@settings(max_examples=25)
@given(
    units=st.lists(st.lists(TEXTS, max_size=6), min_size=1, max_size=3).filter(any),
    choices_alone=st.booleans(),
    seed=st.integers(0, 99),
)
def test_columns_hold_what_the_shards_do(
    compiled: CompiledTask,
    tmp_path_factory: pytest.TempPathFactory,
    units: list[list[str]],
    choices_alone: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("extraction")
    said = [make_up(compiled, texts, seed + i) for i, texts in enumerate(units)]
    unpacked = unpack(write_extraction(folder, compiled, said, choices_alone))
    for split, columns in unpacked.items():
        expected = [one for unit in said for one in unit if split_of(one.text) == split]
        assert len(columns["choice_starts"]) == len(expected) + 1
        assert texts_of(columns) == [one.text for one in expected]
        comments = compiled.tokenizer.encode([one.text for one in expected])
        assert [comment.tolist() for comment in pieces(columns, "comment_starts", "comment")] == comments
        assert [answer.tolist() for answer in pieces(columns, "answer_starts", "answer")] == [one.answer for one in expected]
        states = [compiled.automaton.walk(one.answer)[:-1] for one in expected]
        choices = [~compiled.automaton.forced[walked] for walked in states]
        kept = choices if choices_alone else [np.ones(len(walked), bool) for walked in states]
        assert [state.tolist() for state in pieces(columns, "answer_starts", "state")] == states
        assert [steps.tolist() for steps in pieces(columns, "answer_starts", "kept")] == [steps.tolist() for steps in kept]
        assert np.diff(columns["choice_starts"]).tolist() == [int(steps.sum()) for steps in choices]
        values, lse = (pieces(columns, "kept_starts", name) for name in ("values", "lse"))
        assert {column.dtype for column in values} <= {np.dtype(np.float16)}
        for one, steps, found, sums in zip(expected, kept, values, lse, strict=True):
            np.testing.assert_array_equal(found, (one.logits - one.lse[:, :1])[steps].astype(np.float16))
            np.testing.assert_array_equal(sums, one.lse[steps])


def test_values_stay_packed_where_every_shard_is_compact(compiled: CompiledTask, tmp_path: Path) -> None:
    said = [make_up(compiled, [f"{unit} {i}" for i in range(40)], unit, scale=0.01) for unit in range(2)]
    shards = write_extraction(tmp_path, compiled, said, compact=True)
    assert shards.manifest.codec.shards == {"compact": 2}
    tables = list(shards.tables())
    codes = np.concatenate([table.stored.values for table in tables])
    owners = np.concatenate([np.repeat(table.texts, table.lengths) for table in tables])
    for split, columns in unpack(shards).items():
        mine = np.array([split_of(text) == split for text in owners])
        assert columns["values"].dtype == np.int8
        np.testing.assert_array_equal(columns["values"], codes[mine])
        np.testing.assert_array_equal(columns["lse"], np.concatenate([table.lse for table in tables])[mine])


def test_columns_are_mapped_and_unpacked_once(extraction: Shards, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = unpack(extraction)
    mapped = [column for column in first[TRAIN].values() if len(column)]  # there are no labels
    assert all(isinstance(column, np.memmap) and not column.flags.writeable for column in mapped)

    def never(_: Shards) -> Iterator[ShardTable]:
        raise AssertionError("read again")

    monkeypatch.setattr(Shards, "tables", never)
    for split, columns in unpack(extraction).items():
        assert list(columns) == list(first[split])
        for name, column in columns.items():
            np.testing.assert_array_equal(column, first[split][name])
    assert leftovers(empty_cache) == []


def test_another_extraction_has_columns_of_its_own(compiled: CompiledTask, tmp_path: Path, empty_cache: Path) -> None:
    said = make_up(compiled, ["one", "two", "three"], 0)
    first = write_extraction(tmp_path / "a", compiled, [said])
    second = write_extraction(tmp_path / "b", compiled, [said[:2]])
    rows = [sum(len(columns["choice_starts"]) - 1 for columns in unpack(shards).values()) for shards in (first, second)]
    assert rows == [3, 2]


def test_a_failed_unpacking_leaves_nothing(extraction: Shards, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Shards.tables

    def failing(self: Shards) -> Iterator[ShardTable]:
        yield next(tables(self))
        raise OSError("the bucket is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "tables", failing)
        with pytest.raises(OSError, match="the bucket is gone"):
            unpack(extraction)
    assert [path.suffix for path in (empty_cache / "shards").iterdir()] == [".lock"]
    assert sum(len(texts_of(columns)) for columns in unpack(extraction).values()) == 60


CHILD = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
from pipeline.shards.manifest import Shards, open_shards
from student.data.unpack import unpack
how, folder, ready, go = sys.argv[1:]
shards, tables = open_shards(folder), Shards.tables
reads = 0
def slow(self):
    global reads
    for table in tables(self):
        reads += 1
        yield table
        if how == "die" and reads == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
Shards.tables = slow
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.005)
columns = unpack(shards)
digest = {split: {name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in found.items()}
          for split, found in columns.items()}
print(json.dumps([reads, digest]))
"""


def start(how: str, shards: Shards, cache: Path, ready: Path, go: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"RETORT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, how, shards.folder, str(ready), str(go)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def digest(shards: Shards) -> dict[str, dict[str, str]]:
    columns = unpack(shards)
    return {
        split: {name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in found.items()}
        for split, found in columns.items()
    }


def test_a_killed_unpacking_is_taken_for_nothing_and_cleaned_up(extraction: Shards, tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "go").touch()
    child = start("die", extraction, empty_cache, tmp_path / "ready", tmp_path / "go")
    assert child.wait(100) == -signal.SIGKILL
    assert len(leftovers(empty_cache)) == 1
    assert not [path for path in (empty_cache / "shards").iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert sum(len(texts_of(columns)) for columns in unpack(extraction).values()) == 60
    assert leftovers(empty_cache) == []


def test_processes_that_unpack_at_once_all_get_whole_columns(extraction: Shards, tmp_path: Path, empty_cache: Path) -> None:
    children = [start("live", extraction, empty_cache, tmp_path / f"ready{i}", tmp_path / "go") for i in range(2)]
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert all(child.poll() is None for child in children)
    (tmp_path / "go").touch()
    found = [json.loads(child.communicate(timeout=100)[0]) for child in children]
    assert sorted(reads for reads, _ in found) == [0, 3]  # one read the shards, the other waited
    assert [columns for _, columns in found] == [digest(extraction)] * 2


def test_counting_tokens_copies_no_more_than_a_piece_of_them(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 50, 5_000_000, np.int32)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", np.int32, "r")
    tracemalloc.start()
    counts = token_counts(mapped, 60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.tolist() == np.bincount(ids, minlength=60).tolist()
    assert peak < ids.nbytes / 2
