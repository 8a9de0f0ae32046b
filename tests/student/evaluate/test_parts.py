"""What an evaluation does in parts, and what it does again after it was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base import storage
from pipeline.config import TrackingConfig
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.config import FloorsConfig, TrainConfig
from student.data.examples import Batch, open_examples
from student.data.unpack import TEST, VALIDATION
from student.decode.decode import Decoder
from student.evaluate import parts
from student.evaluate.evaluate import REPORT, measure
from student.evaluate.fidelity import step_sums
from student.evaluate.parts import (
    ANSWERS,
    FREE,
    STEPS,
    TEMPERATURES,
    Part,
    Work,
    Worker,
    carry_out,
    parts_of,
    read_decoded,
    read_measured,
    resources_of,
)
from student.model.checkpoint import load_student
from tests.student.conftest import made_up_shards
from tests.student.trained import train_here


@pytest.fixture(scope="module")
def student(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("evaluated")
    train_here(out, shards, TrackingConfig(uri=f"sqlite:///{out}/mlflow.db"), epochs=12)
    return str(out / "student")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two batches of four."""
    monkeypatch.setattr(parts, "BATCH_SIZE", 4)
    monkeypatch.setattr(parts, "PART", 8)


def figures_of(shards: Shards, student: str, report: Path) -> dict[str, Any]:
    """All but what goes by the clock."""
    return {n: row for n, row in measure(FloorsConfig(examples=0), shards.folder, student, str(report)).items() if n != "speed"}


def test_parts_together_are_all_answers_in_order(
    shards: Shards, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.evaluate.fidelity.CLOSE", np.inf)
    model, compiled = load_student(student)
    test, work = open_examples(shards, TEST, model.shape.sequence), Work(shards.folder, student, str(tmp_path), None)
    todo = {kind: parts_of(kind, TEST, len(test)) for kind in (ANSWERS, FREE, STEPS)}
    assert len(todo[FREE]) > 1
    carry_out(work, [part for some in todo.values() for part in some], None)
    decoder = Decoder(model, compiled, storage.read_json(storage.join(work.parts, TEMPERATURES)))
    prefixes = [test.prefix(i) for i in range(len(test))]
    for kind, wanted in ((ANSWERS, decoder.constrained(prefixes)), (FREE, decoder.free(prefixes))):
        found, seconds = read_decoded(work, todo[kind])
        assert found.tokens == wanted.tokens != found.tokens[::-1]
        np.testing.assert_allclose(found.by_field, wanted.by_field, rtol=1e-5)
        assert len({id(answer) for answer in found.tokens}) == len(set(map(tuple, found.tokens)))  # each is in memory once
        assert found.calls > wanted.calls
        assert seconds > 0
    sums, close = read_measured(work, todo[STEPS])
    np.testing.assert_allclose(sums, step_sums(model, test.batches(np.arange(len(test)), 9)), rtol=1e-5, atol=1e-5)
    assert close == len(test)


def test_a_killed_evaluation_goes_on_and_says_the_same(
    shards: Shards, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, do, done = figures_of(shards, student, tmp_path / "whole"), Worker.part, list[Part]()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == sorted(REPORT)

    def part(self: Worker, part: Part) -> int:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(part)
        return do(self, part)

    monkeypatch.setattr(Worker, "part", part)
    with pytest.raises(KeyboardInterrupt):
        figures_of(shards, student, tmp_path / "report")
    before = done.copy()
    monkeypatch.setattr(Worker, "fit_temperatures", None)  # they are there
    monkeypatch.setattr(Worker, "part", lambda self, part: done.append(part) or do(self, part))
    assert json.dumps(figures_of(shards, student, tmp_path / "report")) == json.dumps(wanted)
    assert len(before) == 3
    assert len(done) == len(set(done)) > 3


def test_parts_of_another_student_or_of_other_shards_are_not_taken(
    shards: Shards, compiled: CompiledTask, student: str, tmp_path: Path
) -> None:
    retrained, others = tmp_path / "student", made_up_shards(tmp_path / "others", compiled, 50, seed=3)
    shutil.copytree(student, retrained)
    weights = bytearray((retrained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (retrained / "model.safetensors").write_bytes(weights)
    copied = shutil.copytree(shards.folder, tmp_path / "copy")
    report = str(tmp_path / "report")
    works = [Work(shards.folder, student, report, None), Work(shards.folder, str(retrained), report, None)]
    works += [Work(others.folder, student, report, None), Work(shards.folder, student, report, others.folder)]
    assert len({work.parts for work in works}) == 4
    assert Work(str(copied), student, report, None).parts == works[0].parts  # wherever they lie


def test_temperatures_are_fitted_on_so_many_comments_at_most_evenly_spaced(
    shards: Shards, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = open_examples(shards, VALIDATION, load_student(student)[0].shape.sequence)
    seen: list[Batch] = []
    monkeypatch.setattr(parts, "fit_temperatures", lambda model, compiled, batches: seen.extend(batches))
    for most, rows in ((5, np.linspace(0, len(held) - 1, 5).astype(int)), (10**6, np.arange(len(held)))):
        monkeypatch.setattr(parts, "CALIBRATED_ON", most)
        seen.clear()
        Worker(Work(shards.folder, student, str(tmp_path), None)).fit_temperatures()
        wanted = [target for batch in held.batches(rows, 4) for target in batch.targets.tolist()]
        assert [target for batch in seen for target in batch.targets.tolist()] == wanted


def test_a_worker_reserves_a_gpu_where_there_is_one() -> None:
    plain, gpus, named = TrainConfig(), TrainConfig(gpus_per_worker=1, cpus_per_worker=4), TrainConfig(machines="student")
    assert resources_of(plain, {"CPU": 2.0}) == {"CPU": 1, "GPU": 0}
    assert resources_of(plain, {"CPU": 2.0, "GPU": 4.0}) == {"CPU": 1, "GPU": 1}
    assert resources_of(gpus, {"CPU": 2.0}) == {"CPU": 4, "GPU": 1}  # the cluster may grow
    assert resources_of(named, {"CPU": 2.0, "GPU": 4.0}) == {"CPU": 1, "GPU": 0, "student": pytest.approx(0.001)}
