"""Several teachers' shards as one: against sums of probabilities by value."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.config import PipelineSettings
from pipeline.extract.given import import_answers
from pipeline.shards.manifest import open_shards
from pipeline.shards.merge import merge
from pipeline.task.task import Task
from pipeline.task.task_file import dump_task
from pipeline.task.values import Values

TASK = Task(name="mail", instruction="Sort it.", fields={"team": ["billing", "bills", "sales"], "urgent": [True, False]})
Votes = dict[str, list[Values]]  # of each text


def shards(folder: Path, votes: Votes, gold: dict[str, Values] | None = None) -> str:
    """An extraction in which each text has these votes."""
    folder.mkdir()
    labels = {text: json.dumps(dict(zip(TASK.fields, values, strict=True))) for text, values in (gold or {}).items()}
    rows = [
        {"body": text, "team": team, "urgent": urgent, "gold": labels.get(text)}
        for text, answers in votes.items()
        for team, urgent in answers
    ]
    (folder / "task.yaml").write_text(dump_task(TASK))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": str(folder / "task.yaml"),
        "out": str(folder),
        "comments": {"paths": [str(folder / "log.jsonl")], "answer": "team,urgent", "gold": "gold"},
    }
    import_answers(PipelineSettings.model_validate(settings))
    return str(folder / "shards")


def shares(folder: Path) -> dict[str, tuple[Values | None, list[dict[object, float]]]]:
    """Of each text: the answer, and of each field the probabilities above nothing."""
    opened, found = open_shards(str(folder)), {}
    compiled = opened.compiled
    for table in opened.tables():
        rows = np.exp(table.logprobs.astype(np.float64)).reshape(len(table.texts), len(TASK.fields), -1)
        answers = np.split(table.answers, np.cumsum(table.lengths)[:-1])
        for text, answer, fields in zip(table.texts, answers, rows, strict=True):
            values = [
                {
                    value: float(row[compiled.automaton.column[compiled.tokenizer.encode([f": {json.dumps(value)}"])[0][0]]])
                    for value in allowed
                }
                for row, allowed in zip(fields, TASK.fields.values(), strict=True)
            ]
            found[text] = (TASK.parse(compiled.tokenizer.decode(answer)), values)
    return found


ONE: Votes = {
    "a": [("billing", True), ("billing", True), ("sales", False)],
    "b": [("sales", True)],
    "only here": [("bills", True)],
}
TWO: Votes = {"A": [("sales", False)], "b": [("billing", True)], "only there": [("sales", True)]}


def test_probabilities_are_means_by_weight(tmp_path: Path) -> None:
    folders = [shards(tmp_path / "one", ONE), shards(tmp_path / "two", TWO, {"b": ("sales", True)})]
    manifest = merge(folders, [1, 3], False, str(tmp_path / "both"))
    assert (manifest.rows, manifest.answers, manifest.teacher.is_here) == (2, "given", False)
    found = shares(tmp_path / "both")
    assert found["a"][0] == ("sales", False)
    assert found["a"][1][0] == pytest.approx({"billing": 2 / 3 / 4, "bills": 0, "sales": (1 / 3 + 3) / 4}, abs=1e-3)
    assert found["b"][1][0] == pytest.approx({"billing": 3 / 4, "bills": 0, "sales": 1 / 4}, abs=1e-3)
    table = next(open_shards(str(tmp_path / "both")).tables())
    assert [len(label) > 0 for label in table.gold] == [False, True]
    with pytest.raises(UserError, match="holds shards already"):
        merge(folders, [], False, str(tmp_path / "both"))


def test_texts_that_one_lacks_are_kept_when_asked(tmp_path: Path) -> None:
    folders = [shards(tmp_path / "one", ONE), shards(tmp_path / "two", TWO)]
    assert merge(folders, [], True, str(tmp_path / "all")).rows == 4
    assert shares(tmp_path / "all")["only there"][0] == ("sales", True)
    with pytest.raises(UserError, match="two folders or more"):
        merge(folders, [1], False, str(tmp_path / "other"))


def test_a_folder_merged_with_itself_stays_what_it_was(tmp_path: Path) -> None:
    folder = shards(tmp_path / "one", ONE)
    merge([folder, folder], [], False, str(tmp_path / "same"))
    before, after = shares(Path(folder)), shares(tmp_path / "same")
    assert {text: answer for text, (answer, _) in before.items()} == {text: answer for text, (answer, _) in after.items()}
    for text, (_, fields) in before.items():
        assert after[text][1][0] == pytest.approx(fields[0], abs=1e-3)
