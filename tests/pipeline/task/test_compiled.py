from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.task import compiled as module
from pipeline.task.compilation import compile_automaton
from pipeline.task.compiled import CompiledTask, cache_folder, cached_automaton, context_of, require_same
from pipeline.task.task import Task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.vocabulary import WatchedSet


def make_task(**changes: Any) -> Task:
    content = {"name": "t", "teacher": "none", "instruction": "Judge.", "fields": {"a": ["x", "é"], "b": [True, None]}}
    return Task.model_validate(content | {"comments": {"min_tokens": 1, "max_tokens": 25}} | changes)


def make_compiled(tokenizer: TextTokenizer, **changes: Any) -> CompiledTask:
    task = make_task(**changes)
    automaton = compile_automaton(task, tokenizer)
    watched = WatchedSet(np.concatenate([automaton.tokens, np.array([0], np.int32)]), len(automaton.tokens))
    return CompiledTask(task, tokenizer, automaton, watched)


def test_save_and_load(any_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    compiled = make_compiled(any_tokenizer, fields={"a": ["x", "y"], "b": [True, 1, "1"]})
    compiled.save(str(tmp_path / "compiled"))
    loaded = CompiledTask.load(str(tmp_path / "compiled"))
    assert loaded.hashes == compiled.hashes
    assert loaded.task == compiled.task
    assert loaded.tokenizer.end_id == any_tokenizer.end_id
    np.testing.assert_array_equal(loaded.automaton.next_state, compiled.automaton.next_state)
    texts = [compiled.task.render(answer) for answer in compiled.task.answers()]
    assert loaded.tokenizer.encode(texts) == any_tokenizer.encode(texts)


@pytest.mark.parametrize(
    ("name", "old", "new", "differs"),
    [
        ("task.yaml", "Judge.", "Judge!", "another task"),
        ("tokenizer.json", '"id":1,', '"id":1, ', "another tokenizer"),
        ("compiled.json", '"end_id": 5', '"end_id": 1', "another tokenizer"),
        ("vocabulary.json", '"id": 0,', '"id": 1,', "its tokens are not those of its hash"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tokenizer: TextTokenizer, tmp_path: Path, name: str, old: str, new: str, differs: str
) -> None:
    make_compiled(tokenizer).save(str(tmp_path))
    text = (tmp_path / name).read_text()
    if name == "tokenizer.json":
        text, new = text.replace('"id": 1,', old), new
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=differs):
        CompiledTask.load(str(tmp_path))


@pytest.mark.parametrize("name", ["compiled.json", "task.yaml", "tokenizer.json", "automaton.safetensors", "vocabulary.json"])
def test_a_missing_file_is_named(tokenizer: TextTokenizer, tmp_path: Path, name: str) -> None:
    make_compiled(tokenizer).save(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"no file at .*{name}"):
        CompiledTask.load(str(tmp_path))


def test_hashes_name_what_stages_must_agree_on(tokenizers: dict[str, TextTokenizer]) -> None:
    one = make_compiled(tokenizers["gemma"]).hashes
    assert set(one) == {"task", "tokenizer", "watched set"}
    assert make_compiled(tokenizers["gemma"], instruction="J").hashes["task"] != one["task"]
    assert make_compiled(tokenizers["byte_level"]).hashes["tokenizer"] != one["tokenizer"]


def test_require_same_names_what_differs() -> None:
    require_same({"a": "1", "b": "2", "more": "3"}, {"a": "1", "b": "2"}, "x", "y")
    with pytest.raises(UserError, match=r"^x does not fit y: another b \(2 there, 3 here\), c \(None there, 4 here\)$"):
        require_same({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, "x", "y")


def test_the_context_holds_the_longest_example_exactly(tokenizer: TextTokenizer) -> None:
    automaton = compile_automaton(make_task(), tokenizer)
    separator = len(tokenizer.encode(["\n\n"])[0])
    need = 25 + separator + max(len(tokenizer.encode([make_task().render(a)])[0]) for a in make_task().answers())
    assert context_of(make_task(context=None), tokenizer, automaton) == need
    assert context_of(make_task(context=need + 1), tokenizer, automaton) == need + 1
    with pytest.raises(UserError, match=rf"context {need - 1} is too short: 25 comment tokens \+ {separator} .* = {need}\."):
        context_of(make_task(context=need - 1), tokenizer, automaton)


def test_an_automaton_is_compiled_once_for_a_task_and_a_tokenizer(
    tokenizers: dict[str, TextTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path))
    tokenizer = tokenizers["gemma"]
    first = cached_automaton(make_task(), tokenizer)
    monkeypatch.setattr(module, "compile_automaton", None)
    again = cached_automaton(make_task(name="renamed"), tokenizer)
    np.testing.assert_array_equal(first.next_state, again.next_state)
    with pytest.raises(TypeError):
        cached_automaton(make_task(fields={"a": ["x"]}), tokenizer)  # another task is compiled anew
    with pytest.raises(TypeError):
        cached_automaton(make_task(), tokenizers["byte_level"])  # and so it is for another tokenizer
    assert len(storage.list_files(str(tmp_path / "automata"))) == 1


def test_the_cache_is_in_the_home_folder_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETORT_CACHE", raising=False)
    assert cache_folder() == str(Path("~/.cache/retort").expanduser())
