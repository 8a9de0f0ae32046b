"""The model card: what the student does, how to use each form of it, and how far it can be trusted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.base import storage
from pipeline.base.plots import printable
from pipeline.task.task import Task
from student.data.answers import REFERENCES
from student.evaluate.report import learning_rate
from student.export.folder import LISTED

CARD = "README.md"


def render_card(
    task: Task, manifest: dict[str, Any], training: dict[str, Any], fidelity: dict[str, Any] | None, figures: dict[str, Any]
) -> str:
    """The card as Markdown, in the layout of Hugging Face's model cards. It names no folder of this machine.

    Args:
        fidelity: what its report's fidelity.json holds; None without a report.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 - Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "count": lambda number: "unknown" if number is None else f"{number:,}",
        "megabytes": lambda size: f"{size / 1e6:,.1f} MB",
        "rate": lambda number: "–" if number is None else f"{number:,.0f}",
        "json": lambda value: printable(json.dumps(value, ensure_ascii=False)),
        "text": lambda text: re.sub(r"([\\`*<>&|~$\[\]])", r"\\\1", printable(text)),  # what Markdown shows as it is
    }
    teacher = manifest["teacher"]["model"]
    return environment.get_template("README.md.jinja").render(
        task=task,
        teacher=teacher_name(teacher),
        on_hub=teacher_name(teacher) == teacher,
        reference=REFERENCES[figures["answers"]],
        manifest=manifest,
        files=[os.path.basename(file) for file in manifest["files"]],
        training=training,
        rate=learning_rate(training),
        fidelity=fidelity,
        figures=figures,
        listed=LISTED,
    )


def teacher_name(model: str) -> str:
    """A teacher's name on the Hub, or the last part of where it lies."""
    is_path = storage.is_uri(model) or os.path.isabs(model) or model.startswith(".") or os.path.exists(model)
    return os.path.basename(model.rstrip("/")) if is_path else model
