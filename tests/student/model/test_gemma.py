from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
)

from pipeline.base.errors import UserError
from student.model.cache import KeyValueCache
from student.model.gemma import gemma_shape, load_gemma
from student.model.model import Student
from student.model.shape import Layer
from tests.tiny import save_conditional, save_teacher, text_config

LENGTH = 50  # longer than any window
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
SMALL = {
    "vocab_size": 200,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 256,
    "rope_parameters": ROPE,
    "rms_norm_eps": 1e-4,
}


def save_small(folder: Path, **changes: Any) -> None:
    """Grouped queries, a window of 8, stretched positions, gains that differ."""
    torch.manual_seed(2)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    model.save_pretrained(folder)


def save_untied(folder: Path) -> None:
    save_small(folder, tie_word_embeddings=False)


CHECKPOINTS = {
    "teacher": lambda folder: save_teacher(folder, 0),
    "conditional": lambda folder: save_conditional(folder, 1),
    "small": save_small,
    "untied": save_untied,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    CHECKPOINTS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_small(folder)
    return folder


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by transformers."""
    kind = (
        Gemma3ForConditionalGeneration if (folder / "config.json").read_text().count("vision_config") else AutoModelForCausalLM
    )
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(input_ids=ids).logits


def vocabulary(folder: Path) -> int:
    return AutoConfig.from_pretrained(folder).get_text_config().vocab_size


def ours(folder: Path, rows: np.ndarray | None = None, watched: list[int] | None = None, **reads: Any) -> Student:
    ids = vocabulary(folder)
    rows = np.arange(ids, dtype=np.int32) if rows is None else rows
    watched_W = np.array(range(ids) if watched is None else watched, np.int32)
    sizes = {"input_vocabulary": len(rows), "embeddings": int(rows.max()) + 1, "output_vocabulary": len(watched_W)}
    shape = gemma_shape(str(folder), context=100, **sizes, **reads)
    return load_gemma(str(folder), shape, rows, watched_W)


def drawn(folder: Path, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, vocabulary(folder), (rows, length), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def read(model: Student, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    ids = drawn(checkpoint)
    model = ours(checkpoint)
    assert not model.training
    assert_close(read(model, ids), theirs(checkpoint, ids))


def test_the_shape_is_the_checkpoints(small: Path) -> None:
    shape = ours(small, opening=(3, 4), separator=(5,)).shape
    full, sliding = Layer(None, 1_000_000.0, 8.0), Layer(8, 5_000.0, 1.0)
    assert shape.kinds == (sliding, full, sliding)
    assert (shape.layers, shape.width, shape.mlp, shape.heads, shape.groups, shape.per_head) == (3, 36, 56, 4, 2, 10)
    assert (shape.epsilon, shape.head_epsilon, shape.score_scale) == (1e-4, 1e-4, 24**-0.5)
    assert (shape.family, shape.opening, shape.separator) == ("gemma3", (3, 4), (5,))


@pytest.mark.parametrize("length", [1, 3, 11])
def test_the_opening_is_read_before_every_sequence(small: Path, length: int) -> None:
    opening = tuple(range(100, 100 + length))
    model, ids = ours(small, opening=opening), drawn(small)
    wanted = theirs(small, torch.cat([torch.tensor([opening] * 2), ids], 1))[:, length:]
    found = read(model, ids)
    assert_close(found, wanted)
    predict = torch.tensor([0, 7, LENGTH - 1, LENGTH, 2 * LENGTH - 1])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, predict), found.flatten(0, 1)[predict], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("opening", [(), (3,), (9, 8, 7, 6, 5, 4, 3, 2, 9, 8, 7)])
@torch.inference_mode()
def test_reading_in_chunks_equals_reading_at_once(small: Path, opening: tuple[int, ...]) -> None:
    model, ids = ours(small, opening=opening), drawn(small, rows=3)
    whole = theirs(small, torch.cat([torch.tensor([opening] * 3, dtype=torch.int64), ids], 1))[:, len(opening) :]
    cache = KeyValueCache(model.shape, 3, 2 * LENGTH, like=model.head.weight, opening=model.read_opening())
    done = torch.zeros(3, dtype=torch.int64)
    for lengths in (torch.tensor([20, 3, 31]), torch.tensor([30, 12, 1]), torch.tensor([0, 1, 1])):
        chunk = torch.zeros(3, int(lengths.max()), dtype=torch.int64)
        for row, length in enumerate(lengths.tolist()):
            chunk[row, :length] = ids[row, done[row] : done[row] + length]
        done += lengths
        logits = model.read(chunk, lengths, cache)
        for row in lengths.nonzero()[:, 0].tolist():
            assert_close(logits[row], whole[row, done[row] - 1])
    assert cache.lengths_B.tolist() == (done + len(opening)).tolist()


def test_ids_with_rows_of_their_own_read_as_in_the_whole_table(small: Path) -> None:
    ids, size = drawn(small), vocabulary(small)
    used = np.unique(ids.numpy())
    rows = np.zeros(size, np.int32)
    rows[used] = np.arange(1, len(used) + 1)
    assert_close(read(ours(small, rows), ids), theirs(small, ids))


def test_ids_that_share_row_0_read_as_their_mean(small: Path) -> None:
    rows = np.zeros(vocabulary(small), np.int32)
    rows[[150, 20, 21, 22]] = [1, 2, 3, 4]
    model, whole = ours(small, rows), ours(small)
    table = whole.embedding.weight
    others = [i for i in range(len(rows)) if i not in (150, 20, 21, 22)]
    torch.testing.assert_close(model.embedding.weight[0], table[others].double().mean(0).float())
    assert torch.equal(model.embedding.weight[1:], table[[150, 20, 21, 22]])
    with torch.no_grad():
        whole.embedding.weight[[5, 6]] = model.embedding.weight[0]
    ids = torch.tensor([[20, 5, 150, 6, 22] * 4])
    assert_close(read(model, ids), read(whole, ids))


def test_ids_of_the_tokenizer_alone_need_no_row(small: Path) -> None:
    """Gemma 3's tokenizer has one id, of images, more than the models without a vision tower have rows."""
    size = vocabulary(small)
    rows = np.zeros(size + 1, np.int32)
    rows[:20] = np.arange(1, 21)
    ids = drawn(small) % 20
    model = ours(small, rows)
    assert_close(read(model, ids), theirs(small, ids))
    torch.testing.assert_close(model.embedding.weight[0], ours(small).embedding.weight[20:].double().mean(0).float())


def test_watched_rows_are_kept_in_their_order(checkpoint: Path) -> None:
    watched, ids = [7, 190, 3, 4, 55], drawn(checkpoint)
    assert_close(read(ours(checkpoint, watched=watched), ids), theirs(checkpoint, ids)[..., watched])


def test_a_checkpoint_in_several_files_is_read_whole(small: Path, tmp_path: Path) -> None:
    Gemma3ForCausalLM.from_pretrained(small, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    states = (ours(folder).state_dict() for folder in (small, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_bfloat16_weights_are_read_in_float32(small: Path, tmp_path: Path) -> None:
    model = Gemma3ForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = ours(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    ids = drawn(small)
    assert_close(read(found, ids), theirs(tmp_path, ids))


READS = {"input_vocabulary": 9, "embeddings": 9, "output_vocabulary": 9, "context": 9}


def refused(folder: Path, config: Any, match: str) -> None:
    config.save_pretrained(folder)
    with pytest.raises(UserError, match=match):
        gemma_shape(str(folder), **READS)


def test_other_families_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    refused(tmp_path, config, "is a llama: a student is cut from")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
        {"hidden_activation": "gelu"},
    ],
)
def test_other_gemmas_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(tmp_path, Gemma3TextConfig(**SMALL | changes), f"another {next(iter(changes))} than")


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_other_rotary_positions_are_refused(tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    refused(tmp_path, Gemma3TextConfig(**SMALL | {"rope_parameters": ROPE | {"full_attention": rope}}), f"of the type {kind}")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"):
        gemma_shape(str(tmp_path), **READS)


def test_weights_must_be_safetensors(small: Path, tmp_path: Path) -> None:
    shutil.copy(small / "config.json", tmp_path)
    with pytest.raises(UserError, match="no weights as safetensors"):
        ours(tmp_path)


def test_released_layouts_have_their_windows(tmp_path: Path) -> None:
    text_config(300).save_pretrained(tmp_path)
    kinds = gemma_shape(str(tmp_path), **READS).kinds
    assert kinds == (Layer(32, 10_000.0, 1.0), Layer(32, 10_000.0, 1.0), Layer(None, 1_000_000.0, 1.0))
