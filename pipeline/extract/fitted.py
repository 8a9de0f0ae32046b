"""The plan and the compiled task where no teacher brings a tokenizer: answers that were given, or come from an API."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.base.version import code_version
from pipeline.comments.plan import Plan, describe_source, dropped_too_many, find_comments, find_plan, make_plan
from pipeline.comments.reading import KEPT, Columns, comment_tables, read_file
from pipeline.config import PipelineSettings
from pipeline.task.compiled import CompiledTask, compile_for
from pipeline.task.fitted_tokenizer import fit_tokenizer
from pipeline.task.task import Task
from pipeline.task.task_file import load_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What is settled before the first answer.

    Attributes:
        plan: the units, in `comments`.
        compiled: the task, for a tokenizer of the texts' own; also in `shards`.
    """

    plan: Plan
    compiled: CompiledTask
    comments: str
    shards: str

    def about(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "task_name": self.compiled.task.name,
            "hashes": self.compiled.hashes,
            "watched": self.compiled.watched.size,
            "files": self.plan.source.paths,
            "comments": self.plan.model_dump(mode="json"),
            "code_version": code_version(),
        }


def fit(config: PipelineSettings) -> Fitted:
    """Fits the tokenizer, compiles the task and cuts the units; what a folder holds of these stays.

    Raises:
        UserError: anything the user can mend, such as a folder with another run.
    """
    if config.task is None or config.out is None:
        raise UserError("no task (--task), or no folder to write to (--out)")
    task, out = load_task(config.task), storage.absolute(config.out)
    paths = find_comments(config.comments, task)
    comments, shards = storage.join(out, "comments"), storage.join(out, "shards")
    compiled = compile_fitted(config, task, paths, shards)
    source = describe_source(config.comments, paths, task, compiled.tokenizer, config.extract.rows_per_unit)
    plan = find_plan(comments, source)
    if plan is None:
        plan = make_plan(
            comments, source, config.comments, comment_tables(paths, source.columns(task), task, compiled.tokenizer)
        )
        for line in dropped_too_many(plan, task, compiled.tokenizer):
            log.warning("%s", line)
    log.info("comments: %s", plan.summary())
    return Fitted(plan, compiled, comments, shards)


def compile_fitted(config: PipelineSettings, task: Task, paths: list[str], folder: str) -> CompiledTask:
    """The task compiled for a tokenizer fitted to the texts; what a folder holds of it stays."""
    if storage.exists(storage.join(folder, "compiled.json")):
        return CompiledTask.load(folder)
    rows = (row for path in paths for row in read_file(path, Columns.of(config.comments, task)))
    compiled = compile_for(task, fit_tokenizer((row.text for row in rows if row.status == KEPT), task))
    compiled.save(folder)
    return compiled
