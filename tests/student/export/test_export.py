from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.cli.main import main
from pipeline.shards.manifest import Manifest, Shards, TeacherFacts
from student.config import TrainConfig
from student.data.answers import teacher_answers
from student.data.examples import open_examples
from student.data.unpack import TEST, TRAIN, VALIDATION
from student.decode.answerer import WHOLE, Answerer
from student.evaluate.fidelity import THRESHOLDS, agreement
from student.export.answer import load
from student.export.card import render_card, teacher_name
from student.export.export import FIGURES, _copy, export
from student.export.folder import ExportedStudent
from student.model.checkpoint import Trained
from tests.names import NAMES, left_open
from tests.student.export.conftest import kept, source_of
from tests.tiny import tiny_task

TRAINING = {
    "train": TrainConfig(objective="topk", epochs=5, batch_size=48, seed=7).recipe(),
    "student": {"layers": 2, "width": 32, "heads": 2, "mlp": 64},
    "parameters": {"embedding": 9600, "rest": 12345},
    "best_epoch": 4,
    "epochs": [{"samples": [{"comment": "a comment of somebody"}]}],
    "cost": {"worker_seconds": 1.0},
    "mlflow": {"uri": "sqlite:///mlflow.db", "run": "1"},
    "shards": {"teacher": {"model": "made up"}},
}
TRAINED = Trained.model_validate(TRAINING)
FLOOR = {"valid": 1.0, "whole": 0.321, "fields": {"mood": 0.432, "loud": 0.543}}
FIDELITY = {
    "examples": {"test": 77},
    "floors": {"majority": FLOOR, "linear_svm": FLOOR | {"whole": 0.654}},
    "confidence": {
        "ece": 0.0123,
        "thresholds": [{"confidence": at, "share": 1 - at, "whole": 0.765 if at < 0.9 else None} for at in THRESHOLDS],
    },
    "certified_on": "the test split",
    "certificates": [
        {"targets": {WHOLE: 0.9}, "certificate": {"coverage": 0.6543, "thresholds": {WHOLE: 0.8765}}, "refusal": None},
        {"targets": {WHOLE: 0.95}, "certificate": None, "refusal": "too few"},
    ],
    "sizes": {"student": 21945, "teacher": None},
    "speed": {
        "teacher_answers_per_second": 12.3,
        "student_answers_per_second": 4567.8,
        "student_device": "an abacus",
        "latency_ms": 8.76,
    },
    "training": TRAINING,
}


