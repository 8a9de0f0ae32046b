"""Which units stay, and the smaller student they make."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from student.model.checkpoint import assembled
from student.model.model import Student
from student.model.shape import Shape
from student.prune.importance import Importance
from student.prune.sizes import Sizes

Indices = NDArray[np.int64]
WIDTH_NORMS = {f"{name}.weight" for name in ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm")}  # of a block


@dataclass(frozen=True)
class Kept:
    """Units of the source that stay, ascending; heads, groups and neurons of each layer that stays."""

    layers: Indices
    channels: Indices
    heads: list[Indices]
    groups: list[Indices]
    neurons: list[Indices]

    def as_dict(self) -> dict[str, list[int] | list[list[int]]]:
        """For JSON; neurons, of which there are many, are left out."""
        return {
            "layers": self.layers.tolist(),
            "channels": self.channels.tolist(),
            "heads": [heads.tolist() for heads in self.heads],
        }


def choose(importance: Importance, shape: Shape, sizes: Sizes) -> Kept:
    """The most important units; of the layers, those without which the loss rises most."""
    layers = top(importance.loss_L, sizes.layers)
    groups = [_top_groups(importance.heads_LH[layer], shape, sizes) for layer in layers]
    return Kept(
        layers=layers,
        channels=top(importance.channels_D, sizes.width),
        heads=[_top_heads(importance.heads_LH[layer], shape, sizes, kept) for layer, kept in zip(layers, groups, strict=True)],
        groups=groups,
        neurons=[top(importance.neurons_LF[layer], sizes.mlp) for layer in layers],
    )


def top(values: NDArray[np.float64], count: int) -> Indices:
    """Where the largest values are, ascending; of equal ones the first."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _top_groups(values_H: NDArray[np.float64], shape: Shape, sizes: Sizes) -> Indices:
    """Key/value heads, each worth the root of the sum of squares of its heads' worth."""
    return top(np.linalg.norm(values_H.reshape(shape.groups, -1), axis=1), sizes.groups)


def _top_heads(values_H: NDArray[np.float64], shape: Shape, sizes: Sizes, groups: Indices) -> Indices:
    """Heads of these groups, equally many of each."""
    shared = shape.heads // shape.groups
    return np.concatenate([g * shared + top(values_H.reshape(-1, shared)[g], sizes.heads // sizes.groups) for g in groups])


def cut(model: Student, kept: Kept) -> Student:
    """The student of these units, which shares no memory with its source. Gains of norms stay: to make up for the channels that
    are gone was no better (docs/log.md).
    """
    shape, channels = model.shape, torch.from_numpy(kept.channels)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    kinds = tuple(shape.each_layer[layer] for layer in kept.layers)
    smaller = replace(
        shape,
        layers=len(kept.layers),
        width=len(channels),
        heads=len(kept.heads[0]),
        mlp=len(kept.neurons[0]),
        key_value_heads=len(kept.groups[0]),
        head_width=shape.per_head,
        kinds=kinds if shape.kinds else None,
    )
    cuts = {"rows": tensors["rows"].clone(), "norm.weight": tensors["norm.weight"][channels].clone()}
    cuts |= {name: tensors[name][:, channels] for name in ("embedding.weight", "head.weight")}
    for new, old in enumerate(kept.layers):
        before, after = f"blocks.{old}.", f"blocks.{new}."
        block = {name.removeprefix(before): tensor for name, tensor in tensors.items() if name.startswith(before)}
        block = _cut_block(block, shape, channels, kept.heads[new], kept.groups[new], kept.neurons[new])
        cuts |= {after + name: tensor.clone() for name, tensor in block.items()}
    return assembled(smaller, cuts)


def _cut_block(
    block: dict[str, torch.Tensor], shape: Shape, channels: torch.Tensor, heads: Indices, groups: Indices, neurons: Indices
) -> dict[str, torch.Tensor]:
    """One layer's weights; norms over a head's width stay."""
    of_heads, of_groups = _each(heads, shape.per_head), _each(groups, shape.per_head)
    keys, values = shape.heads * shape.per_head, (shape.heads + shape.groups) * shape.per_head
    rows = torch.from_numpy(np.concatenate([of_heads, keys + of_groups, values + of_groups]))
    up = torch.from_numpy(np.concatenate([neurons, shape.mlp + neurons]) if shape.is_gemma else neurons)
    norms = {name: tensor[channels] for name, tensor in block.items() if name in WIDTH_NORMS}
    return (
        block
        | norms
        | {
            "attention.qkv.weight": block["attention.qkv.weight"][rows][:, channels],
            "attention.out.weight": block["attention.out.weight"][channels][:, torch.from_numpy(of_heads)],
            "up.weight": block["up.weight"][up][:, channels],
            "down.weight": block["down.weight"][channels][:, torch.from_numpy(neurons)],
        }
    )


def _each(units: Indices, size: int) -> Indices:
    """Rows of units that have `size` rows each."""
    return (units[:, None] * size + np.arange(size)).ravel()
