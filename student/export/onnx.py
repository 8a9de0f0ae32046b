"""A student as ONNX: the whole greedy decoding in one graph, from a comment's tokens to the answer."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import Dim

from pipeline.base.errors import UserError
from student.decode.choices import NONE, padded
from student.decode.decode import Prefixes
from student.export.folder import ExportedStudent
from student.export.graph import Greedy, Tables

if TYPE_CHECKING:
    import onnx_ir

LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
INPUTS, OUTPUTS = ["tokens", "lengths"], ["columns", "probabilities", "answer"]


@dataclass(frozen=True)
class Found:
    """What a graph answers to a batch of N comments.

    Attributes:
        trails: int32 [N, M], columns of the watched set, `NONE` behind the last.
        probabilities: float32 [N, M, R].
        numbers: int64 [N], of the answers in answers.json; None where there is no such list.
    """

    trails: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    numbers: NDArray[np.int64] | None

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Product of the probabilities of the choices made: [N]."""
        best_NM = self.probabilities.max(-1, initial=0).astype(np.float64)
        return np.where(self.trails == NONE, 1.0, best_NM).prod(1)

    @property
    def margin(self) -> NDArray[np.float64]:
        """How far the likeliest token was from the second likeliest, at the closest choice: [N]."""
        least, best = np.moveaxis(np.sort(self.probabilities, axis=-1)[..., -2:], -1, 0)
        return np.where(self.trails == NONE, 1.0, best - least).min(1, initial=1.0)


def require_onnx() -> None:
    """Refuses to begin without the libraries.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed, which an export needs: pip install {' '.join(LIBRARIES)}")


def write_onnx(path: str, source: ExportedStudent) -> None:
    """Writes a student's decoding as one ONNX file, on a disk."""
    import onnx
    import onnx_ir

    tables = Tables(source.choices, len(source.compiled.automaton.tokens), source.by_state)
    greedy = Greedy(source.model, source.choices, tables, source.numbered).eval()
    with _quiet():
        graph = _lean(_traced(greedy))
        content = onnx_ir.to_proto(graph)
        del content.graph.value_info[:]  # some of it is wrong after the passes, and quantization believes it
        onnx.checker.check_model(content)
    onnx.save(content, path)


def _traced(greedy: Greedy) -> torch.onnx.ONNXProgram:
    """The module as a graph over any number of comments of any length."""
    example = torch.zeros((2, 7), dtype=torch.int64), torch.tensor([5, 7])
    dynamic = {"tokens_BT": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "lengths_B": {0: Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(greedy, example, dynamic_shapes=dynamic, strict=True)  # else len() fixes the batch
        names = OUTPUTS[: len(program.graph_signature.user_outputs)]
        converted = torch.onnx.export(
            program, dynamo=True, optimize=False, input_names=INPUTS, output_names=names, verbose=False
        )
    if converted is None:
        raise AssertionError("torch.onnx gave no program")
    return converted


def _lean(program: torch.onnx.ONNXProgram) -> onnx_ir.Model:
    """The graph with each weight once, as the unrolled steps share it; torch's own passes copy it for every step."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    graph = program.model
    _spell_out_gemm(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    optimizer.fold_constants(graph, should_fold=lambda node: True if node.op_type == "Transpose" else None)
    common.IdentityEliminationPass()(graph)
    common.RemoveUnusedNodesPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)  # it names places on this machine
    return graph


def _spell_out_gemm(graph: onnx_ir.Model) -> None:
    """Makes a transposition and a product of each Gemm: the quantizer would transpose a shared weight once for every step."""
    import onnx_ir

    for gemm in [node for node in graph.graph if node.op_type == "Gemm"]:
        x, weight = gemm.inputs[:2]  # a student has no biases
        turned = onnx_ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = onnx_ir.node("MatMul", [x, turned.outputs[0]])
        onnx_ir.convenience.replace_nodes_and_values(
            graph.graph, gemm, [gemm], [turned, product], gemm.outputs, product.outputs
        )


def quantize(path: str, quantized: str) -> None:
    """Writes the same file with weights of 8 bits; activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(path, quantized, per_channel=True, weight_type=QuantType.QInt8)


def run_onnx(path: str, prefixes: Prefixes, batch_size: int) -> Iterator[Found]:
    """Answers many comments with ONNX Runtime, on the CPU, batch after batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for start in range(0, len(prefixes), batch_size):
        tokens, lengths = padded(prefixes[start : start + batch_size])
        trails, probabilities, *numbers = session.run(None, {"tokens": tokens, "lengths": lengths})
        yield Found(trails.astype(np.int32), probabilities, numbers[0] if numbers else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the converters say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
