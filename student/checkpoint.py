"""A student on disk: safetensors weights, its shape, and the compiled task, all that prediction needs.

A training's checkpoint is such a folder with two files more, all that going on exactly needs: the optimizer's moments and
the position. What is random in a training is a function of the position.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load, load_file, save

from pipeline import storage
from pipeline.compiled import CompiledTask
from pipeline.errors import UserError
from student.model import Student
from student.shape import Shape
from student.strategy import State, Tensors

CALIBRATION = "calibration.json"  # what evaluation adds to a student
WEIGHTS, SHAPE = "model.safetensors", "shape.json"
MOMENTS, POSITION = "optimizer.safetensors", "position.json"


def save_student(folder: str, model: Student, compiled: CompiledTask) -> None:
    """Writes a student that `load_student` reads; the weights last."""
    compiled.save(folder)
    storage.write_json(storage.join(folder, SHAPE), model.shape.as_dict())
    save_tensors(storage.join(folder, WEIGHTS), model.state_dict())


def require_student(folder: str) -> None:
    """Refuses a folder without a student.

    Raises:
        UserError: saying where students come from.
    """
    if not storage.exists(storage.join(folder, WEIGHTS)):
        raise UserError(f"no student in {folder}: `retort train` writes one")


def load_student(folder: str, device: torch.device | str = "cpu") -> tuple[Student, CompiledTask]:
    """Reads a student, in evaluation mode.

    Raises:
        UserError: there is none in the folder.
    """
    require_student(folder)
    compiled = CompiledTask.load(folder)
    model = assembled(load_shape(folder), load_tensors(storage.join(folder, WEIGHTS)))
    return model.to(device), compiled


def save_temperatures(folder: str, temperatures: dict[str, float]) -> None:
    """Writes a student's temperatures, by field, for `load_temperatures`."""
    storage.write_json(storage.join(folder, CALIBRATION), {"temperatures": temperatures})


def load_temperatures(folder: str) -> dict[str, float] | None:
    """A student's temperatures; None where it was not calibrated."""
    path = storage.join(folder, CALIBRATION)
    return storage.read_json(path)["temperatures"] if storage.exists(path) else None


def load_shape(folder: str) -> Shape:
    """Reads a student's shape alone."""
    return Shape.from_dict(storage.read_json(storage.join(folder, SHAPE)))


def is_student(folder: str) -> bool:
    """Whether the folder holds a whole student."""
    return storage.exists(storage.join(folder, WEIGHTS)) and storage.exists(storage.join(folder, SHAPE))


def assembled(shape: Shape, tensors: Tensors) -> Student:
    """A student of these weights and embedding rows, which it takes over without a copy; in evaluation mode."""
    with torch.device("meta"):
        model = Student(shape)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def save_position(folder: str, state: State, position: dict[str, Any]) -> None:
    """Writes what a training needs beside its student to go on.

    Args:
        folder: of the student.
        state: of the training, whose weights are the student's.
        position: JSON-able; `step` says how many steps were taken.
    """
    moments = {f"first.{name}": tensor for name, tensor in state.first_moment.items()}
    moments |= {f"second.{name}": tensor for name, tensor in state.second_moment.items()}
    save_tensors(storage.join(folder, MOMENTS), moments)
    storage.write_json(storage.join(folder, POSITION), position)


def load_position(folder: str) -> tuple[State, dict[str, Any]]:
    """Reads what `save_position` wrote, and the weights beside it."""
    moments = load_tensors(storage.join(folder, MOMENTS))
    first, second = (
        {name.removeprefix(kind): tensor for name, tensor in moments.items() if name.startswith(kind)}
        for kind in ("first.", "second.")
    )
    return State(load_tensors(storage.join(folder, WEIGHTS)), first, second), storage.read_json(storage.join(folder, POSITION))


def save_tensors(path: str, tensors: Tensors) -> None:
    """Writes safetensors, whole or not at all."""
    storage.write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: str) -> Tensors:
    """Reads safetensors. From a disk they are mapped: what is not asked for, such as most rows of an embedding, is not read."""
    tensors: Tensors = load(storage.read_bytes(path)) if storage.is_uri(path) else load_file(path)
    return tensors
