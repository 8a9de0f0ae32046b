"""A pretended GPU: tensors that say they are on `cuda:0` and compute on the CPU, so that their values can be read.

What torch refuses on a GPU is refused here too: an operation over tensors of both devices, but for a CPU's single number where
torch takes one. What only CUDA's own kernels do or refuse cannot be seen here: `make gpu-check` is for that. torch's own
FakeTensorMode has no values, and decoding asks for them at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ACROSS = {"copy_", "_to_copy", "to", "set_data"}  # between devices
INDEXING = {"index", "index_put", "index_put_"}


class Pretended(torch.Tensor):
    """A tensor of the accelerator; `held` has its values. Where Python does not look, it is on `meta`, which autograd knows."""

    held: torch.Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        with torch.inference_mode(False):
            shape = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            return torch.Tensor._make_subclass(cls, shape, held.requires_grad, device_for_backend_keys=CUDA)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, key: Any) -> torch.Tensor:
        return super().__getitem__(torch.tensor(key) if isinstance(key, list) else key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(torch.tensor(key) if isinstance(key, list) else key, value)

    def to(self, *given: Any, **named: Any) -> torch.Tensor:
        device, kind, *_ = torch._C._nn._parse_to(*given, **named)
        if device is None or device.type == "cuda":
            return self if kind in (None, self.dtype) else super().to(kind)
        return super().to(device, kind)

    @property
    def data(self) -> torch.Tensor:
        return Pretended(self.held)

    @data.setter
    def data(self, other: Pretended) -> None:
        self.held = other.held
        torch.Tensor.data.__set__(self, other)

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Generator(torch.Generator):
    """Of the accelerator too: its numbers are the CPU's."""

    def __new__(cls, *_: Any) -> Generator:
        return super().__new__(cls)


class Accelerator(TorchDispatchMode):
    """Within, whatever is made on `cuda` is pretended."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Does to torch's functions what a GPU would, before they come apart into operations.

    `cuda` is `cuda:0`, as torch's own code would have to ask CUDA; autocast casts; attention is as strict as CUDA's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda leaf: CUDA if _names_cuda(leaf) else leaf, (args, kwargs or {}))
        if func in CASTS and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(lambda leaf: leaf.to(CASTS[func]) if _floats(leaf) else leaf, (args, kwargs))
        if func is F.scaled_dot_product_attention and isinstance(args[0], Pretended):
            _require_fast_attention(*args[:3], kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return func(*args, **kwargs)


CASTS = {F.linear: torch.bfloat16, F.scaled_dot_product_attention: torch.bfloat16, F.rms_norm: torch.float32}  # CUDA's autocast


def _names_cuda(leaf: Any) -> bool:
    return isinstance(leaf, str | torch.device) and str(leaf) == "cuda"


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Pretended) and leaf.is_floating_point()


def _require_fast_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuses what CUDA's kernels refuse, and what falls to the slow one (torch 2.13, cuda/sdp_utils.cpp).

    The flash kernel takes no mask and no float32; the memory-efficient one takes as many key heads as query heads alone, and
    a mask of booleans or of the queries' type.
    """
    assert queries.dtype == keys.dtype == values.dtype
    assert mask is None or mask.dtype in (torch.bool, queries.dtype), f"{mask.dtype} mask, {queries.dtype} queries"
    flash = mask is None and queries.dtype == torch.bfloat16
    assert flash or queries.shape[1] == keys.shape[1], "grouped-query attention on the slow kernel"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the values."""
    leaves, form = tree_flatten((args, kwargs))
    ours = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, Pretended)}
    _require_one_device(func, args, kwargs)
    asked = [_is_here(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
    there = any(asked) if asked else bool(ours)
    args, kwargs = tree_unflatten([_value(leaf) for leaf in leaves], form)

    def back(leaf: Any) -> Any:
        return (ours[id(leaf)] if id(leaf) in ours else Pretended(leaf)) if there and isinstance(leaf, torch.Tensor) else leaf

    return tree_map(back, func(*args, **kwargs))


def _is_here(device: torch.device) -> bool:
    """Whether it is the accelerator: torch's own code, outside of Python, makes more where a tensor is, and sees `meta`."""
    return device.type == "cuda" or (device.type == "meta" and torch.get_default_device().type != "meta")


def _value(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return CPU if _is_here(leaf) else leaf
    return leaf.held if isinstance(leaf, Pretended) else leaf


def _require_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """As torch does: it moves indices by itself, and a number goes with tensors of either device in what is pointwise."""
    name = func.overloadpacket.__name__
    indices = {id(leaf) for leaf in tree_flatten(args[1:2])[0]} if name in INDEXING else set()
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    here = [t for t in tensors if not isinstance(t, Pretended) and not (t.is_cpu and id(t) in indices)]
    if not here or name in ACROSS or not any(isinstance(t, Pretended) for t in tensors):
        return
    if torch.Tag.pointwise in func.tags and all(t.ndim == 0 for t in here):
        return
    raise RuntimeError(f"{func}: tensors on cuda:0 and on the cpu, {[tuple(t.shape) for t in here]}")


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A machine with one GPU, named by the device it gives."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    patch.setattr(torch, "Generator", Generator)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)  # parameters are made anew
    try:
        with torch.autograd.set_multithreading_enabled(False), Accelerator(), Calls():
            yield CUDA
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
