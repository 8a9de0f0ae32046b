"""ZeRO data parallelism (Rajbhandari et al., 2020) by DeepSpeed, in the arithmetic of plain data parallelism.

Weights stay in float32 and the optimizer is PyTorch's own AdamW, so the stages differ only in where each number lives:
workers share out the optimizer's moments (1), the gradients too (2), the weights too (3). Written for the release of
DeepSpeed that pyproject.toml pins, some of whose inner parts it needs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from student.config import TrainConfig
from student.model.checkpoint import Tensors
from student.model.model import Student
from student.train.strategy import BETAS, CLIP_NORM, State, parameter_groups, worker_count

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers exchanged at once; DeepSpeed's default takes 2 GB however small the student


class Zero:
    """See `student.train.strategy.Strategy`."""

    def __init__(self, student: Student, config: TrainConfig) -> None:
        self._device = student.rows.device
        deepspeed = _deepspeed(self._device)
        self._stage = int(config.strategy.removeprefix("zero"))
        self._named = list(student.named_parameters())  # all workers visit them in this order, as each visit communicates
        groups = parameter_groups(student, config)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS)
        settings = _settings(self._stage, CLIP_NORM, sum(p.numel() for p in student.parameters()))
        self.module: Any
        self.module, *_ = deepspeed.initialize(
            model=student, optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        self._add_up()
        self._make_moments()

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """See `Strategy`."""
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> torch.Tensor:
        """See `Strategy`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm(), dtype=torch.float32)

    def gradients(self) -> Tensors:
        """See `Strategy`."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).detach().clone() for name, parameter in self._named}

    def weights(self) -> Tensors:
        """See `Strategy`."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().to("cpu", copy=True) for name, p in self._named}

    def put(self, weights: Tensors) -> None:
        """See `Strategy`."""
        for name, parameter in self._named:
            self._set_weight(parameter, weights[name])
        self.module.optimizer.refresh_fp32_params()

    def state(self) -> State:
        """See `Strategy`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        def moment(key: str) -> Tensors:
            return {name: safe_get_full_optimizer_state(p, key).detach().to("cpu", copy=True) for name, p in self._named}

        return State(self.weights(), *map(moment, MOMENTS))

    def load(self, state: State, steps: int) -> None:
        """See `Strategy`."""
        self.put(state.weights)
        for name, parameter in self._named:
            if steps:
                for key, moments in zip(MOMENTS, (state.first_moment, state.second_moment), strict=True):
                    if name in moments:  # a table of n-grams has none under `DataParallel`
                        self._set_moment(parameter, moments[name], key)
        for entry in self._optimizer.state.values():
            entry["step"].fill_(steps)

    def _add_up(self) -> None:
        """Undoes the mean over the workers, as stage 3 cannot add.

        A factor on the loss would change every rounding of the backward pass where their number is no power of two.
        """
        for _, parameter in self._named:
            parameter.register_hook(lambda gradient: gradient * worker_count())  # type: ignore[no-untyped-call]

    def _make_moments(self) -> None:
        """AdamW makes them at its first step, but a state may be loaded before that."""
        inner = self.module.optimizer
        flats = inner.fp32_partitioned_groups_flat if self._stage == 3 else inner.single_partition_of_fp32_groups
        for flat in flats:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._optimizer.state[flat] = {"step": torch.zeros(()), **moments}
        if self._stage < 3:
            inner._lazy_init_hp_params_optimizer_state()  # links each parameter with its piece of the moments

    def _set_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Sets the weight that the forward pass reads; the optimizer's copy follows by refresh_fp32_params."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    def _set_moment(self, parameter: Any, value: torch.Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self._device)
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_local_optimizer_state(parameter, _piece(value, parameter.ds_tensor.numel()), key)


def _piece(value: torch.Tensor, size: int) -> torch.Tensor:
    """This worker's piece. DeepSpeed's own setter fails where pieces are uneven, so it is padded as in its storage."""
    padding = size * worker_count() - value.numel()
    return nn.functional.pad(value.flatten(), (0, padding)).view(-1, size)[dist.get_rank()]


def _deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for the device, which it reads from the environment.

    An empty table of compatible operators keeps it from compiling an all-reduce for inference, which training never calls.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)
    return deepspeed


def _settings(stage: int, clip_norm: float, size: int) -> dict[str, Any]:
    """Only what the arithmetic or the memory needs; the parts of a step are counted by the caller."""
    sharding = {
        "stage": stage,
        "reduce_bucket_size": min(size, BUCKET),
        "stage3_prefetch_bucket_size": min(size, BUCKET),
        "stage3_param_persistence_threshold": 4096,
        # Otherwise up to a billion gathered weights stay on every worker, also past the end of an evaluation.
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "memory_efficient_linear": False,  # otherwise torch.nn.functional.linear is replaced in the whole process
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": sharding,
    }
