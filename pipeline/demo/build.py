"""Makes the demo's comments and teacher once, and finds them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from pipeline.base import storage
from pipeline.demo.comments import write_comments
from pipeline.demo.teacher import DEFAULT_FIT, Fit, fit_teacher
from pipeline.task.task import load_task

log = logging.getLogger(__name__)

COMMENTS = 6000
SEED = 0
PACKAGE = Path(__file__).parent
TASK = PACKAGE.parent.parent / "tasks" / "demo.yaml"


def build_demo(folder: str, count: int = COMMENTS, fit: Fit = DEFAULT_FIT, seed: int = SEED) -> tuple[str, str]:
    """The paths of `folder/comments.jsonl.gz` and `folder/teacher`, both made unless the same code made them before."""
    comments, teacher = os.path.join(folder, "comments.jsonl.gz"), os.path.join(folder, "teacher")
    stamp, made_by = os.path.join(folder, "demo.json"), _identity(count, fit, seed)
    weights = os.path.join(teacher, "model.safetensors")
    if os.path.exists(comments) and os.path.exists(weights) and _stamped(stamp, made_by):
        log.info("reusing the demo's %s and %s", comments, teacher)
        return comments, teacher
    if os.path.exists(stamp):
        os.unlink(stamp)  # from here until the new one is written, nothing here counts as made
    write_comments(comments, count, seed)
    fit_teacher(teacher, comments, load_task(str(TASK)), seed, fit)
    storage.write_json(stamp, {"made_by": made_by})
    return comments, teacher


def _stamped(stamp: str, made_by: str) -> bool:
    return os.path.exists(stamp) and storage.read_json(stamp) == {"made_by": made_by}


def _identity(count: int, fit: Fit, seed: int) -> str:
    """A hash of the settings, of this package's source files and of the task."""
    digest = hashlib.sha256(json.dumps([count, asdict(fit), seed]).encode())
    for source in [*sorted(PACKAGE.glob("*.py")), TASK]:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]
