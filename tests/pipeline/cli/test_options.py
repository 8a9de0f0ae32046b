from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.cli.options import folder_of, writable


def test_a_folder_is_as_given_else_within_the_runs() -> None:
    assert folder_of("/a/b", None, "student") == folder_of("/a/b", "/run", "student") == "/a/b"
    assert folder_of(None, "/run", "student") == "/run/student"
    assert folder_of(None, "run", "student") == str(Path.cwd() / "run/student")
    assert folder_of(None, "s3://b/run", "student") == "s3://b/run/student"
    with pytest.raises(UserError, match=r"no student given: name its folder \(--student\), or the run's \(--out\)"):
        folder_of(None, None, "student")


def test_a_folder_that_can_be_written_to_is_left_as_it_is(tmp_path: Path) -> None:
    assert writable(str(tmp_path)) == str(tmp_path)
    assert writable(str(tmp_path / "a/b")) == str(tmp_path / "a/b")
    assert writable("s3://nowhere/at/all") == "s3://nowhere/at/all"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "train", "evaluate", "predict", "export", "compare", "plan"])
def test_what_writes_to_the_runs_folder_asks_for_it(command: str) -> None:
    done = CliRunner().invoke(main, [command])
    assert done.exit_code == 1
    assert done.output == "error: no folder given: say where the run lives with --out\n"


def test_a_service_needs_a_student_and_no_folder_to_write_to() -> None:
    done = CliRunner().invoke(main, ["serve"])
    assert "error: no student given: name its folder (--student), or the run's (--out)" in done.output
    done = CliRunner().invoke(main, ["serve", "--student", "/proc/nowhere"])
    assert "error: no student" in done.output
    assert "/proc/nowhere" in done.output
