from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline.base.errors import UserError
from pipeline.base.run import find_run, tracked_run
from pipeline.base.signals import Stopped
from pipeline.base.storage import read_json
from pipeline.base.tracking import Tracking

IDENTITY = {"student": {"layers": 2}, "seed": 0}


class Runs:
    """Starts runs of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri, self.started = str(folder / "run"), f"sqlite:///{folder}/mlflow.db", 0

    def start(self) -> Tracking:
        self.started += 1
        return Tracking.start(self.uri, "tests", "a run", IDENTITY, "student")

    def status(self, run_id: str) -> str:
        return MlflowClient(self.uri).get_run(run_id).info.status


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (Stopped("x"), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")],
)
def test_a_run_ends_as_its_block_does_and_is_gone_on_with(runs: Runs, error: BaseException | None, status: str) -> None:
    seen = []
    for _ in range(2):
        with (
            suppress(Stopped, KeyboardInterrupt, ValueError),
            tracked_run(runs.folder, "run.json", IDENTITY, "training", runs.start, where="here") as tracking,
        ):
            seen.append(tracking.run_id)
            assert runs.status(tracking.run_id) == "RUNNING"
            if error:
                raise error
        assert runs.status(seen[-1]) == status
    assert (seen[0], runs.started) == (seen[1], 1)
    assert read_json(f"{runs.folder}/run.json") == IDENTITY | {"where": "here", "mlflow": {"uri": runs.uri, "run_id": seen[0]}}


def test_another_run_in_the_folder_is_refused(runs: Runs) -> None:
    with tracked_run(runs.folder, "run.json", IDENTITY, "training", runs.start):
        pass
    assert find_run(runs.folder, "run.json", IDENTITY, "training")
    with pytest.raises(UserError, match=r"holds another training \(its seed differ\)"):
        find_run(runs.folder, "run.json", IDENTITY | {"seed": 1}, "training")
    assert find_run(runs.folder, "other.json", IDENTITY, "training") is None


def test_a_searchs_trial_is_left_open(runs: Runs) -> None:
    with tracked_run(runs.folder, "run.json", IDENTITY, "training", runs.start, closes=False) as tracking:
        pass
    assert runs.status(tracking.run_id) == "RUNNING"
