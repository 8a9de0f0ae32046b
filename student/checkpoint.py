"""A student on disk: safetensors weights, its shape, and the compiled task, all that prediction needs."""

from __future__ import annotations

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.compiled import CompiledTask
from pipeline.errors import UserError
from student.model import Shape, Student


def save_student(folder: str, model: Student, compiled: CompiledTask) -> None:
    """Writes a student that `load_student` reads; the weights last."""
    compiled.save(folder)
    storage.write_json(storage.join(folder, "shape.json"), model.shape.as_dict())
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(folder, "model.safetensors"), save_tensors(weights))


def load_student(folder: str, device: torch.device | str = "cpu") -> tuple[Student, CompiledTask]:
    """Reads a student, in evaluation mode.

    Raises:
        UserError: there is none in the folder.
    """
    if not storage.exists(storage.join(folder, "model.safetensors")):
        raise UserError(f"no student in {folder}: `retort train` writes one")
    compiled = CompiledTask.load(folder)
    model = Student(Shape(**storage.read_json(storage.join(folder, "shape.json"))))
    model.load_state_dict(load_tensors(storage.read_bytes(storage.join(folder, "model.safetensors"))))
    return model.to(device).eval(), compiled
