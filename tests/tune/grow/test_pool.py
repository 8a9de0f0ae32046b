from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.comments.reading import text_key
from pipeline.config import CommentsConfig
from pipeline.task.compiled import CompiledTask
from student.data.unpack import TRAIN, split_of
from student.model.checkpoint import save_student
from tests.student.decode.test_decode import make_student
from tune.grow.pool import MOST_TEXTS, Pool, columns_of, keys_in, open_pool, write_texts

TEXTS = [f"a good and loud thing {i}" for i in range(400)]


def opened(compiled: CompiledTask, folder: Path, **config: str) -> Pool:
    return open_pool(
        CommentsConfig(paths=[str(folder / "log.jsonl")], **config), compiled.task, compiled.tokenizer, str(folder / "pool")
    )


@pytest.fixture
def pool(compiled: CompiledTask, tmp_path: Path) -> Pool:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS, *TEXTS[:50]]))
    return opened(compiled, tmp_path)


@pytest.mark.parametrize("taught", [False, True])
def test_texts_are_asked_about_once_and_held_out_in_their_share(
    pool: Pool,
    compiled: CompiledTask,
    tmp_path: Path,
    taught: bool,
) -> None:
    student = str(tmp_path / "student") if taught else None
    if student:
        save_student(student, make_student(compiled, 3, 6.0, sequence="choices"), compiled)
    asked = set(map(text_key, TEXTS[:100]))
    chosen = [record["body"] for record in pool.choose(100, asked, student, [0, 1])]
    assert len(set(chosen)) == 100
    assert not asked & set(map(text_key, chosen))
    assert Counter(split_of(text) == TRAIN for text in chosen)[True] == 80
    assert chosen == [record["body"] for record in pool.choose(100, asked, student, [0, 1])]
    assert chosen != [record["body"] for record in pool.choose(100, asked, student, [0, 2])]


def test_a_log_goes_over_with_its_votes_and_labels(compiled: CompiledTask, tmp_path: Path) -> None:
    said = [{"mood": "bad", "loud": True}, {"mood": "good", "loud": True}]
    rows = [{"body": TEXTS[0], "said": answer, "people": said[1], "id": str(i)} for i, answer in enumerate(said)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"body": TEXTS[1], "said": said[0]}]))
    config = CommentsConfig(paths=["x"], answer="said", gold="people")
    pool = opened(compiled, tmp_path, answer="said", gold="people")
    write_texts(str(tmp_path / "round.jsonl"), pool.records[text_key(TEXTS[0])])
    (tmp_path / "log.jsonl").rename(tmp_path / "first.jsonl")
    (tmp_path / "round.jsonl").rename(tmp_path / "log.jsonl")
    columns = columns_of(config, "x")
    assert (columns.answer, columns.gold, columns.probabilities) == ("answer", "gold", None)
    again = open_pool(
        columns_of(config, str(tmp_path / "log.jsonl")), compiled.task, compiled.tokenizer, str(tmp_path / "next")
    )
    assert again.records == {text_key(TEXTS[0]): pool.records[text_key(TEXTS[0])]}
    assert [record["answer"] for record in again.records[text_key(TEXTS[0])]] == said
    assert keys_in(str(tmp_path / "log.jsonl")) == {text_key(TEXTS[0])}


def test_of_a_large_pool_some_texts_are_looked_at(
    pool: Pool,
    compiled: CompiledTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(pool.records) == len(TEXTS) < MOST_TEXTS
    monkeypatch.setattr("tune.grow.pool.MOST_TEXTS", 100)
    some = opened(compiled, tmp_path).records
    assert 50 < len(some) < 130
    assert some.items() <= pool.records.items()
