"""A student by the book, in float64: one example, no padding, no cache, each layer by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from student.model.model import Student
from student.model.shape import Layer, Shape

Tensor = torch.Tensor


@dataclass
class Trace:
    """What one example makes of each layer: stream before each and after the last, head norms, neurons, norms' in and out."""

    stream: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Reference:
    """Runs a student's weights."""

    def __init__(self, model: Student) -> None:
        self.shape: Shape = model.shape
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def run(self, ids: list[int], without: int | None = None) -> Trace:
        """Reads ids, with the opening before them if they are to have it."""
        trace = Trace()
        x = self.weights["embedding.weight"][self.weights["rows"].long()[ids]]
        for layer in range(self.shape.layers):
            trace.stream.append(x)
            if layer != without:
                x = self._layer(layer, x, trace)
        trace.stream.append(x)
        trace.logits = self._norm("norm", x, trace) @ self.weights["head.weight"].T
        return trace

    def _layer(self, layer: int, x: Tensor, trace: Trace) -> Tensor:
        shape, block = self.shape, f"blocks.{layer}"
        mixed = self._attention(layer, self._norm(f"{block}.attention_norm", x, trace), trace)
        x = x + (self._norm(f"{block}.attention_out_norm", mixed, trace) if shape.is_gemma else mixed)
        up = self._norm(f"{block}.mlp_norm", x, trace) @ self.weights[f"{block}.up.weight"].T
        if shape.is_gemma:
            gate, value = up[:, : shape.mlp], up[:, shape.mlp :]
            neurons = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * value
        else:
            neurons = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        trace.neurons.append(neurons)
        fed = neurons @ self.weights[f"{block}.down.weight"].T
        return x + (self._norm(f"{block}.mlp_out_norm", fed, trace) if shape.is_gemma else fed)

    def _attention(self, layer: int, x: Tensor, trace: Trace) -> Tensor:
        shape, name, kind = self.shape, f"blocks.{layer}.attention", self.shape.each_layer[layer]
        units = (x @ self.weights[f"{name}.qkv.weight"].T).view(len(x), -1, shape.per_head)
        mixed = []
        for head in range(shape.heads):
            group = head // (shape.heads // shape.groups)
            query, key = units[:, head], units[:, shape.heads + group]
            value = units[:, shape.heads + shape.groups + group]
            if shape.is_gemma:
                query, key = self._scaled(query, f"{name}.query_norm"), self._scaled(key, f"{name}.key_norm")
            scores = _rotated(query, kind) @ _rotated(key, kind).T * (shape.score_scale or shape.per_head**-0.5)
            back = torch.arange(len(x))[:, None] - torch.arange(len(x))
            hidden = (back < 0) | (back >= (kind.window or len(x)))
            mixed.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value)
        trace.heads.append(torch.stack([head.norm(dim=-1) for head in mixed], -1))
        return torch.cat(mixed, -1) @ self.weights[f"{name}.out.weight"].T

    def _scaled(self, x: Tensor, name: str) -> Tensor:
        epsilon = self.shape.head_epsilon if name.endswith(("query_norm", "key_norm")) else self.shape.epsilon
        epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
        return x / (x**2).mean(-1, keepdim=True).add(epsilon).sqrt() * self.weights[f"{name}.weight"]

    def _norm(self, name: str, x: Tensor, trace: Trace) -> Tensor:
        out = self._scaled(x, name)
        trace.norms[name] = x, out
        return out


def _rotated(x: Tensor, kind: Layer) -> Tensor:
    half = x.shape[1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(len(x)).double() * kind.base ** (-i / half) / kind.stretch
        out[:, i] = x[:, i] * angle.cos() - x[:, half + i] * angle.sin()
        out[:, half + i] = x[:, half + i] * angle.cos() + x[:, i] * angle.sin()
    return out


def loss(logits: Tensor, targets: list[int]) -> float:
    """Summed cross-entropy."""
    return float(F.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
