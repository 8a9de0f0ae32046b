"""A student on disk: safetensors weights, its shape, and the compiled task, all that prediction needs."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, with_config
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from pipeline.base import storage
from pipeline.base.config import Strict
from pipeline.base.errors import UserError, clip
from pipeline.shards.manifest import TeacherFacts
from pipeline.task.compiled import CompiledTask
from pipeline.task.task import Task
from student.config import TrainConfig
from student.model.model import Student
from student.model.shape import Layer, Shape

CALIBRATION = "calibration.json"  # what evaluation adds to a student
TRAINED = "train.json"  # what a training adds, last
PRUNED = "prune.json"  # in a student that was cut from another, written last: what was cut from what
WEIGHTS, SHAPE = "model.safetensors", "shape.json"

Tensors = dict[str, torch.Tensor]

for _sized in (Layer, Shape):
    with_config(extra="forbid")(_sized)  # here, as an export has the module without pydantic


class _Calibration(Strict):
    """The content of calibration.json."""

    temperatures: dict[str, Annotated[float, Field(ge=1e-3, le=1e3)]]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class TrainedSizes(_Facts):
    """The sizes in a trained student's shape."""

    layers: int
    width: int
    heads: int
    mlp: int


class ParameterCounts(_Facts):
    """Parameters of the embedding, and all others."""

    embedding: int
    rest: int


class MlflowRun(_Facts):
    """Where a training's metrics are."""

    uri: str
    run: str


class TrainedOn(_Facts):
    """The extraction a student was trained on."""

    teacher: TeacherFacts


class Trained(_Facts):
    """What train.json holds: `epochs` are rows of metrics, `cost` is in seconds, `init` names the weights it began from."""

    shards: TrainedOn
    student: TrainedSizes
    train: TrainConfig
    parameters: ParameterCounts
    best_epoch: int
    epochs: list[dict[str, Any]] = Field(min_length=1)
    cost: dict[str, float]
    mlflow: MlflowRun
    init: str | None = None

    @property
    def learning_rate(self) -> float:
        """The peak rate it took, which its configuration may have left open."""
        return self.train.model_copy(update={"init": self.init}).peak_rate(self.student.width)


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
        UserError: there is none in the folder, a file of it is damaged, or its files do not belong together.
    """
    require_student(folder)
    compiled, shape, path = CompiledTask.load(folder), load_shape(folder), storage.join(folder, WEIGHTS)
    tensors = load_tensors(path)
    _require_whole(path, shape, tensors)
    _require_fit(storage.join(folder, SHAPE), shape, compiled)
    return assembled(shape, tensors).to(device), compiled


def load_shape(folder: str) -> Shape:
    """Reads a student's shape alone.

    Raises:
        UserError: there is none, or no student has it.
    """
    return storage.read_form(storage.join(folder, SHAPE), Shape)


def _require_fit(path: str, shape: Shape, compiled: CompiledTask) -> None:
    """Refuses a shape that is not one of a student of the task.

    Raises:
        UserError: naming what does not fit.
    """
    watched = compiled.watched.size
    separator = compiled.separator if shape.separator is None else shape.separator
    most = shape.reader.most_vectors if shape.reader else compiled.task.comments.max_tokens
    need = len(shape.opening) + most + len(separator) + compiled.automaton.longest - 1
    sizes = {
        "output_vocabulary": (shape.output_vocabulary, {watched, watched + 1}),
        "context": (shape.context, {need, compiled.context}),
    }
    for name, (found, fitting) in sizes.items():
        if found not in fitting:
            wanted = " or ".join(map(str, sorted(fitting)))
            raise UserError(f"{path} does not fit the task beside it: {name} is {found}, not {wanted}")
    if not compiled.tokenizer.is_last(shape.input_vocabulary - 1):
        raise UserError(f"{path} does not fit tokenizer.json beside it: it has not {shape.input_vocabulary} ids")


def _require_whole(path: str, shape: Shape, tensors: Tensors) -> None:
    """Refuses weights that are not of a shape, or not finite; what is not a student's is seen before anything is built.

    One pass over the file: 0.1 s for the 470 M numbers of the thesis' student with the whole embedding, in memory.

    Raises:
        UserError: naming the tensor.
    """
    others = set(tensors)
    for name, size in shape.tensors():
        if name not in tensors:
            raise UserError(f"{path} does not fit {SHAPE} beside it: {name} is missing")
        tensor, kind = tensors[name], {"rows": torch.int32, "reader.tokenizer": torch.uint8}.get(name, torch.float32)
        if tuple(tensor.shape) != size or tensor.dtype != kind:
            found = f"{list(tensor.shape)} of {tensor.dtype}, not {list(size)} of {kind}".replace("torch.", "")
            raise UserError(f"{path} does not fit {SHAPE} beside it: {name} is {found}")
        least, most = (float(end) for end in torch.aminmax(tensor))
        if name == "rows" and not 0 <= least <= most < shape.embeddings:
            raise UserError(f"{path} is damaged: rows lead out of the embedding")
        if not (math.isfinite(least) and math.isfinite(most)):
            raise UserError(f"{path} cannot be used: {name} holds NaN or infinity, by damage or by a training that diverged")
        others.remove(name)
    if others:
        raise UserError(f"{path} does not fit {SHAPE} beside it: it has a tensor {min(others)} too many")


def save_temperatures(folder: str, temperatures: dict[str, float]) -> None:
    """Writes a student's temperatures, by field, for `load_temperatures`."""
    storage.write_json(storage.join(folder, CALIBRATION), {"temperatures": temperatures})


def load_training(folder: str) -> Trained:
    """What a student's train.json says of its training.

    Raises:
        UserError: the student was not trained, or the file is damaged.
    """
    path = storage.join(folder, TRAINED)
    if not storage.exists(path):
        raise UserError(f"the student in {folder} was not trained: `retort train --init {folder}` does")
    return storage.read_form(path, Trained)


def load_temperatures(folder: str, task: Task) -> dict[str, float] | None:
    """A student's temperatures; None where it was not calibrated.

    Raises:
        UserError: they are damaged, or not those of the task's fields.
    """
    path = storage.join(folder, CALIBRATION)
    if not storage.exists(path):
        return None
    temperatures = storage.read_form(path, _Calibration).temperatures
    if temperatures.keys() != task.fields.keys():
        raise UserError(f"{path} does not fit the task beside it: it holds temperatures for other fields than the task's")
    return temperatures


def is_student(folder: str) -> bool:
    """Whether the folder holds a whole student."""
    return storage.exists(storage.join(folder, WEIGHTS)) and storage.exists(storage.join(folder, SHAPE))


def assembled(shape: Shape, tensors: Tensors) -> Student:
    """A student of these weights and embedding rows, which it takes over without a copy, where they are; in evaluation mode."""
    with torch.device("meta"):
        model = Student(shape)
    model.load_state_dict(tensors, assign=True)
    return model.to(tensors["rows"].device).eval()


def save_tensors(path: str, tensors: Tensors) -> None:
    """Writes safetensors, whole or not at all."""
    storage.write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: str) -> Tensors:
    """Reads safetensors. From a disk they are mapped: what is not asked for is not read.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    storage.regular_file(path)
    try:
        tensors: Tensors = load(storage.read_bytes(path)) if storage.is_uri(path) else load_file(path)
    except (SafetensorError, KeyError) as error:  # the latter for dtypes that torch does not have
        raise UserError(f"{path} is damaged, or not a safetensors file: {clip(str(error), 300)}") from error
    return tensors
