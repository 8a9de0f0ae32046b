"""The model card: what the student does, how to use each form of it, and how far it can be trusted."""

from __future__ import annotations

import os
from typing import Any

from pipeline.base import page, storage
from pipeline.shards.manifest import Manifest
from pipeline.task.task import Task
from student.data.answers import REFERENCES
from student.decode.answerer import WHOLE
from student.evaluate.verdict import named
from student.export.folder import LISTED
from student.model.checkpoint import Trained

CARD = "README.md"


def render_card(
    task: Task, manifest: Manifest, training: Trained, fidelity: dict[str, Any] | None, figures: dict[str, Any]
) -> str:
    """The card as Markdown, in the layout of Hugging Face's model cards. It names no folder of this machine.

    Args:
        fidelity: what its report's fidelity.json holds; None without a report.
    """
    teacher = manifest.teacher.model or ""
    return page.render(
        __file__,
        "README.md.jinja",
        task=task,
        teacher=teacher_name(teacher),
        on_hub=teacher_name(teacher) == teacher,
        reference=REFERENCES[figures["answers"]],
        manifest=manifest,
        files=[os.path.basename(file) for file in manifest.files],
        training=training,
        rate=training.learning_rate,
        fidelity=fidelity,
        floors=named(fidelity["floors"]) if fidelity else {},
        figures=figures,
        listed=LISTED,
        whole=WHOLE,
    )


def teacher_name(model: str) -> str:
    """A teacher's name on the Hub, or the last part of where it lies."""
    is_path = storage.is_uri(model) or os.path.isabs(model) or model.startswith(".") or os.path.exists(model)
    return os.path.basename(model.rstrip("/")) if is_path else model
