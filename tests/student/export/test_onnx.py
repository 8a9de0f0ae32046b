from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pipeline.base.errors import UserError
from pipeline.task.compiled import CompiledTask
from student.decode.choices import NONE, padded
from student.export import folder
from student.export.folder import ExportedStudent
from student.export.measure import Answered, by_onnx, by_pytorch, verify
from student.export.onnx import Found, quantize, require_onnx, run_onnx, write_onnx
from tests.student.decode.test_decode import make_student, recompiled
from tests.student.export.conftest import TEXTS, kept, reference, source_of
from tests.tiny import ROOT, tiny_task


@pytest.fixture(scope="module", params=["full", "spelt", pytest.param("gemma", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest, compiled: CompiledTask) -> ExportedStudent:
    """Plain students of both sequences, and one of Gemma 3's layers with an opening: to trace one takes seconds."""
    return source_of(request.param, compiled)


@pytest.fixture(scope="module")
def graph(source: ExportedStudent, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("graph") / "student.onnx")
    write_onnx(path, source)
    return path


def found_by(graph: str, source: ExportedStudent, batch_size: int) -> list[Found]:
    return list(run_onnx(graph, [np.array(row.tokens + source.separator) for row in kept(source, TEXTS)], batch_size))


def test_it_answers_as_retort_does(source: ExportedStudent, graph: str) -> None:
    rows = kept(source, TEXTS)
    expected, found = by_pytorch(source, rows), by_onnx(graph, source, rows, 16)
    assert found.values == expected.values
    assert len(set(expected.values)) > 2
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=2e-5)
    verify(expected, found)


def test_every_probability_is_the_models(source: ExportedStudent, graph: str) -> None:
    found = found_by(graph, source, 16)
    probabilities, trails = (np.concatenate([getattr(part, name) for part in found]) for name in ("probabilities", "trails"))
    for row, probability_MR, trail in zip(kept(source, TEXTS), probabilities, trails, strict=True):
        expected = reference(source, row)
        assert (trail != NONE).sum() == len(expected)
        assert [int(p.argmax()) for p in expected] == trail[: len(expected)].tolist()
        np.testing.assert_allclose(probability_MR[: len(expected)], expected, atol=1e-4)
        assert not probability_MR[len(expected) :].any()
        assert (trail[len(expected) :] == NONE).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_any_size_and_length(source: ExportedStudent, graph: str, batch_size: int) -> None:
    together, apart = found_by(graph, source, len(TEXTS)), found_by(graph, source, batch_size)
    assert len(apart) == -(-len(TEXTS) // batch_size)
    assert {len(row.tokens) for row in kept(source, TEXTS)} >= {5, 6, 9, 10, 13, 14}
    for name in ("trails", "numbers"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in apart]), getattr(together[0], name))
    np.testing.assert_allclose(np.concatenate([part.probabilities for part in apart]), together[0].probabilities, atol=1e-5)


def test_what_pads_a_row_does_not_matter(source: ExportedStudent, graph: str) -> None:
    tokens, lengths = padded([np.array(row.tokens + source.separator) for row in kept(source, TEXTS)])
    other = np.where(np.arange(tokens.shape[1] + 5) < lengths[:, None], np.pad(tokens, [(0, 0), (0, 5)]), 17)
    session = onnxruntime.InferenceSession(graph)
    for one, two in zip(*(session.run(None, {"tokens": t, "lengths": lengths}) for t in (tokens, other)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_file(source: ExportedStudent, graph: str) -> None:
    model = onnx.load(graph)
    assert str(ROOT) not in str(model)
    assert "site-packages" not in str(model)
    assert {node.op_type for node in model.graph.node} >= {"MatMul", "ScatterElements"}
    weights = sum(p.numel() for p in source.model.parameters()) * 4
    stored = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer if weight.data_type == 1)
    assert weights <= stored < 1.3 * weights  # once, and not for every choice again


def stored(path: str) -> int:
    """Bytes of the weights and tables."""
    return sum(onnx.numpy_helper.to_array(weight).nbytes for weight in onnx.load(path).graph.initializer)


def test_eight_bits_answer_validly(source: ExportedStudent, graph: str, tmp_path: Path) -> None:
    small, rows = str(tmp_path / "small.onnx"), kept(source, TEXTS)
    quantize(graph, small)
    assert stored(small) < stored(graph)  # a tiny graph is nodes more than weights
    assert None not in by_onnx(small, source, rows, 16).values
    for found in found_by(small, source, 16):
        sums = found.probabilities.sum(-1)
        np.testing.assert_allclose(sums[found.trails != NONE], 1, atol=1e-5)


@pytest.fixture(scope="module")
def single(compiled: CompiledTask) -> ExportedStudent:
    one = recompiled(compiled, tiny_task(fields={"mood": ["good"]}))
    return ExportedStudent(make_student(one, layers=1), one, None)


def test_a_task_of_one_answer(single: ExportedStudent, tmp_path: Path) -> None:
    write_onnx(str(tmp_path / "one.onnx"), single)
    for batch_size in (1, 7):
        answered = by_onnx(str(tmp_path / "one.onnx"), single, kept(single, TEXTS), batch_size)
        assert answered.values == [("good",)] * len(TEXTS)
        assert (answered.confidence == 1).all()


def test_a_task_of_too_many_answers_to_list(single: ExportedStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LISTED", 0)
    write_onnx(str(tmp_path / "one.onnx"), single)
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"))
    assert [output.name for output in session.get_outputs()] == ["columns", "probabilities"]
    assert by_onnx(str(tmp_path / "one.onnx"), single, kept(single, TEXTS), 8).values == [("good",)] * len(TEXTS)
    folder.write_folder(str(tmp_path / "folder"), single)
    assert not (tmp_path / "folder" / "answers.json").exists()


def test_what_is_verified() -> None:
    student = Answered([("a",), ("b",)], np.array([0.9, 0.5]))
    verify(student, replace(student, confidence=student.confidence + 5e-5))
    other = Answered([("a",), ("c",)], np.array([0.9, 0.5]))
    verify(student, replace(other, margin=np.array([0.5, 1e-5])))  # as likely
    with pytest.raises(UserError, match="of 2 test comments 1 are answered otherwise, and 0"):
        verify(student, replace(other, margin=np.array([1e-5, 1e-3])))
    with pytest.raises(UserError, match="0 are answered otherwise, and 1"):
        verify(student, replace(student, confidence=np.array([0.9, 0.5002])))


def test_confidence_and_margin() -> None:
    probabilities = np.array([[[0.7, 0.2, 0.1], [0.5, 0.0, 0.5]], [[0.1, 0.0, 0.9], [0, 0, 0]]], np.float32)
    found = Found(np.array([[0, 0], [2, NONE]], np.int32), probabilities, None)
    assert found.confidence == pytest.approx([0.35, 0.9])
    assert found.margin == pytest.approx([0.0, 0.8])


def test_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.export.onnx.LIBRARIES", ("onnx", "onnxnothing"))
    with pytest.raises(UserError, match=r"onnxnothing not installed.*pip install"):
        require_onnx()
