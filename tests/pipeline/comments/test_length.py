"""Texts that are far too long are set aside by their number of characters."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comments.reading import KEPT, MALFORMED, Comment, filter_rows, text_row
from pipeline.task.task import CommentRules
from pipeline.task.tokenization import TextTokenizer
from tests.pipeline.comments.comment_files import rows_of

RULES = CommentRules(max_tokens=6)
WORDS = ["positive", "x", " ", "日", "\x00", "<start_of_turn>", "<eos>", "https://"]


@given(words=st.lists(st.sampled_from(WORDS), max_size=25), times=st.integers(1, 12))
def test_what_is_too_long_by_its_characters_is_too_long_by_its_tokens(
    tokenizers: dict[str, TextTokenizer], words: list[str], times: int
) -> None:
    row = text_row(0, "".join(word * times for word in words))
    for tokenizer in (tokenizers["gemma"], tokenizers["byte_level"]):
        (marked,), (ids,) = filter_rows([row], RULES, tokenizer), tokenizer.encode([row.text])
        if marked.status == "too_long":
            assert len(ids) > RULES.max_tokens
        elif marked.status == KEPT:
            assert marked.tokens == ids


@pytest.mark.parametrize("kind", ["gemma", "byte_level", "metaspace"])
@pytest.mark.parametrize("word", ["x", "ha ", "<", "www", "Ж", "\x00", "<eos> "])
def test_a_text_of_megabytes_takes_no_longer_than_to_read_it(
    tokenizers: dict[str, TextTokenizer], tmp_path: Path, kind: str, word: str
) -> None:
    text = word * (5_000_000 // len(word))
    read = rows_of(tmp_path, "x.jsonl", json.dumps({"body": text}, ensure_ascii=False).encode())
    start = time.perf_counter()
    (row,) = filter_rows(read, RULES, tokenizers[kind])
    assert time.perf_counter() - start < 0.1
    assert (row.status, row.text) == ("too_long", "")


def test_a_surrogate_is_found_at_once_in_a_text_of_megabytes() -> None:
    text = "x" * 20_000_000 + "\ud800"
    start = time.perf_counter()
    assert text_row(0, text).status == MALFORMED
    assert time.perf_counter() - start < 0.5


def test_rows_are_dropped_one_by_one_as_they_are_read(tokenizer: TextTokenizer) -> None:
    tracemalloc.start()
    marked = filter_rows((Comment(i, text="x" * 1_000_000) for i in range(50)), RULES, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.status for row in marked] == ["too_long"] * 50
    assert peak < 5_000_000
