"""Damaged shards: every command that reads them says in one line which file is damaged, before it begins anything."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import UserError
from pipeline.shards.files import METADATA
from pipeline.shards.manifest import About, write_manifest
from pipeline.shards.payload import CODEC_FILE
from pipeline.task.compiled import CompiledTask
from tests.hostile import damage
from tests.hostile.damage import Case, Damage, assert_one_line, filled, in_json, in_tensors, retort, shorten, write
from tests.student.conftest import compiled  # noqa: F401 - a fixture
from tests.student.extraction import make_up, write_extraction

SHARD, MANIFEST = "shard-000001.parquet", "manifest.json"
FUZZED = 80  # files changed at random
SECONDS = 120  # after which a command hangs, also on a busy machine

Table = Callable[[pa.Table], pa.Table]


def in_table(change: Table) -> Damage:
    """The table of a shard changed, its metadata kept."""

    def harm(path: Path) -> None:
        table = pq.read_table(path)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)

    return harm


def in_facts(**changes: object) -> Damage:
    """What a shard says of itself changed."""

    def harm(path: Path) -> None:
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[METADATA]) | changes
        kept = {name: value for name, value in facts.items() if value is not ...}
        pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(kept)}), path)

    return harm


def with_column(name: str, change: Callable[[pa.ChunkedArray], pa.Array]) -> Damage:
    return in_table(lambda table: table.set_column(table.schema.get_field_index(name), name, change(table[name])))


def bare(path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2], "text": ["x", "y"]}), path)


def of_unit_0(path: Path) -> None:
    shutil.copy(path.with_name("shard-000000.parquet"), path)


def flipped(path: Path) -> None:
    """One byte in the middle of the rows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def shorter(column: pa.ChunkedArray) -> pa.Array:
    """Each list without its last value."""
    return pa.array([values[:-1] for values in column.to_pylist()], column.type)


def none(column: pa.ChunkedArray) -> pa.Array:
    return pa.nulls(len(column), column.type)


def other_answers(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([values[::-1] for values in column.to_pylist()], column.type)


def not_finite(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([[float("nan")] * len(values) for values in column.to_pylist()], column.type)


CASES: dict[str, Case] = {
    "missing": (SHARD, damage.remove),
    "empty": (SHARD, write(b"")),
    "cut": (SHARD, shorten(0.5)),
    "cut by a byte": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-1]) and None),
    "no Parquet": (SHARD, write(b"PAR1" + b"\x00" * 500 + b"PAR1")),
    "a byte flipped": (SHARD, flipped),
    "a folder": (SHARD, damage.folder),
    "a FIFO": (SHARD, damage.fifo),
    "a foreign table": (SHARD, foreign),
    "no metadata": (SHARD, bare),
    "metadata without hashes": (SHARD, in_facts(hashes=...)),
    "metadata of words": (SHARD, in_facts(watched="many")),
    "another width": (SHARD, in_facts(watched=5)),
    "another task's": (SHARD, in_facts(hashes={"task": "0"})),
    "another unit's": (SHARD, of_unit_0),
    "another extraction's": (MANIFEST, in_json(digest="0123456789abcdef")),
    "a column missing": (SHARD, in_table(lambda table: table.drop_columns(["lse"]))),
    "a column of another type": (SHARD, with_column("file", lambda column: column.cast(pa.string()))),
    "a column of nulls": (SHARD, with_column("text", none)),
    "fewer logits than steps": (SHARD, with_column("logprobs", shorter)),
    "fewer marks than steps": (SHARD, with_column("kept", shorter)),
    "fewer steps than said": (SHARD, in_table(lambda table: table.slice(1))),
    "answers of another task": (SHARD, with_column("answer_tokens", other_answers)),
    "logits that are not numbers": (SHARD, with_column("logprobs", not_finite)),
    "manifest, {}": (MANIFEST, write(b"{}")),
    "manifest, []": (MANIFEST, write(b"[]")),
    "manifest, empty": (MANIFEST, write(b"")),
    "manifest, cut": (MANIFEST, shorten(0.5)),
    "manifest, no hashes": (MANIFEST, in_json(hashes=...)),
    "manifest, no digest": (MANIFEST, in_json(digest=...)),
    "manifest, units of words": (MANIFEST, in_json(units="two")),
    "manifest, more units": (MANIFEST, in_json(units=3)),
    "manifest, a FIFO": (MANIFEST, damage.fifo),
    "automaton, zeros": ("automaton.safetensors", in_tensors(next_state=filled(0))),
}
NAMED = {"another extraction's": "manifest.json", "manifest, more units": "shard-000002.parquet"}
CODEC_CASES: dict[str, Damage] = {
    "missing": damage.remove,
    "cut": shorten(0.7),
    "not finite": in_tensors(means_SW=filled(float("nan"))),
    "fewer states": in_tensors(means_SW=lambda means: means[:-1]),
    "fewer tokens": in_tensors(decoder_CW=lambda decoder: decoder[:, :-1]),
    "other numbers": in_tensors(encoder_WP=lambda encoder: encoder.astype("float64")),
}


