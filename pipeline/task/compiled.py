"""A task compiled against a tokenizer, and the folder that carries it from stage to stage.

Shards and checkpoints each hold one, so training needs no teacher and predicting needs no shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError, clip
from pipeline.task.automaton import Automaton, Tokens, is_of_task
from pipeline.task.compilation import compile_automaton
from pipeline.task.task import Task
from pipeline.task.task_file import dump_task, load_task
from pipeline.task.tokenization import TextTokenizer
from pipeline.task.values import Values
from pipeline.task.vocabulary import WatchedSet

log = logging.getLogger(__name__)


class _File(Strict):
    """The content of compiled.json."""

    end_id: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class CompiledTask:
    """All that gives a token sequence its meaning."""

    task: Task
    tokenizer: TextTokenizer
    automaton: Automaton
    watched: WatchedSet

    @property
    def hashes(self) -> dict[str, str]:
        """What two stages must agree on, by name."""
        return {"task": self.task.hash, "tokenizer": self.tokenizer.hash, "watched set": self.watched.hash}

    @property
    def context(self) -> int:
        """Tokens a student reads at most: see `context_of`."""
        return context_of(self.task, self.tokenizer, self.automaton)

    def tokens(self, values: Values) -> Tokens:
        """An answer's tokens, end token last."""
        return (*self.tokenizer.encode([self.task.render(values)])[0], self.tokenizer.end_id)

    @property
    def separator(self) -> list[int]:
        """Ids of what a student reads between comment and answer."""
        return self.tokenizer.encode([self.task.separator])[0]

    def save(self, folder: str) -> None:
        """Writes task.yaml, tokenizer.json, automaton.safetensors and vocabulary.json."""
        storage.write_text(storage.join(folder, "task.yaml"), dump_task(self.task))
        storage.write_text(storage.join(folder, "tokenizer.json"), self.tokenizer.serialized)
        self.automaton.save(storage.join(folder, "automaton.safetensors"))
        self.watched.save(storage.join(folder, "vocabulary.json"), self.tokenizer)
        storage.write_json(storage.join(folder, "compiled.json"), {"end_id": self.tokenizer.end_id, "hashes": self.hashes})

    @staticmethod
    def load(folder: str) -> CompiledTask:
        """Reads what `save` wrote.

        Raises:
            UserError: there is none, a file of it is damaged, or its files do not belong together.
        """
        about = storage.read_form(storage.join(folder, "compiled.json"), _File)
        automaton_path = storage.join(folder, "automaton.safetensors")
        compiled = CompiledTask(
            task=load_task(storage.join(folder, "task.yaml")),
            tokenizer=_load_tokenizer(storage.join(folder, "tokenizer.json"), about.end_id),
            automaton=Automaton.load(automaton_path),
            watched=WatchedSet.load(storage.join(folder, "vocabulary.json")),
        )
        require_same(about.hashes, compiled.hashes, f"compiled.json in {folder}", "the files beside it")
        required = compiled.watched.tokens[: compiled.watched.required]
        if not np.array_equal(compiled.automaton.tokens, required):
            raise UserError(f"{automaton_path} does not fit vocabulary.json beside it: its tokens are not the required ones")
        if not is_of_task(compiled.automaton, compiled.task, compiled.tokenizer):
            raise UserError(f"{automaton_path} does not fit task.yaml beside it: its answers are not the task's")
        return compiled


def compile_for(task: Task, tokenizer: TextTokenizer) -> CompiledTask:
    """A task for a tokenizer that no teacher brought: the required tokens are all that is watched.

    Raises:
        UserError: as `compile_automaton` and `context_of` do.
    """
    automaton = compile_automaton(task, tokenizer)
    context_of(task, tokenizer, automaton)  # better refused now than by the training
    return CompiledTask(task, tokenizer, automaton, WatchedSet(automaton.tokens, len(automaton.tokens)))


def _load_tokenizer(path: str, end_id: int) -> TextTokenizer:
    try:
        return TextTokenizer(storage.read_text(path), end_id)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or not a tokenizer: {clip(str(error), 300)}") from error


def require_same(found: dict[str, Any], wanted: dict[str, Any], finder: str, wanter: str) -> None:
    """Refuses a mismatch between two stages.

    Raises:
        UserError: naming what differs.
    """
    differ = [name for name in wanted if found.get(name) != wanted[name]]
    if differ:
        parts = [f"{name} ({found.get(name)} there, {wanted[name]} here)" for name in differ]
        raise UserError(f"{finder} does not fit {wanter}: another {', '.join(parts)}")


def context_of(task: Task, tokenizer: TextTokenizer, automaton: Automaton) -> int:
    """Tokens a student reads at most: the task's `context`, or what its longest example takes.

    Raises:
        UserError: the longest example does not fit the task's, with the arithmetic.
    """
    separator = len(tokenizer.encode([task.separator])[0])
    need = task.comments.max_tokens + separator + automaton.longest - 1
    if task.context and need > task.context:
        raise UserError(
            f"context {task.context} is too short: {task.comments.max_tokens} comment tokens + {separator} of the separator "
            f"+ {automaton.longest - 1} answer inputs = {need}. Leave `context` out, or lower `comments.max_tokens`"
        )
    return task.context or need


def cached_automaton(task: Task, tokenizer: TextTokenizer) -> Automaton:
    """The task's automaton, compiled once for each task and tokenizer and kept in the user's cache."""
    key = hashlib.sha256(f"{task.hash} {tokenizer.hash}".encode()).hexdigest()[:16]
    path = storage.join(cache_folder(), "automata", f"{key}.safetensors")
    if storage.exists(path):
        return Automaton.load(path)
    automaton = compile_automaton(task, tokenizer)
    automaton.save(path)
    log.info("compiled %s answers to %d states over %d tokens", f"{task.outputs:,}", automaton.states, len(automaton.tokens))
    return automaton


def cache_folder() -> str:
    """Where compiled automata are kept: $RETORT_CACHE, by default ~/.cache/retort."""
    return os.environ.get("RETORT_CACHE") or os.path.expanduser("~/.cache/retort")
