"""Tiny sources of both families, with weights wide enough that every unit counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Examples, open_examples
from student.data.unpack import TRAIN
from student.model.model import Student
from student.model.shape import Layer, Shape

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 4, "mlp": 48},
    "gemma3": {
        "heads": 4,
        "mlp": 40,
        "family": "gemma3",
        "key_value_heads": 2,
        "head_width": 6,
        "kinds": (Layer(8, 10_000.0), Layer(None, 1e6, 8.0), Layer(5, 500.0, 2.0)),
        "epsilon": 1e-3,
        "head_epsilon": 1e-6,
        "score_scale": 0.3,
        "opening": (4, 9, 17),
        "separator": (7, 8, 9, 5),
    },
}


def make(compiled: CompiledTask, family: str, seed: int = 0, **changes: Any) -> Student:
    """A student whose gains differ too."""
    ids = compiled.tokenizer.size
    sizes = {"layers": 3, "width": 32} | FAMILIES[family] | changes
    model = Student(Shape(ids, ids, compiled.watched.size, compiled.context, **sizes), np.arange(ids, dtype=np.int32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * drawn)
            else:  # an embedding as small as a fresh student's, which a norm's epsilon matters to
                parameter.copy_(drawn * (0.02 if name == "embedding.weight" else 0.3))
    return model.eval()


def examples_of(shards: Shards, model: Student) -> Examples:
    """The training examples as the student reads them."""
    return open_examples(shards, TRAIN, model.shape.sequence, model.shape.separator)
