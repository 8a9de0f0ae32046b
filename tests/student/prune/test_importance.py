from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from student.data.examples import Examples
from student.model.model import Student
from student.prune.importance import Importance, importance, measure, width_norms
from tests.student.prune.reference import Reference, Trace, loss

CHOSEN = np.array([90, 3, 41, 7, 120, 66, 0, 15])
LEAVE_OUT = 5


@dataclass
class Read:
    """One example: its trace, and the losses of the whole model (last) and without each layer; targets at choice steps."""

    trace: Trace
    losses: list[float]
    targets: int


@pytest.fixture(scope="module")
def reads(source: Student, examples: Examples) -> list[Read]:
    return [_read(Reference(source), examples, int(index)) for index in CHOSEN]


def _read(reference: Reference, examples: Examples, index: int) -> Read:
    compiled, columns, shape = examples.compiled, examples.columns, reference.shape
    start, end = columns["comment_starts"][index : index + 2]
    separator = compiled.separator if shape.separator is None else shape.separator
    before = [*shape.opening, *columns["comment"][start:end].tolist(), *separator]
    start, end = columns["answer_starts"][index : index + 2]
    answer, states = columns["answer"][start:end].tolist(), columns["state"][start:end]
    choices = [step for step, state in enumerate(states) if not compiled.automaton.forced[state]]
    places = [len(before) - 1 + step for step in choices]
    targets = [compiled.watched.tokens.tolist().index(answer[step]) for step in choices]
    ids = before + answer[:-1]
    left_out = [reference.run(ids, without).logits[places] for without in (*range(shape.layers), None)]
    return Read(reference.run(ids), [loss(logits, targets) for logits in left_out], len(targets))


def expected(reads: list[Read]) -> Importance:
    def over(parts: list[torch.Tensor]) -> np.ndarray:
        """Units' activations, [T, U] of each example, summed up."""
        total = 0.0
        for part in parts:
            total = total + part.abs().mean(0) ** 2
        return total.sqrt().numpy()

    traces = [read.trace for read in reads]
    layers, names = range(len(traces[0].heads)), list(traces[0].norms)
    readers = [name for name in names if not name.endswith("out_norm")]
    return Importance(
        heads_LH=np.stack([over([trace.heads[layer] for trace in traces]) for layer in layers]),
        neurons_LF=np.stack([over([trace.neurons[layer] for trace in traces]) for layer in layers]),
        channels_D=sum(over([trace.norms[name][1] for trace in traces]) for name in readers),
        cosine_L=np.array([1 - np.mean([c for trace in traces for c in _cosines(trace, layer)]) for layer in layers]),
        loss_L=_rises(reads[:LEAVE_OUT]),
    )


def _cosines(trace: Trace, layer: int) -> list[float]:
    pairs = zip(trace.stream[layer], trace.stream[layer + 1], strict=True)
    return [float(x @ y / (x.norm() * y.norm())) for x, y in pairs]


def _rises(reads: list[Read]) -> np.ndarray:
    losses = sum(np.array(read.losses) for read in reads) / sum(read.targets for read in reads)
    return losses[:-1] - losses[-1]


def measured(source: Student, examples: Examples, batch_size: int = 4, workers: int = 1) -> Importance:
    shares = [CHOSEN[rank::workers] for rank in range(workers)]
    leave_out = [len(CHOSEN[:LEAVE_OUT][rank::workers]) for rank in range(workers)]
    parts = [measure(source, examples, share, count, batch_size) for share, count in zip(shares, leave_out, strict=True)]
    return importance(parts, source.shape.layers)


def assert_alike(found: Importance, wanted: Importance, tolerance: float) -> None:
    for field in fields(Importance):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max(), err_msg=field.name)


def test_the_reference_is_the_student(source: Student, examples: Examples) -> None:
    ids = torch.from_numpy(examples.prefix(3).astype(np.int64))
    wanted = Reference(source).run([*source.shape.opening, *ids.tolist()]).logits[len(source.shape.opening) :]
    torch.testing.assert_close(source(ids[None])[0].double(), wanted, atol=1e-5, rtol=1e-4)


def test_examples_differ_in_length_and_are_longer_than_windows(source: Student, examples: Examples) -> None:
    windows = [kind.window or 0 for kind in source.shape.each_layer]
    assert len(set(examples.lengths[CHOSEN].tolist())) > 2
    assert examples.lengths[CHOSEN].min() > max(windows)


def test_norms_are_those_over_the_width_in_the_order_they_run(source: Student, reads: list[Read]) -> None:
    assert sorted(width_norms(source)) == sorted(reads[0].trace.norms)
    assert all(norm.normalized_shape == (source.shape.width,) for norm in width_norms(source).values())


def test_importance_is_what_a_slow_reference_says(source: Student, examples: Examples, reads: list[Read]) -> None:
    assert_alike(measured(source, examples), expected(reads), 2e-4)


def test_batches_and_workers_change_nothing(source: Student, examples: Examples) -> None:
    alone = measured(source, examples, batch_size=1)
    for batch_size, workers in ((len(CHOSEN), 1), (2, 3), (4, len(CHOSEN) + 2)):
        assert_alike(measured(source, examples, batch_size, workers), alone, 1e-5)


def test_examples_weigh_alike_and_layers_are_left_out_for_the_first_alone(source: Student, examples: Examples) -> None:
    once, twice, swapped = (
        importance([measure(source, examples, chosen, LEAVE_OUT, 4)], source.shape.layers)
        for chosen in (
            CHOSEN,
            np.concatenate([CHOSEN, CHOSEN]),
            np.concatenate([CHOSEN[:LEAVE_OUT], CHOSEN[: LEAVE_OUT - 1 : -1]]),
        )
    )
    np.testing.assert_allclose(np.sqrt(2) * once.heads_LH, twice.heads_LH, rtol=1e-5)
    np.testing.assert_allclose(once.loss_L, swapped.loss_L, rtol=1e-9)
    np.testing.assert_allclose(once.loss_L, twice.loss_L, rtol=1e-9)


def test_measuring_leaves_the_model_as_it_is(source: Student, examples: Examples) -> None:
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    measured(source, examples)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in source.modules()]
    assert not any(hooks)


def test_importance_is_read_as_it_was_written(source: Student, examples: Examples, tmp_path: Path) -> None:
    scores, path = measured(source, examples), str(tmp_path / "importance.safetensors")
    scores.save(path)
    loaded = Importance.load(path)
    assert all(np.array_equal(getattr(loaded, field.name), getattr(scores, field.name)) for field in fields(Importance))
