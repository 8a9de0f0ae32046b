"""Who holds weights, gradients and optimizer states, and how workers agree on an update.

A strategy trains a student whose loss, summed over all workers and parts of a step, is the one to be minimised: it adds
gradients up. States leave and enter it whole, by parameter name, so a training may go on with another number of workers or
under another strategy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from student.config import TrainConfig
from student.model.checkpoint import Tensors
from student.model.model import Student
from student.model.reader import Ngrams, Pretrained

BETAS = (0.9, 0.95)  # of AdamW
CLIP_NORM = 1.0  # largest norm of the gradient of one step
TABLE_RATE, TABLE_EPSILON = 1000, 1e4  # of a table of n-grams


@dataclass(frozen=True)
class State:
    """What an optimizer step changes, by parameter name: float32 on the CPU.

    Attributes:
        average: of the latest weights, see `student.train.average`.
    """

    weights: Tensors
    first_moment: Tensors
    second_moment: Tensors
    average: Tensors = field(default_factory=dict)


class Strategy(Protocol):
    """The seam between a training and its parallelism."""

    module: nn.Module

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Runs the forward and backward pass of one part of a step inside; gradients are exchanged with the last."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a loss' gradients to those of the step's other parts and workers."""

    def step(self, rate: float) -> torch.Tensor:
        """Updates the weights at this learning rate, clears gradients; returns their global norm before clipping."""

    def gradients(self) -> Tensors:
        """Whole gradients between the last part's backward pass and the step, by parameter name; every worker must ask."""

    def weights(self) -> Tensors:
        """Whole weights, by parameter name, on the CPU; every worker must ask. They may change with the next step."""

    def put(self, weights: Tensors) -> None:
        """Takes other weights in place of its own; every worker must."""

    def state(self) -> State:
        """All there is to save but the average; every worker must ask, and the first gets it."""

    def load(self, state: State, steps: int) -> None:
        """Takes up a training after so many steps."""


def worker_count() -> int:
    """Workers training together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def parameter_groups(model: Student, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and tables, many of whose rows are rarely touched, do not.

    A pretrained reader has a learning rate of its own, and so has a table of n-grams: `scale` times that of all others. The
    table learns by gradient descent, which AdamW is with an ε far above all gradients: by AdamW's own steps, as long for what
    was seen once as for all else, n-grams are learnt by heart (docs/log.md).
    """
    peak = config.peak_rate(model.shape.width)
    kinds: dict[str, dict[str, Any]] = {
        "reader.model.": {"scale": config.reader_learning_rate / peak},
        "reader.embedding.": {"scale": TABLE_RATE * TABLE_EPSILON / peak, "eps": TABLE_EPSILON, "betas": (0.0, BETAS[1])},
        "": {"scale": 1.0},
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = next(prefix for prefix in kinds if name.startswith(prefix))
        parameter.requires_grad_(kinds[kind]["scale"] > 0)
        if parameter.requires_grad:
            decays = parameter.ndim == 2 and "embed" not in name
            groups.setdefault((kind, decays), []).append(parameter)
    return [
        {"params": members, "weight_decay": decays * config.weight_decay, **kinds[kind]}
        for (kind, decays), members in groups.items()
    ]


class DataParallel:
    """Every worker holds everything; DistributedDataParallel adds gradients up. Also the strategy of one worker.

    A table of n-grams has no moments here, and with one worker a gradient of those rows alone that were read.
    """

    def __init__(self, student: Student, config: TrainConfig) -> None:
        self._student = student
        groups = parameter_groups(student, config)
        self._tables = [(table, g["scale"] / g["eps"]) for g in groups if "eps" in g for table in g["params"]]
        self._optimizer = torch.optim.AdamW([g for g in groups if "eps" not in g], lr=0.0, betas=BETAS, fused=True)
        if isinstance(student.reader, Ngrams):
            student.reader.embedding.sparse = worker_count() == 1
        self.module: nn.Module = student
        if worker_count() > 1:
            # All workers have the same buffers, one of them as long as the vocabulary: sent once, not with every step.
            self.module = DistributedDataParallel(student, gradient_as_bucket_view=True, forward_sync_buffers=False)
            self.module.register_comm_hook(None, lambda _, bucket: _add_up(bucket))  # it refuses annotations in strings

    def part(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        return nullcontext() if last or not isinstance(self.module, DistributedDataParallel) else self.module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        """See `Strategy`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> torch.Tensor:
        """See `Strategy`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        norm = self._clip()
        with torch.no_grad():
            for table, scale in self._tables:
                table.add_(table.grad, alpha=-rate * scale)
        self._optimizer.step()
        self._student.zero_grad()
        return norm

    def _clip(self) -> torch.Tensor:
        """What `clip_grad_norm_` does, which knows no sparse gradients."""
        values = []
        for parameter in self._student.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                values.append(parameter.grad.values())
            elif parameter.grad is not None:
                values.append(parameter.grad)
        norm = nn.utils.get_total_norm(values)
        torch._foreach_mul_(values, (CLIP_NORM / (norm + 1e-6)).clamp_max(1.0))
        return norm

    def gradients(self) -> Tensors:
        """See `Strategy`."""
        return {name: p.grad.to_dense().clone() for name, p in self._student.named_parameters() if p.grad is not None}

    def weights(self) -> Tensors:
        """See `Strategy`."""
        return {name: p.detach().cpu() for name, p in self._student.named_parameters()}

    @torch.no_grad()
    def put(self, weights: Tensors) -> None:
        """See `Strategy`."""
        for name, parameter in self._student.named_parameters():
            parameter.copy_(weights[name])

    def state(self) -> State:
        """See `Strategy`."""
        moments = self._optimizer.state
        named = [(name, p) for name, p in self._student.named_parameters()]
        return State(
            self.weights(),
            {name: moments[p]["exp_avg"].cpu() for name, p in named if p in moments},
            {name: moments[p]["exp_avg_sq"].cpu() for name, p in named if p in moments},
        )

    def load(self, state: State, steps: int) -> None:
        """See `Strategy`."""
        self.put(state.weights)
        for name, parameter in self._student.named_parameters():
            if steps and name in state.first_moment:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps), device=parameter.device),
                    "exp_avg": state.first_moment[name].to(parameter.device, copy=True),
                    "exp_avg_sq": state.second_moment[name].to(parameter.device, copy=True),
                }


def _add_up(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Adds a bucket of gradients up over the workers, where DistributedDataParallel by itself takes their mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def fast_bf16(device: str) -> bool:
    """Whether a kind of device multiplies in bf16 by itself."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def make_strategy(student: Student, config: TrainConfig, device: torch.device) -> Strategy:
    """The configured strategy, holding a student."""
    student.bf16 = config.precision == "bf16"
    if isinstance(student.reader, Pretrained):
        student.bf16 |= config.precision is None and fast_bf16(device.type)
    if config.gradient_checkpointing and isinstance(student.reader, Pretrained):
        student.reader.model.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cuda":  # alone: torch.set_float32_matmul_precision would change CPUs' too
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if config.strategy == "ddp":
        return DataParallel(student.to(device), config)
    from student.train.zero import Zero  # DeepSpeed takes seconds to import

    return Zero(student.to(device), config)
