"""What an extraction settles before an engine starts; tests/integration/test_run.py has the whole command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.comments.reading import comment_tables
from pipeline.config import PipelineSettings
from pipeline.extract import extract as driver
from pipeline.extract.extractor import Extraction
from pipeline.task.task_file import dump_task
from tests.tiny import save_teacher, tiny_task, tiny_tokenizer


class Run:
    """An extraction that stops where the first engine would start, its teacher's calibration made up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.teacher, self._folder = folder / "teacher", folder
        save_teacher(self.teacher, seed=0)
        (folder / "task.yaml").write_text(dump_task(tiny_task()))
        (folder / "comments.jsonl").write_text("".join(json.dumps({"body": f"good {i}"}) + "\n" for i in range(9)))
        monkeypatch.setattr(driver, "start_ray", lambda: None)
        monkeypatch.setattr(driver, "comment_batches", comment_tables)
        monkeypatch.setattr(driver, "prepare", self._prepare)

    def __call__(self, **changes: Any) -> Extraction:
        settings = {
            "task": str(self._folder / "task.yaml"),
            "out": str(self._folder / "out"),
            "teacher": {"model": str(self.teacher)} | changes.get("teacher", {}),
            "comments": {"paths": [str(self._folder / "comments.jsonl")]},
            "extract": changes.get("extract", {}),
        }
        return driver.prepare_run(PipelineSettings.model_validate(settings))[0]

    def _prepare(self, extraction: Extraction, *_: object) -> None:
        storage.write_json(storage.join(extraction.shards, "format_mass.json"), {"teacher": extraction.identity})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_an_extraction_goes_on_with_the_same_teacher_on_other_machines(run: Run) -> None:
    first = run()
    assert run(teacher={"engine": "transformers", "actors": 2}).identity == first.identity


def test_a_teacher_with_another_tokenizer_is_another_run(run: Run) -> None:
    """Even where its weights are the same."""
    run()
    tiny_tokenizer(280).save_pretrained(run.teacher)
    with pytest.raises(UserError, match=r"holds another run \(its tokenizer differ\)"):
        run()


def test_a_teacher_with_other_weights_is_another(run: Run) -> None:
    run()
    save_teacher(run.teacher, seed=1)
    with pytest.raises(UserError, match=r"does not fit this extraction: another content \("):
        run()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"teacher": {"temperature": 0.5}}, "temperature"),
        ({"teacher": {"dtype": "float32"}}, "dtype"),
        ({"extract": {"capture": "choices"}}, "capture"),
        ({"extract": {"codec": "compact"}}, "codec"),
        ({"teacher": {"temperature": 1.0}, "extract": {"samples_per_comment": 2}}, "temperature .*, samples_per_comment"),
    ],
)
def test_other_settings_are_another_extraction(run: Run, changes: dict[str, Any], differs: str) -> None:
    run()
    with pytest.raises(UserError, match=rf"does not fit this extraction: another {differs} \("):
        run(**changes)


def test_samples_that_would_all_be_the_same_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"without a teacher\.temperature would all be the same answer"):
        run(extract={"samples_per_comment": 2})
