"""`retort export`: a student in forms that need no Retort, each held against the student and its teacher."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.base import storage
from pipeline.comments.reading import filter_rows, text_row
from pipeline.shards.manifest import open_shards
from pipeline.task.compiled import require_same
from student.data.answers import teacher_answers
from student.data.examples import Examples, student_examples
from student.data.unpack import TEST
from student.evaluate.fidelity import agreement
from student.evaluate.parts import BATCH_SIZE
from student.export.card import CARD, render_card
from student.export.folder import ExportedStudent, write_folder
from student.export.measure import by_folder, by_mlflow, by_onnx, by_pytorch, verify
from student.export.onnx import quantize, require_onnx, write_onnx
from student.model.checkpoint import Trained, load_training, require_student
from student.registry.mlflow_model import save_pyfunc

log = logging.getLogger(__name__)

FIGURES = "export.json"
FORMS = {  # by name: how it is called, and where it is made
    "folder": ("answer.py", "folder"),
    "onnx": ("ONNX", "onnx/student.onnx"),
    "int8": ("ONNX, 8 bits", "onnx/student.int8.onnx"),
    "mlflow": ("MLflow", "mlflow"),
}


def export(shards_folder: str, student_folder: str, report_folder: str, folder: str) -> dict[str, Any]:
    """Writes a student as a portable folder with ONNX files and a model card; returns what export.json holds.

    Nothing is written unless every form runs, and the ONNX graph answers as the student does.

    Args:
        report_folder: where its report is; without one the card says less.

    Raises:
        UserError: no trained student, other shards than its own, or a library is missing.
    """
    require_onnx()
    require_student(student_folder)
    training, source, shards = load_training(student_folder), ExportedStudent.load(student_folder), open_shards(shards_folder)
    require_same(source.compiled.hashes, shards.compiled.hashes, student_folder, shards_folder)
    test = student_examples(shards, TEST, source.model)
    with tempfile.TemporaryDirectory() as scratch:
        forms = _make(source, Path(scratch))
        log.info("answering %s test comments in each form", f"{len(test):,}")
        figures = {"answers": shards.manifest.answers} | _measure(forms, source, test, BATCH_SIZE)
        card = render_card(source.compiled.task, shards.manifest, training, _report(report_folder, training), figures)
        files = _copy([forms["folder"], forms["onnx"].parent], folder)
    storage.write_text(storage.join(folder, CARD), card)
    figures["files"] = files
    storage.write_json(storage.join(folder, FIGURES), figures)
    return figures


def _make(source: ExportedStudent, scratch: Path) -> dict[str, Path]:
    """Makes every form of a student; returns where each is."""
    log.info("writing the forms of %s", source.compiled.task.name)
    forms = {name: scratch / place for name, (_, place) in FORMS.items()}
    forms["onnx"].parent.mkdir()
    write_folder(str(forms["folder"]), source)
    write_onnx(str(forms["onnx"]), source)
    quantize(str(forms["onnx"]), str(forms["int8"]))
    source.save(str(scratch / "student"))
    save_pyfunc(str(forms["mlflow"]), str(scratch / "student"))
    return forms


def _measure(forms: dict[str, Path], source: ExportedStudent, test: Examples, batch_size: int) -> dict[str, Any]:
    """Has every form answer the test comments; returns the figures."""
    task, teacher = source.compiled.task, teacher_answers(test)
    rows = filter_rows([text_row(i, test.text(i)) for i in range(len(test))], task.comments, source.compiled.tokenizer)
    texts, student = [row.text for row in rows], by_pytorch(source, rows)
    answers = {name: by_onnx(str(forms[name]), source, rows, batch_size) for name in ("onnx", "int8")}
    verify(student, answers["onnx"])
    answers |= {"folder": by_folder(str(forms["folder"]), texts, task), "mlflow": by_mlflow(str(forms["mlflow"]), texts, task)}
    own = [values for values in student.values if values is not None]
    formats = {
        name: {
            "name": FORMS[name][0],
            "bytes": _bytes(path),
            "teacher": agreement(task, teacher, answers[name].values),
            "student": agreement(task, own, answers[name].values),
        }
        for name, path in forms.items()
    }
    return {"task": task.name, "examples": len(test), "student": agreement(task, teacher, student.values), "formats": formats}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _report(folder: str, training: Trained) -> dict[str, Any] | None:
    """The figures of a student's report; None where there is none, or it is another student's."""
    path = storage.join(folder, "fidelity.json")
    if not storage.exists(path):
        return None
    figures: dict[str, Any] = storage.read_json(path)
    if Trained.model_validate(figures["training"]) != training:
        log.warning("the report in %s is about another student: the card says nothing of it", folder)
        return None
    return figures


def _copy(made: Sequence[Path], folder: str) -> list[str]:
    """Copies what folders on a disk hold to one anywhere, in place of an earlier export; returns the files' names."""
    files = {str(file.relative_to(one)): file for one in made for file in sorted(one.rglob("*")) if file.is_file()}
    earlier = storage.join(folder, FIGURES)
    for name in storage.read_json(earlier).get("files", []) if storage.exists(earlier) else []:
        if name not in files and Path(name).name == name:  # nothing outside, whatever the file says
            storage.delete(storage.join(folder, name))
    for name, file in files.items():
        storage.write_bytes(storage.join(folder, name), file.read_bytes())
    return list(files)
