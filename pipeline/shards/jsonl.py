"""Logit shards as JSON lines, the form the thesis kept them in: 128 examples a file, raw logits as decimal numbers.

Beside them lie the compiled task's files, vocabulary.json among them: it says which token each of the W columns is. A line:

    {"file": 0, "row": 17, "sample": 0, "id": "…", "comment": "…", "comment_tokens": […], "answer": "…", "answer_tokens": […],
     "kept": [true, …], "logits": [[… W numbers …] a kept step], "lse": [[log-sum-exp at T = 1, 2, 4] a kept step]}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.files import ROW_COLUMNS, ShardTable, write_shard
from pipeline.shards.manifest import Manifest, Totals, open_shards, write_manifest
from pipeline.task.compiled import CompiledTask
from pipeline.teacher.capture import TEMPERATURES, Captured

EXAMPLES = 128  # a file


def export(shards_folder: str, folder: str) -> int:
    """Writes shards as JSON lines; returns the number of files. Logits are as exact as the shards' float16.

    Raises:
        UserError: the folder holds no finished extraction.
    """
    shards = open_shards(shards_folder)
    shards.compiled.save(folder)
    about = shards.manifest.model_dump(mode="json", exclude=set(Totals.model_fields))
    examples = (example for table in shards.tables() for example in _examples(table, shards.compiled))
    files = 0
    while batch := list(itertools.islice(examples, EXAMPLES)):
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in batch)
        storage.write_text(_path(folder, files), lines)
        files += 1
    storage.write_json(storage.join(folder, "export.json"), about | {"files_written": files})
    return files


def import_(folder: str, shards_folder: str) -> Manifest:
    """Writes what `export` wrote as shards, a file each, and returns their manifest.

    Raises:
        UserError: the folder is not a finished export, or a line does not fit its task.
    """
    about = storage.read_json(storage.join(folder, "export.json"))
    compiled = CompiledTask.load(folder)
    files = about.pop("files_written")
    facts = {"hashes": compiled.hashes, "teacher": about["teacher"], "seconds": 0.0}
    for unit in range(files):
        rows, captured = _captured(list(_lines(_path(folder, unit))), compiled)
        write_shard(shards_folder, unit, rows, captured, facts)
    compiled.save(shards_folder)
    return write_manifest(shards_folder, files, about)


def _path(folder: str, number: int) -> str:
    return storage.join(folder, f"examples-{number:06d}.jsonl")


def _examples(table: ShardTable, compiled: CompiledTask) -> Iterator[dict[str, Any]]:
    step = logit = 0
    for i, length in enumerate(table.lengths.tolist()):
        answer, kept = table.answers[step : step + length], table.kept[step : step + length]
        some = slice(logit, logit + int(kept.sum()))
        lse = table.lse[some].astype(np.float64)
        yield {
            **dict(zip(("file", "row", "sample"), table.keys[i].tolist(), strict=True)),
            "id": table.ids[i],
            "comment": table.texts[i],
            "comment_tokens": table.comments[i].tolist(),
            "answer": compiled.tokenizer.decode(answer),
            "answer_tokens": answer.tolist(),
            "kept": kept.tolist(),
            "logits": (table.logprobs[some].astype(np.float64) + lse[:, :1]).tolist(),
            "lse": lse.tolist(),
        }
        step, logit = step + length, some.stop


def _lines(path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(storage.read_text(path).splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error


def _captured(examples: list[dict[str, Any]], compiled: CompiledTask) -> tuple[pa.Table, Captured]:
    """The rows and the arrays of one file's examples.

    Raises:
        UserError: an answer is no path of the automaton, or its logits are not W wide.
    """
    lengths = np.array([len(example["answer_tokens"]) for example in examples], np.int32)
    shape = (len(examples), int(lengths.max()))
    tokens, kept = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logits = np.zeros((*shape, compiled.watched.size), np.float64)
    lse = np.zeros((*shape, len(TEMPERATURES)), np.float64)
    for i, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        try:
            compiled.automaton.walk(example["answer_tokens"])
            tokens[i, :length], kept[i, :length] = example["answer_tokens"], example["kept"]
            logits[i, kept[i]], lse[i, kept[i]] = example["logits"], example["lse"]
        except (ValueError, KeyError) as error:
            raise UserError(f"the example of row {example.get('row')} does not fit the task: {error}") from error
    names = {"text": "comment", "tokens": "comment_tokens"}
    rows = {name: [example[names.get(name, name)] for example in examples] for name in ROW_COLUMNS}
    kinds = {"file": pa.int32(), "row": pa.int64(), "sample": pa.int32(), "tokens": pa.list_(pa.int32())}
    table = pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in rows.items()})
    exact: Any = (logits, lse)  # float64, as their difference is to give the very float16 it came from
    return table, Captured(tokens, lengths, kept, *exact)
