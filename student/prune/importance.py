"""What the units of a student are worth, by its activations on a few examples (Muralidharan et al., "Compact Language Models
via Pruning and Knowledge Distillation", arXiv 2407.14679).

A head by the norm of its output, a neuron by its activation, a channel by what the norms over the width make of it: each
its mean over the tokens of an example, then the L2 norm over the examples. A layer by
its block importance 1 − E[cos(x, layer(x))], and by the rise of the loss when it is left out.

A neuron's activation is taken where the feed-forward's second matrix reads it, behind GELU and gate. The paper's is the
first matrix' output, in which a neuron that GELU always shuts off, and one that its gate does, would look alive.

Shape suffixes as in `student.model.model`, and: L layers, F neurons, N norms over the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from student.data.examples import Batch, Examples
from student.model.checkpoint import assembled, load_tensors, save_tensors
from student.model.model import Places, Student

LEAVE_OUT = 128  # examples that each layer is left out for, as that takes as many passes as there are layers

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """What each unit is worth; only comparisons within an array mean anything.

    Attributes:
        heads_LH: of the attention heads.
        neurons_LF: of the feed-forward.
        channels_D: of the embedding, summed over all norms that read the residual stream.
        cosine_L: block importance of each layer.
        loss_L: rise of the cross-entropy at choice steps without it, nats.
    """

    heads_LH: Array
    neurons_LF: Array
    channels_D: Array
    cosine_L: Array
    loss_L: Array

    def save(self, path: str) -> None:
        """Writes safetensors."""
        save_tensors(path, {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def load(path: str) -> Importance:
        """Reads what `save` wrote."""
        return Importance(**{name: tensor.numpy() for name, tensor in load_tensors(path).items()})


def width_norms(model: Student) -> dict[str, nn.RMSNorm]:
    """The norms over the width, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.RMSNorm) and not name.endswith(("query_norm", "key_norm"))
    }


Sums = dict[str, torch.Tensor]  # float64; those of several workers add up


class Scorer:
    """Sums up one model's activations, batch by batch; the model is in evaluation mode."""

    def __init__(self, model: Student) -> None:
        # The opening is read with each example here, as activations count wherever they are.
        self._opening_1P = model.opening_1P
        self._unwatched = model
        self._model = assembled(replace(model.shape, opening=()), dict(model.state_dict()))
        self._sums: Sums = {}
        self._mask_BT = torch.empty(0)
        self._watch()

    def add(self, batch: Batch, lengths_B: torch.Tensor, leave_out: bool) -> None:
        """Adds a batch of examples.

        Args:
            lengths_B: int64, the tokens of each.
        """
        before = self._opening_1P.shape[1]
        tokens_BT = torch.cat([self._opening_1P.expand(len(batch.tokens), -1), batch.tokens], 1)
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self._mask_BT = (positions < before + lengths_B[:, None]).double()
        inputs = self._run(tokens_BT)
        if leave_out:
            length = batch.tokens.shape[1]
            chosen = batch.predict[batch.choice]
            self._leave_out(inputs, (chosen // length, chosen % length + before), batch.targets[batch.choice])

    @torch.inference_mode()
    def _run(self, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
        """One forward pass; returns what each layer read, and at the end what the last one wrote."""
        self._stream: list[torch.Tensor] = []
        self._model(tokens_BT)
        for layer, (x, following) in enumerate(zip(self._stream, self._stream[1:], strict=False)):
            cosine_BT = F.cosine_similarity(x.double(), following.double(), dim=-1)
            self._count("cosine", layer, (cosine_BT * self._mask_BT).sum())
        self._count("tokens", 0, self._mask_BT.sum())
        return self._stream

    @torch.inference_mode()
    def _leave_out(self, inputs: list[torch.Tensor], at: Places, targets_M: torch.Tensor) -> None:
        """Adds up the loss of the whole model, and without each layer: those before it need not be run again."""
        for left_out, x in enumerate(inputs):
            logits_MW = self._unwatched.rest(x, left_out + 1)[at]
            self._count("loss", left_out, F.cross_entropy(logits_MW.double(), targets_M, reduction="sum"))
        self._count("targets", 0, torch.tensor(float(len(targets_M))))

    def sums(self) -> Sums:
        """What was added up."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def _watch(self) -> None:
        """Puts hooks where the activations are."""
        heads, per_head = self._model.shape.heads, self._model.shape.per_head
        for layer, block in enumerate(self._model.blocks):
            block.register_forward_pre_hook(lambda _, given: self._stream.append(given[0]))
            block.attention.out.register_forward_pre_hook(  # type: ignore[union-attr, operator]
                self._hook("heads", layer, lambda x: x.view(*x.shape[:-1], heads, per_head).norm(dim=-1))
            )
            block.down.register_forward_pre_hook(self._hook("neurons", layer, torch.abs))  # type: ignore[union-attr, operator]
        self._model.blocks[-1].register_forward_hook(lambda _, __, wrote: self._stream.append(wrote))
        for index, (name, norm) in enumerate(width_norms(self._model).items()):
            if not name.endswith("out_norm"):  # those do not read the residual stream
                norm.register_forward_hook(lambda _, __, output, at=index: self._add("channels", at, output.abs()))

    def _hook(self, name: str, index: int, measure: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda _, given: self._add(name, index, measure(given[0]))

    def _add(self, name: str, index: int, values_BTU: torch.Tensor) -> None:
        """Sums up a batch's activations of units."""
        values_BTU = values_BTU.double() * self._mask_BT[..., None]
        values_BU = values_BTU.sum(1) / self._mask_BT.sum(1, keepdim=True)
        self._count(name, index, (values_BU**2).sum(0))

    def _count(self, name: str, index: int, value: torch.Tensor) -> None:
        key = f"{name}.{index}"
        self._sums[key] = self._sums[key] + value if key in self._sums else value


def measure(model: Student, examples: Examples, mine: NDArray[np.int64], leave_out: int, batch_size: int) -> Sums:
    """The sums of one worker.

    Args:
        leave_out: how many of its examples, the first, to leave each layer out for.
    """
    scorer, device = Scorer(model), model.rows.device
    for indices, left_out in _batches(mine, leave_out, batch_size):
        lengths = torch.from_numpy(examples.lengths[indices].astype(np.int64)).to(device)
        scorer.add(examples.batch(indices).to(device), lengths, left_out)
    return scorer.sums()


def _batches(mine: NDArray[np.int64], leave_out: int, size: int) -> Iterator[tuple[NDArray[np.int64], bool]]:
    for part, left_out in ((mine[:leave_out], True), (mine[leave_out:], False)):
        for start in range(0, len(part), size):
            yield part[start : start + size], left_out


def importance(parts: list[Sums], layers: int) -> Importance:
    """What the sums of all workers come to."""
    sums = {key: sum(part[key] for part in parts if key in part).numpy() for key in set().union(*parts)}  # type: ignore[union-attr]

    def stacked(name: str) -> Array:
        indices = sorted(int(key.split(".")[1]) for key in sums if key.startswith(f"{name}."))
        return np.stack([sums[f"{name}.{index}"] for index in indices])

    def norms(name: str) -> Array:
        return np.sqrt(stacked(name))

    losses = stacked("loss") / sums["targets.0"]
    return Importance(
        heads_LH=norms("heads"),
        neurons_LF=norms("neurons"),
        channels_D=norms("channels").sum(0),
        cosine_L=1 - stacked("cosine") / sums["tokens.0"],
        loss_L=losses[:layers] - losses[layers],
    )
