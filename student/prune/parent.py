"""The model that a student was cut from, as a second teacher: its hidden states."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.base import storage
from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from student.config import PruneConfig
from student.data.examples import Batch
from student.model.checkpoint import PRUNED
from student.model.model import Student
from student.prune.source import open_source


class Parent:
    """How far a student's hidden states are from those of the model it was cut from.

    Compared are the residual stream's kept channels where each kept layer reads it, the embedding first, and where the last
    one leaves it: what lay between two kept layers is to be made up for by the first of them. As the channels are the
    parent's own, nothing need be learnt to compare them (Muralidharan et al., arXiv 2407.14679, learn a projection).

    Args:
        student: that trains; on its device.
        parent: what it was cut from; on the same device, in evaluation mode.
    """

    def __init__(self, student: Student, parent: Student, layers: list[int], channels: list[int]) -> None:
        self._parent = parent.requires_grad_(False)
        self._channels = torch.tensor(channels, device=parent.rows.device)
        self._ours = _Stream(student, list(range(student.shape.layers)))
        self._theirs = _Stream(parent, layers)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The squared distance at each position with a target, relative to the parent's square, mean over the layers: [M].

        To be called after the student's forward pass of the batch.
        """
        ours = self._ours.take(batch)
        with torch.no_grad():
            self._parent(batch.tokens, batch.predict)
            theirs = [state[:, self._channels] for state in self._theirs.take(batch)]
        distances = [
            F.mse_loss(our, their, reduction="none").sum(-1) / their.square().sum(-1).clamp_min(1e-12)
            for our, their in zip(ours, theirs, strict=True)
        ]
        return torch.stack(distances).mean(0)


class _Stream:
    """The residual stream before some layers and after the last, as the last forward pass left it."""

    def __init__(self, model: Student, layers: list[int]) -> None:
        self._states: deque[torch.Tensor] = deque(maxlen=len(layers) + 1)
        for layer in layers:
            model.blocks[layer].register_forward_pre_hook(lambda _, given: self._states.append(given[0]))
        model.blocks[-1].register_forward_hook(lambda _, __, wrote: self._states.append(wrote))

    def take(self, batch: Batch) -> list[torch.Tensor]:
        """The states at the batch's positions with a target, float32 [M, D] each."""
        length = batch.tokens.shape[1]
        *before, last = self._states
        self._states.clear()
        return [state[batch.predict // length, batch.predict % length].float() for state in before] + [last.float()]


def parent_folder(init: str | None) -> str:
    """The pruned student's folder, which says what it was cut from.

    Raises:
        UserError: a training does not start from one.
    """
    if init is None or not storage.exists(storage.join(init, PRUNED)):
        raise UserError("train.hidden compares a student with what it was cut from: start from a folder of `retort prune`")
    return init


def open_parent(init: str | None, student: Student, shards: Shards) -> Parent:
    """The parent of the student that a training starts from.

    Raises:
        UserError: the student was not cut from anything.
    """
    about: dict[str, Any] = storage.read_json(storage.join(parent_folder(init), PRUNED))
    place = about["source"].get("student") or about["source"]["model"]
    config = PruneConfig(source=place, revision=about["prune"]["revision"], prompt=about["prune"]["prompt"])
    source = open_source(config, student.shape.sequence, shards)
    parent = source.load(shards.compiled.watched.tokens).to(student.rows.device)
    parent.bf16 = student.bf16
    return Parent(student, parent, about["kept"]["layers"], about["kept"]["channels"])
