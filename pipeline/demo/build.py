"""Makes the demo's comments and teacher once, and finds them again."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import asdict
from pathlib import Path

from pipeline.base import storage
from pipeline.demo.comments import make_comments, write_comments
from pipeline.demo.teacher import DEFAULT_FIT, Fit, fit_teacher
from pipeline.task.task_file import load_task

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
TASK = PACKAGE.parent.parent / "tasks" / "demo.yaml"


def build_demo(folder: str, count: int = 6000, fit: Fit = DEFAULT_FIT, seed: int = 0) -> tuple[str, str]:
    """The paths of `folder/comments.jsonl.gz` and `folder/teacher`, both made unless the same code made them before."""
    comments, teacher, stamp = (os.path.join(folder, name) for name in ("comments.jsonl.gz", "teacher", "demo.json"))
    code = b"".join(path.read_bytes() for path in [*sorted(PACKAGE.glob("*.py")), TASK])
    made_by = {"count": count, "fit": asdict(fit), "seed": seed, "code": hashlib.sha256(code).hexdigest()}
    whole = all(os.path.exists(path) for path in (comments, f"{teacher}/model.safetensors", stamp))
    if whole and storage.read_json(stamp) == made_by:
        log.info("reusing the demo's %s and %s", comments, teacher)
        return comments, teacher
    storage.delete(stamp)  # from here until the new one is written, nothing here counts as made
    labelled = [(body, tuple(labels.values())) for body, labels in make_comments(count, seed)]
    write_comments(comments, count, seed)
    fit_teacher(teacher, labelled, load_task(str(TASK)), seed, fit)
    storage.write_json(stamp, made_by)
    return comments, teacher
