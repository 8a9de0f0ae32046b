from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.base.storage import write_json
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.config import PruneConfig, TrainConfig
from student.data.examples import Batch, Examples
from student.model.checkpoint import PRUNED, save_student
from student.model.model import Student
from student.prune.cut import choose, cut
from student.prune.parent import Parent
from student.prune.sizes import Sizes
from student.train.loop import Loop, Training
from tests.student.conftest import DEBUG
from tests.student.prune.students import make
from tests.student.prune.test_cut import measured


def stream(model: Student, batch: Batch, example: int) -> list[torch.Tensor]:
    """What each layer reads of one example, and what the last one writes: float64 [T, D], no opening, no padding."""
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in model.blocks]
    hooks.append(model.blocks[-1].register_forward_hook(lambda _, __, wrote: seen.append(wrote)))
    with torch.no_grad():
        model(batch.tokens[example : example + 1])
    for hook in hooks:
        hook.remove()
    return [state[0].double() for state in seen[-len(model.blocks) - 1 :]]


def test_the_distance_is_that_of_kept_channels_where_kept_layers_read(source: Student, examples: Examples) -> None:
    whole, batch = Sizes.of(source.shape), examples.batch(np.arange(5))
    scores = measured(source, examples)
    kept = choose(scores, source.shape, Sizes(20, whole.heads, whole.groups, whole.mlp, 2))
    student = cut(source, kept)
    expected = []
    for place in batch.predict.tolist():
        example, step = divmod(place, batch.tokens.shape[1])
        ours, theirs = stream(student, batch, example), stream(source, batch, example)
        pairs = zip(ours, [theirs[layer] for layer in kept.layers] + theirs[-1:], strict=True)
        cuts = [(our[step], their[step][kept.channels]) for our, their in pairs]
        expected.append(sum(float((our - their).square().sum() / their.square().sum()) for our, their in cuts) / len(cuts))
    parent = Parent(student, source, kept.layers.tolist(), kept.channels.tolist())
    student(batch.tokens, batch.predict)
    torch.testing.assert_close(parent(batch).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


def test_an_uncut_student_is_at_no_distance(compiled: CompiledTask, family: str, examples: Examples) -> None:
    student, batch = make(compiled, family), examples.batch(np.arange(3))
    parent = Parent(student, make(compiled, family), [0, 1, 2], list(range(student.shape.width)))
    student(batch.tokens, batch.predict)
    assert parent(batch).tolist() == [0.0] * len(batch.predict)


@pytest.fixture
def pruned(source: Student, examples: Examples, compiled: CompiledTask, tmp_path: Path) -> Path:
    """A folder as `retort prune` leaves it, and its source's."""
    whole, scores = Sizes.of(source.shape), measured(source, examples)
    kept = choose(scores, source.shape, Sizes(16, whole.heads, whole.groups, 16, 2))
    save_student(str(tmp_path / "source"), source, compiled)
    save_student(str(tmp_path / "pruned"), cut(source, kept), compiled)
    about = {"source": {"student": str(tmp_path / "source")}, "prune": PruneConfig(width=16).recipe(), "kept": kept.as_dict()}
    write_json(str(tmp_path / "pruned" / PRUNED), about)
    return tmp_path / "pruned"


def trained(shards: Shards, **changes: object) -> tuple[Loop, list[dict[str, float]]]:
    config = TrainConfig.model_validate({"epochs": 3, "batch_size": 16, "learning_rate": 0.003} | changes)
    loop = Loop(Training.of(DEBUG, config, shards), shards)
    return loop, [report.row for report in loop.run() if report.epoch_ended]


def test_a_training_brings_hidden_states_closer_only_when_asked(shards: Shards, pruned: Path) -> None:
    nothing = {f"{term}_{end}": 0.0 for term in ("kl", "ce") for end in ("start", "end")}
    _, followed = trained(shards, init=str(pruned), hidden=1.0, **nothing)
    assert followed[-1]["train_loss"] == pytest.approx(followed[-1]["train_hidden"])
    assert followed[-1]["train_hidden"] < 0.95 * followed[0]["train_hidden"]
    _, alone = trained(shards, init=str(pruned))
    assert "train_hidden" not in alone[0]


def test_a_training_begins_at_the_weights_it_is_given(shards: Shards, pruned: Path, source: Student) -> None:
    training = Training.of(DEBUG, TrainConfig(init=str(pruned)), shards)
    assert (training.shape.width, training.shape.layers, training.shape.family) == (16, 2, source.shape.family)
    begun = Loop(training, shards).state().weights
    given = training.student().state_dict()
    assert all(torch.equal(begun[name], given[name]) for name in begun)
    assert not torch.equal(begun["head.weight"], Student(training.shape, training.rows).head.weight)


def test_what_does_not_fit_is_refused(shards: Shards, pruned: Path) -> None:
    with pytest.raises(UserError, match="start from a folder of `retort prune`"):
        Training.of(DEBUG, TrainConfig(hidden=1), shards)
    with pytest.raises(UserError, match="was not made so"):
        Training.of(DEBUG, TrainConfig(init=str(pruned), tail=True), shards)
    with pytest.raises(UserError, match="no student in"):
        Training.of(DEBUG, TrainConfig(init=str(pruned / "none")), shards)
    (pruned / PRUNED).unlink()
    with pytest.raises(UserError, match=r"start from a folder of `retort prune`"):
        trained(shards, init=str(pruned), hidden=1.0)