@pytest.fixture(scope="module")
def whole(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """Two extractions of two units, as float16 and under a codec."""
    folder = tmp_path_factory.mktemp("whole")
    units = [make_up(compiled, [f"comment {unit} {i}" for i in range(30)], unit, 0.3) for unit in range(2)]
    for name in ("float16", "compact"):
        write_extraction(folder / name, compiled, units, compact=name == "compact")
    return {name: folder / name for name in ("float16", "compact")}


@pytest.fixture
def shards(whole: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole["float16"], tmp_path / "shards"))


@pytest.fixture(autouse=True)
def _nothing_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards unpacked once are not read again."""
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path / "cache"))


def trained(shards: Path, out: Path) -> tuple[int, str]:
    return retort("train", "--shards", str(shards), "--out", str(out), "--set", "student.sequence=choices")


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_shard_is_named_in_one_line(shards: Path, tmp_path: Path, case: str) -> None:
    name, harm = CASES[case]
    harm(shards / name)
    assert_one_line(*trained(shards, tmp_path / "out"), NAMED.get(case, name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CODEC_CASES)
def test_a_damaged_codec_is_named_in_one_line(whole: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(whole["compact"], tmp_path / "shards"))
    CODEC_CASES[case](folder / CODEC_FILE)
    assert_one_line(*trained(folder, tmp_path / "out"), CODEC_FILE)


@pytest.mark.parametrize("case", ["missing", "cut", "a foreign table", "another unit's", "metadata of words"])
def test_a_manifest_is_not_derived_from_a_damaged_shard(shards: Path, case: str) -> None:
    """That is how an extraction ends."""
    manifest = json.loads((shards / MANIFEST).read_text())
    CASES[case][1](shards / SHARD)
    with pytest.raises(UserError, match=r"units have no shard" if case == "missing" else SHARD):
        write_manifest(str(shards), 2, {name: manifest[name] for name in About.model_fields})


def test_any_byte_may_change(whole: dict[str, Path], tmp_path: Path) -> None:
    """The shards are still read, or one line says why not."""
    rng, refused = random.Random(16), 0
    for i in range(FUZZED):
        source = whole["compact" if i % 2 else "float16"]
        names = sorted(path.name for path in source.iterdir() if path.suffix != ".jsonl")
        folder = Path(shutil.copytree(source, tmp_path / f"shards-{i}"))
        name = names[i // 2 % len(names)]
        damage.flip(folder / name, rng)
        refused += damage.refused(*retort("jsonl", "export", str(folder), str(tmp_path / f"out-{i}")), name)
    assert refused > FUZZED / 3


def test_a_process_refuses_it_before_it_begins(shards: Path, tmp_path: Path) -> None:
    shorten(0.5)(shards / SHARD)
    program = [sys.executable, "-m", "pipeline.cli", "train", "--shards", str(shards), "--out", str(tmp_path / "out")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert_one_line(done.returncode, done.stderr, SHARD)
    assert not (tmp_path / "out").exists()
