from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.shards.manifest import Shards
from student.data.examples import Batch, Examples, open_examples
from student.data.unpack import TRAIN
from student.decode.choices import Choices
from student.decode.fields import Fields
from student.evaluate.calibrate import fit_temperatures
from student.model.model import Student


class Teacher(torch.nn.Module):
    """Stands for a student: logits as they are given."""

    def __init__(self, model: Student, logits: torch.Tensor) -> None:
        super().__init__()
        self.shape, self._weight, self._logits = model.shape, model.head.weight, logits

    def forward(self, tokens: torch.Tensor, predict: torch.Tensor) -> torch.Tensor:
        return self._logits


def drawn(examples: Examples, seed: int) -> tuple[Batch, torch.Tensor]:
    """A batch whose targets are drawn from some logits, over what each state allows."""
    batch = examples.batch(np.arange(len(examples)))
    allowed_MR = torch.as_tensor(examples.compiled.automaton.allowed)[batch.state]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((len(batch.targets), batch.teacher.shape[1]), generator=generator)
    probability = logits[:, : allowed_MR.shape[1]].masked_fill(~allowed_MR, -torch.inf).softmax(-1)
    targets = torch.multinomial(probability, 1, generator=generator)[:, 0]
    return Batch(**{**vars(batch), "targets": targets}), logits


@pytest.mark.parametrize("sequence", ["full", "choices"])
def test_planted_temperatures_are_found_by_field(model: Student, shards: Shards, sequence: str) -> None:
    """Logits twice too sure in one field and half as sure in the other want 2 and 1/2."""
    examples = open_examples(shards, TRAIN, sequence)
    compiled = shards.compiled
    fields = torch.as_tensor(Fields(compiled, Choices(compiled, forced_read=sequence == "full")).by_state)
    batch, logits = drawn(examples, seed=0)
    factor = torch.tensor([2.0, 0.5])[fields[batch.state].clamp_min(0)]
    found = fit_temperatures(Teacher(model, logits * factor[:, None]), compiled, [batch])
    assert found["mood"] == pytest.approx(2.0, rel=0.35)
    assert found["loud"] == pytest.approx(0.5, rel=0.35)


def test_no_other_temperature_makes_the_choices_likelier(model: Student, shards: Shards) -> None:
    """Held against float64 likelihoods at temperatures a little off."""
    examples, compiled = open_examples(shards, TRAIN, "full"), shards.compiled
    batch, logits = drawn(examples, seed=1)
    found = fit_temperatures(Teacher(model, logits), compiled, [batch])
    allowed_MR = torch.as_tensor(compiled.automaton.allowed)[batch.state]
    allowed_logits = logits.double()[:, : allowed_MR.shape[1]].masked_fill(~allowed_MR, -torch.inf)
    fields = torch.as_tensor(Fields(compiled, Choices(compiled, forced_read=True)).by_state)[batch.state]
    for i, name in enumerate(compiled.task.fields):
        mine = batch.choice & (fields == i)

        def loss(temperature: float, mine: torch.Tensor = mine) -> float:
            return float(F.cross_entropy(allowed_logits[mine] / temperature, batch.targets[mine]))

        assert loss(found[name]) < min(loss(0.95 * found[name]), loss(1.05 * found[name]))


def test_batches_together_are_fitted_as_one(model: Student, shards: Shards) -> None:
    examples = open_examples(shards, TRAIN, "full")
    everything = np.arange(len(examples))
    whole = fit_temperatures(model, shards.compiled, [examples.batch(everything)])
    parts = fit_temperatures(model, shards.compiled, [examples.batch(part) for part in np.array_split(everything, 5)])
    assert parts == pytest.approx(whole, rel=1e-2)
