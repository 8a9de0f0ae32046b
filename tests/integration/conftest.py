"""The demo's comments and a teacher fitted on fewer of them: small enough for tests, real enough to be distilled."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from pipeline.base.runtime import MALLOC
from pipeline.cli.main import main
from tests.tiny import ROOT


class Retort:
    """Runs the real command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, ok: bool = True, timeout: float = 400) -> str:
        """Its output. Fails the test unless the exit code says what `ok` does."""
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=timeout)
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == ok, output
        assert ok or "Traceback" not in output, output
        return output

    def environment(self) -> dict[str, str]:
        """The command's: a cache of its own, and of Ray's variables only whether this process' clusters ask for a token."""
        theirs = {name for name in os.environ if name.startswith(("RAY_", "RETORT_")) and not name.startswith("RAY_AUTH_")}
        kept = {name: value for name, value in os.environ.items() if name not in theirs}
        return kept | MALLOC | {"RETORT_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def here(self, *arguments: str, code: int = 0) -> str:
        """What a command without Ray says; in this process, which saves the imports."""
        done = CliRunner().invoke(main, arguments, env={"RETORT_CACHE": str(self.folder / "cache")})
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == code, done.output
        return done.output

    def refuses(self, *arguments: str) -> str:
        """What it says when it refuses."""
        return self.here(*arguments, code=1)


@pytest.fixture(scope="session")
def retort(tmp_path_factory: pytest.TempPathFactory) -> Retort:
    return Retort(tmp_path_factory.mktemp("retort"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with comments.jsonl.gz and teacher/, which the workers of a test run share."""
    from pipeline.demo.build import build_demo
    from pipeline.demo.teacher import DEFAULT_FIT

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()) / "demo"
    with FileLock(f"{folder}.lock"):
        build_demo(str(folder), count=1600, fit=dataclasses.replace(DEFAULT_FIT, epochs=4))
    return folder