@pytest.fixture(scope="module")
def run(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an export, without a report."""
    folder = tmp_path_factory.mktemp("run")
    source_of("choices", shards.compiled).save(str(folder / "student"))
    storage.write_json(str(folder / "student" / "train.json"), TRAINING)
    export(shards.folder, str(folder / "student"), str(folder / "report"), (folder / "export").as_uri())
    return folder


@pytest.fixture
def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "export" / "export.json").read_text())


def card_of(run: Path, shards: Shards, figures: dict[str, Any], **changes: Any) -> str:
    given = {"task": shards.compiled.task, "manifest": shards.manifest, "training": TRAINED, "fidelity": FIDELITY} | changes
    return render_card(given["task"], given["manifest"], given["training"], given["fidelity"], figures)


def taught_by(model: str, shards: Shards) -> Manifest:
    return shards.manifest.model_copy(update={"teacher": TeacherFacts(model=model, parameters=None)})


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_every_form_answers_as_the_student_does(run: Path, figures: dict[str, Any]) -> None:
    assert figures["task"] == "tiny"
    forms = figures["formats"]
    assert list(forms) == ["folder", "onnx", "int8", "mlflow"]
    for name in ("folder", "onnx", "mlflow"):
        assert forms[name]["student"] == {"valid": 1.0, "whole": 1.0, "fields": {"mood": 1.0, "loud": 1.0}}
        assert forms[name]["teacher"] == figures["student"]
    assert forms["int8"]["student"]["valid"] == 1.0
    assert 0 < figures["student"]["fields"]["mood"] < 1
    folder = run / "export"
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert (forms["onnx"]["bytes"], forms["int8"]["bytes"]) == (sizes["student.onnx"], sizes["student.int8.onnx"])
    assert forms["int8"]["bytes"] < forms["onnx"]["bytes"]
    later = ("README.md", "export.json", "student.onnx", "student.int8.onnx")
    assert forms["folder"]["bytes"] == sum(size for name, size in sizes.items() if name not in later)
    assert not {"train.json", "__pycache__"} & {file.name for file in folder.rglob("*")}


def test_the_figures_are_of_test_comments(run: Path, shards: Shards, figures: dict[str, Any]) -> None:
    student, compiled = Answerer.load(str(run / "student")), shards.compiled
    found = {}
    for split in (TRAIN, VALIDATION, TEST):
        examples = open_examples(shards, split, "choices")
        answers = student.answer(kept(source_of("choices", compiled), [examples.text(i) for i in range(len(examples))]))
        values = [tuple(answer.values.values()) for answer in answers]
        found[split] = (len(examples), agreement(compiled.task, teacher_answers(examples), values))
    assert (figures["examples"], figures["student"]) == found[TEST]
    assert found[TEST][1] not in (found[TRAIN][1], found[VALIDATION][1])


def test_the_card_without_a_report(run: Path, figures: dict[str, Any]) -> None:
    card = (run / "export" / "README.md").read_text()
    assert "`retort evaluate`" in card
    assert "TF-IDF" not in card
    metrics = front_matter(card)["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [figures["student"]["whole"], *figures["student"]["fields"].values()]
    assert "a comment of somebody" not in card
    assert "made up" in card
    assert "21,945 parameters" in card
    for form in figures["formats"].values():
        assert f"| {form['name']} | 100.0 % | {100 * form['teacher']['whole']:.1f} % |" in card


def test_the_card_with_a_report(run: Path, shards: Shards, figures: dict[str, Any]) -> None:
    card = card_of(run, shards, figures)
    for text in (
        "| linear SVM | 100.0 % | 65.4 % | 43.2 % | 54.3 % |",
        "| majority answer | 100.0 % | 32.1 % |",
    ):
        assert text in card
    for text in ("0.012", "| 0.7 | 30.0 % | 76.5 % |", "| 0.95 | 5.0 % | – |", "an abacus", "8.8 ms", "4,568", "unknown"):
        assert text in card
    for text in (
        "topk",
        "| 90.0 % | 65.4 % | 0.876 |\n| 95.0 % | 0.0 % |  |",
        "epoch 4",
        "48, 0.00781, 7",  # 0.25 / width, as no rate was set
        "9,600, 12,345",
        "of 1 to 40 tokens, without URLs, without the text of control",
    ):
        assert text in card


def test_the_card_names_no_folder_of_this_machine(run: Path, shards: Shards, figures: dict[str, Any]) -> None:
    files = ["/home/me/private/a.jsonl.gz", "s3://secret/b.parquet"]
    manifest = taught_by("/home/me/private/teacher/", shards).model_copy(update={"files": files})
    card = card_of(run, shards, figures, manifest=manifest)
    assert "private" not in card
    assert "secret" not in card
    assert "a.jsonl.gz, b.parquet" in card
    assert "a language model, teacher," in card
    assert "base_model" not in front_matter(card)
    manifest = taught_by("google/gemma-3-4b-it", shards)
    assert front_matter(card_of(run, shards, figures, manifest=manifest))["base_model"] == "google/gemma-3-4b-it"
    assert teacher_name("s3://bucket/models/mine") == "mine"


def test_the_card_of_a_student_of_labels(run: Path, shards: Shards, figures: dict[str, Any]) -> None:
    manifest = taught_by("google/gemma-3-4b-it", shards)
    speed = FIDELITY["speed"] | {"teacher_answers_per_second": None}
    about = {"manifest": manifest, "fidelity": FIDELITY | {"speed": speed}}
    own = card_of(run, shards, figures, **about)
    card = card_of(run, shards, figures | {"answers": "given"}, **about)
    assert "| answers a second | – | 4,568 |" in own
    assert "| answers a second | 4,568 |" in card
    assert "base_model" not in front_matter(card)
    for text in (
        "whole answers equal to the given ones",
        "mood equal to the given ones",
        "Agreement with the given answers on",
    ):
        assert text in card
    for text in ("equal to the teacher's", "greement with the teacher", "the teacher's own answers", "imitates the teacher"):
        assert text in own
        assert text not in card


def test_the_card_with_every_setting_left_open(run: Path, shards: Shards, figures: dict[str, Any]) -> None:
    training = TRAINED.model_copy(update={"train": TrainConfig.model_validate(left_open(TrainConfig))})
    manifest = taught_by("some/model", shards)
    for fidelity in (FIDELITY, None):
        assert "0.00781" in card_of(run, shards, figures, training=training, manifest=manifest, fidelity=fidelity)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_shows_any_name_as_it_is(run: Path, shards: Shards, figures: dict[str, Any], name: str) -> None:
    shares = {"fields": {name: 0.5}}
    named = figures | {"student": figures["student"] | shares}
    named["formats"] = {form: about | {"teacher": about["teacher"] | shares} for form, about in figures["formats"].items()}
    task = tiny_task(fields={name: [name, None]}, instruction=f"Judge. {name or '-'}")
    card = card_of(run, shards, named, task=task, fidelity=None)
    metric = front_matter(card)["model-index"][0]["results"][0]["metrics"][1]["name"]
    assert metric == name.replace("\u202e", " ") + " equal to the teacher's"
    assert not re.search(r"(?<!\\)<script", card.split("---\n", 2)[2])
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("| ")]
    assert set(columns) <= {3, 7}


def test_the_cards_own_example(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (run / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run / "export")
    with redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    answer, confidence = printed.getvalue().splitlines()
    expected = load(run / "export").answer("I love it")
    assert answer == str(expected["answer"])
    assert float(confidence) == pytest.approx(expected["confidence"], abs=1e-5)


def test_the_report_of_another_student_is_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    from student.export.export import _report

    folder = str(run / "another")
    assert _report(folder, TRAINED) is None
    storage.write_json(f"{folder}/fidelity.json", FIDELITY)
    assert _report(folder, TRAINED) == json.loads(json.dumps(FIDELITY))
    assert _report(folder, TRAINED.model_copy(update={"best_epoch": 1})) is None
    assert "another student" in caplog.text


def test_nothing_is_written_where_the_graph_is_wrong(
    run: Path, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the weights of another student."""
    other = ExportedStudent(source_of("full", shards.compiled).model, shards.compiled, None)
    made = run / "export" / "student.onnx"
    monkeypatch.setattr("student.export.export.write_onnx", lambda path, source: Path(path).write_bytes(made.read_bytes()))
    other.save(str(tmp_path / "student"))
    storage.write_json(str(tmp_path / "student" / "train.json"), TRAINING)
    folders = (str(tmp_path / "student"), str(tmp_path / "report"), str(tmp_path / "export"))
    with pytest.raises(UserError, match="the ONNX graph is not the student"):
        export(shards.folder, *folders)
    assert not (tmp_path / "export").exists()


def test_what_cannot_be_exported(shards: Shards, tmp_path: Path) -> None:
    folders = (shards.folder, str(tmp_path / "student"), str(tmp_path / "report"), str(tmp_path / "export"))
    with pytest.raises(UserError, match="no student in"):
        export(*folders)
    source_of("choices", shards.compiled).save(str(tmp_path / "student"))
    with pytest.raises(UserError, match="was not trained"):
        export(*folders)
    source_of("spelt", shards.compiled).save(str(tmp_path / "other"))
    storage.write_json(str(tmp_path / "other" / "train.json"), TRAINING)
    with pytest.raises(UserError, match="another task"):
        export(shards.folder, str(tmp_path / "other"), *folders[2:])


def test_the_command(run: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("student.export.export.export", lambda *arguments: given.extend(arguments) or figures)
    done = CliRunner().invoke(main, ["export", "--out", str(run), "--student", "s3://models/first"])
    assert done.exit_code == 0, done.output
    assert given == [f"{run}/shards", "s3://models/first", f"{run}/report", f"{run}/export"]
    for form in figures["formats"].values():
        assert form["name"] in done.output
    assert os.path.basename(run) in done.output


def test_another_export_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    made, folder, mine = tmp_path / "made", tmp_path / "export", tmp_path / "mine"
    for name in ("answer.py", "answers.json"):
        storage.write_text(str(made / name), name)
    storage.write_text(str(mine), "")
    storage.write_text(str(folder / "notes.txt"), "the user's own")
    first = _copy([made], str(folder))
    storage.write_json(str(folder / FIGURES), {"files": [*first, "../mine"]})
    (made / "answers.json").unlink()
    assert _copy([made], str(folder)) == ["answer.py"]
    assert sorted(path.name for path in folder.iterdir()) == ["answer.py", FIGURES, "notes.txt"]
    assert mine.exists()
