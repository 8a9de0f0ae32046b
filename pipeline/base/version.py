"""Workers must run the driver's code. On a cluster an old image or a stale checkout would otherwise fail in strange ways."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

PACKAGES = ("pipeline", "student", "cluster", "tune")
VARIABLE = "RETORT_CODE_VERSION"


@cache
def code_version() -> str:
    """A hash of the source of the four packages as they lie beside this file."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def git_commit() -> str | None:
    """The commit this code is checked out from; None where it is not a checkout."""
    from mlflow.utils.git_utils import get_git_commit  # slow to import, and workers have no use for it

    root = Path(__file__).resolve().parents[2]
    return get_git_commit(str(root)) if (root / ".git").exists() else None


def check_code_version() -> None:
    """To be called first in every worker.

    Raises:
        RuntimeError: the driver runs other code than this process.
    """
    driver = os.environ.get(VARIABLE)
    if driver is not None and driver != code_version():
        raise RuntimeError(
            f"this worker runs Retort {code_version()} and the driver {driver}. "
            "Submit with `ray job submit --working-dir .`, or install the same version on every node"
        )
