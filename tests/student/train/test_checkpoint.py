"""What a training goes on from, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.base.errors import UserError
from student.model.checkpoint import WEIGHTS, load_tensors, save_tensors
from student.train.checkpoint import MOMENTS, load_position, save_position
from student.train.strategy import State


def test_a_checkpoint_without_the_weights_beside_their_average_is_refused(tmp_path: Path) -> None:
    weights, first, second = ({"head.weight": torch.full((2,), value)} for value in (1.0, 0.0, 0.0))
    save_tensors(str(tmp_path / WEIGHTS), {"head.weight": torch.full((2,), 0.5), "rows": torch.zeros(3)})
    save_position(str(tmp_path), State(weights, first, second, weights), {"step": 7})
    state, position = load_position(str(tmp_path))
    assert position == {"step": 7}
    assert state.weights["head.weight"].tolist() == [1, 1]
    assert state.average["head.weight"].tolist() == [0.5, 0.5]
    tensors = load_tensors(str(tmp_path / MOMENTS))
    save_tensors(str(tmp_path / MOMENTS), {name: t for name, t in tensors.items() if not name.startswith("weights.")})
    with pytest.raises(UserError, match="delete it, and the training begins anew"):
        load_position(str(tmp_path))
