"""A Gemma 3 checkpoint as a student: the teacher itself, or a sibling of it, with the watched tokens alone for its output.

The weights are the checkpoint's in float32. What Gemma computes from them at every call is computed once: norms scale by
1 + weight, embeddings by √width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.base.errors import UserError
from pipeline.teacher.gemma3_names import language_name
from student.model.model import Student
from student.model.shape import Layer, Shape

KINDS = ("gemma3_text", "gemma3")
WEIGHTS = "*.safetensors"
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
MATRICES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

Tensors = dict[str, torch.Tensor]


def gemma_shape(model: str, revision: str | None = None, **reads: Any) -> Shape:
    """The shape of a checkpoint's language model as a student.

    Args:
        **reads: what the checkpoint does not say: `Shape`'s fields from `input_vocabulary` to `context`, and what it reads.

    Raises:
        UserError: it is none of Gemma 3's family, or of a kind that a student cannot be.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"no model in {model}: {str(error).splitlines()[0]}") from error
    _check(model, config)
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        family="gemma3",
        key_value_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        kinds=tuple(_layer(config, kind) for kind in config.layer_types),
        epsilon=config.rms_norm_eps,
        head_epsilon=config.rms_norm_eps,
        score_scale=config.query_pre_attn_scalar**-0.5,
        **reads,
    )


def _check(model: str, config: Any) -> None:
    if config.model_type not in KINDS:
        raise UserError(f"{model} is a {config.model_type}: a student is cut from a student, or from a Gemma 3 model")
    refused = {
        "attention_bias": config.attention_bias,
        "use_bidirectional_attention": config.use_bidirectional_attention,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_activation": config.hidden_activation != "gelu_pytorch_tanh",
    }
    if found := [name for name, value in refused.items() if value]:
        raise UserError(f"{model} is a Gemma 3 with another {', '.join(found)} than the released ones, which no student has")


def _layer(config: Any, kind: str) -> Layer:
    rotary = config.rope_parameters[kind]
    if rotary["rope_type"] not in ("default", "linear"):
        raise UserError(
            f"rotary positions of the type {rotary['rope_type']} are not known; Gemma 3 has default and linear ones"
        )
    window = config.sliding_window if kind == "sliding_attention" else None
    return Layer(window, float(rotary["rope_theta"]), float(rotary.get("factor") or 1.0))


def load_gemma(
    model: str, shape: Shape, rows_V: NDArray[np.int32], watched_W: NDArray[np.int32], revision: str | None = None
) -> Student:
    """The checkpoint's weights as a student of this shape, in evaluation mode.

    Args:
        shape: by `gemma_shape`.
        rows_V: the embedding's row of each id; all ids of row 0 share their mean.
    """
    with torch.device("meta"):
        student = Student(shape)
    with _opened(model, revision) as read:
        tensors = {"rows": torch.from_numpy(rows_V), "norm.weight": 1 + read("model.norm.weight")}
        for layer in range(shape.layers):
            tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in _block(read, f"model.layers.{layer}")}
        table_VD = read("model.embed_tokens.weight")
        head_VD = read("lm_head.weight") if read.has("lm_head.weight") else table_VD
        tensors["head.weight"] = head_VD[torch.from_numpy(watched_W.astype(np.int64))]
        tensors["embedding.weight"] = _rows_of(table_VD, rows_V) * math.sqrt(shape.width)
    student.load_state_dict(tensors, assign=True)
    return student.eval()


def _block(read: _Reader, layer: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, theirs in NORMS.items():
        yield f"{name}.weight", 1 + read(f"{layer}.{theirs}.weight")
    for name, parts in MATRICES.items():
        yield f"{name}.weight", torch.cat([read(f"{layer}.{part}.weight") for part in parts])


def _rows_of(table_VD: torch.Tensor, rows_V: NDArray[np.int32]) -> torch.Tensor:
    """The compact table, [R, D]."""
    ids = torch.from_numpy(rows_V.astype(np.int64))[: len(table_VD)]  # a tokenizer may know ids that its model does not
    counts_R = torch.bincount(ids, minlength=int(rows_V.max()) + 1).clamp_min(1)
    sums_RD = torch.zeros(len(counts_R), table_VD.shape[1]).index_add_(0, ids, table_VD[: len(ids)])
    return sums_RD / counts_R[:, None]


class _Reader:
    """Tensors of a checkpoint, by the names its language model has without a vision tower; each in float32."""

    def __init__(self, files: list[Any]) -> None:
        self._places = {language_name(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118

    def has(self, name: str) -> bool:
        """Whether the checkpoint has it."""
        return name in self._places

    def __call__(self, name: str) -> torch.Tensor:
        """Reads one."""
        file, stored = self._places[name]
        tensor: torch.Tensor = file.get_tensor(stored)
        return tensor.float()


@contextmanager
def _opened(model: str, revision: str | None) -> Iterator[_Reader]:
    """The checkpoint's files.

    Raises:
        UserError: it has none as safetensors.
    """
    folder = model
    if not os.path.isdir(model):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(model, revision=revision, allow_patterns=[WEIGHTS])
    paths = sorted(Path(folder).glob(WEIGHTS))
    if not paths:
        raise UserError(f"{model} has no weights as safetensors")
    with ExitStack() as stack:
        yield _Reader([stack.enter_context(safe_open(path, "pt")) for path in paths])
