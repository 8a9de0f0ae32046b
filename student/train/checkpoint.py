"""A training's checkpoint: a student's folder with two files more, what the next step goes on from and the position.

The student is the average of the latest weights; those themselves lie with the optimizer's moments.

That is all that going on exactly needs, as what is random in a training is a function of the position.
"""

from __future__ import annotations

from typing import Any

from pipeline.base import storage
from pipeline.base.errors import UserError
from student.model.checkpoint import WEIGHTS, load_tensors, save_tensors
from student.train.strategy import State

MOMENTS, POSITION = "optimizer.safetensors", "position.json"


def save_position(folder: str, state: State, position: dict[str, Any]) -> None:
    """Writes what a training needs beside its student to go on.

    Args:
        position: JSON-able; `step` says how many steps were taken.
    """
    moments = {f"first.{name}": tensor for name, tensor in state.first_moment.items()}
    moments |= {f"second.{name}": tensor for name, tensor in state.second_moment.items()}
    moments |= {f"weights.{name}": tensor for name, tensor in state.weights.items()}
    save_tensors(storage.join(folder, MOMENTS), moments)
    storage.write_json(storage.join(folder, POSITION), position)


def load_position(folder: str) -> tuple[State, dict[str, Any]]:
    """Reads what `save_position` wrote, and the student beside it.

    Raises:
        UserError: a file is damaged, or an earlier version wrote them, which kept no weights beside the average.
    """
    moments = load_tensors(storage.join(folder, MOMENTS))
    weights, first, second = (
        {name.removeprefix(kind): tensor for name, tensor in moments.items() if name.startswith(kind)}
        for kind in ("weights.", "first.", "second.")
    )
    student = load_tensors(storage.join(folder, WEIGHTS))
    if not weights or not weights.keys() <= student.keys():
        raise UserError(f"{folder} holds no training that can be gone on with: delete it, and the training begins anew")
    return State(weights, first, second, {name: student[name] for name in weights}), storage.read_json(
        storage.join(folder, POSITION)
    )
