from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.config import PruneConfig
from student.data.examples import Examples
from student.model.checkpoint import load_student, save_student
from student.model.model import Student
from student.model.shape import Shape
from student.prune.cut import Kept, choose, cut, top
from student.prune.importance import Importance, importance, measure, width_norms
from student.prune.sizes import Sizes, parameters, target_sizes
from tests.student.prune.students import examples_of, make

MEASURED = np.arange(0, 160, 16)
ROOM = 1e-5  # of the logits' scale: what float32 leaves open


def measured(model: Student, examples: Examples) -> Importance:
    parts = [measure(model, examples, MEASURED, 6, 8)]
    return importance(parts, model.shape.layers)


def pruned(model: Student, examples: Examples, **sizes: int) -> tuple[Student, Kept]:
    """Measures, chooses and cuts as `retort prune` does."""
    scores = measured(model, examples)
    kept = choose(scores, model.shape, target_sizes(PruneConfig(**sizes), model.shape))
    return cut(model, kept), kept


@torch.inference_mode()
def logits(model: Student) -> torch.Tensor:
    ids = torch.randint(0, model.shape.input_vocabulary, (3, 40), generator=torch.Generator().manual_seed(5))
    return model(ids)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= ROOM * wanted.abs().max()


def parts_of(model: Student, layer: int) -> dict[str, torch.Tensor]:
    """A layer's matrices with an axis for units, as views."""
    shape, block = model.shape, model.blocks[layer]
    qkv = block.attention.qkv.weight.data.view(-1, shape.per_head, shape.width)
    queries, keys, values = qkv.split((shape.heads, shape.groups, shape.groups))
    up = block.up.weight.data.view(-1, shape.mlp, shape.width)
    heads = block.attention.out.weight.data.view(shape.width, shape.heads, shape.per_head)
    return {"queries": queries, "keys": keys, "values": values, "up": up, "out": heads, "down": block.down.weight.data}


@pytest.fixture(scope="module")
def scores(source: Student, examples: Examples) -> Importance:
    return measured(source, examples)


def test_pruning_nothing_changes_not_a_bit(source: Student, scores: Importance) -> None:
    same = cut(source, choose(scores, source.shape, Sizes.of(source.shape)))
    assert torch.equal(logits(same), logits(source))
    assert Sizes.of(same.shape) == Sizes.of(source.shape)
    assert not same.training


def test_neurons_that_say_nothing_go_unnoticed(compiled: CompiledTask, shards: Shards, family: str) -> None:
    model = make(compiled, family)
    useless = [[0, 5, 6, 20, 31, 33, 34, 39], list(range(8)), list(range(1, 16, 2))]
    for layer, neurons in enumerate(useless):
        parts_of(model, layer)["up"][-1, neurons] = 0  # where gated, the values
    smaller, kept = pruned(model, examples_of(shards, model), mlp=model.shape.mlp - 8)
    for neurons, gone in zip(kept.neurons, useless, strict=True):
        assert neurons.tolist() == [n for n in range(model.shape.mlp) if n not in gone]
    assert_same(logits(smaller), logits(model))


@pytest.mark.parametrize(("family", "heads", "groups"), [("plain", 4, 4), ("gemma3", 6, 2), ("gemma3", 6, 3), ("gemma3", 4, 4)])
def test_groups_without_values_go_unnoticed(
    compiled: CompiledTask, shards: Shards, family: str, heads: int, groups: int
) -> None:
    model = make(compiled, family, heads=heads, key_value_heads=groups, head_width=8)
    useless, shared = [groups - 1, 0, groups - 2], heads // groups
    for layer, group in enumerate(useless):
        parts_of(model, layer)["values"][group] = 0
    smaller, kept = pruned(model, examples_of(shards, model), heads=heads - shared)
    assert (smaller.shape.heads, smaller.shape.groups) == (heads - shared, groups - 1)
    for left, members, gone in zip(kept.groups, kept.heads, useless, strict=True):
        assert left.tolist() == [group for group in range(groups) if group != gone]
        assert members.tolist() == [head for head in range(heads) if head // shared != gone]
    assert_same(logits(smaller), logits(model))


def test_heads_whose_output_is_not_read_go_unnoticed(compiled: CompiledTask, shards: Shards) -> None:
    model = make(compiled, "gemma3", heads=6)  # heads 0 to 2 share keys and values, and 3 to 5
    scores = measured(model, examples_of(shards, model))
    useless = [(2, 3), (0, 5), (1, 4)]
    for layer, heads in enumerate(useless):
        parts_of(model, layer)["out"][:, list(heads)] = 0
        scores.heads_LH[layer, list(heads)] = 0
    kept = choose(scores, model.shape, target_sizes(PruneConfig(heads=4), model.shape))
    assert [heads.tolist() for heads in kept.heads] == [[0, 1, 4, 5], [1, 2, 3, 4], [0, 2, 3, 5]]
    assert [groups.tolist() for groups in kept.groups] == [[0, 1]] * 3
    smaller = cut(model, kept)
    assert (smaller.shape.heads, smaller.shape.groups) == (4, 2)
    assert_same(logits(smaller), logits(model))


def test_all_kinds_of_useless_units_go_at_once_or_one_after_another(
    compiled: CompiledTask, shards: Shards, family: str
) -> None:
    model = make(compiled, family, heads=4, key_value_heads=4)
    for layer in range(3):
        parts_of(model, layer)["values"][layer] = 0
        parts_of(model, layer)["up"][-1, layer : layer + 6] = 0
    examples, sizes = examples_of(shards, model), {"mlp": model.shape.mlp - 6, "heads": 3}
    assert_same(logits(pruned(model, examples, **sizes)[0]), logits(model))
    smaller = model
    for link in ({"heads": 3, "mlp": sizes["mlp"] + 2}, sizes):
        smaller, _ = pruned(smaller, examples, **link)
        assert_same(logits(smaller), logits(model))
    assert Sizes.of(smaller.shape) == replace(Sizes.of(model.shape), mlp=sizes["mlp"], heads=3, groups=3)


@pytest.mark.parametrize("idle", [0, 2])
def test_layers_that_do_nothing_go_unnoticed(compiled: CompiledTask, shards: Shards, family: str, idle: int) -> None:
    model = make(compiled, family)
    examples = examples_of(shards, model)
    block = model.blocks[idle]
    for matrix in (block.attention.out, block.down):
        matrix.weight.data.zero_()
        matrix.weight.requires_grad_(False)
    _train(model, examples)
    scores = measured(model, examples)
    assert scores.cosine_L[idle] == pytest.approx(0, abs=1e-12)
    assert scores.loss_L[idle] == 0
    left = [layer for layer in range(3) if layer != idle]
    kept = choose(scores, model.shape, replace(Sizes.of(model.shape), layers=2))
    smaller = cut(model, kept)
    assert kept.layers.tolist() == left
    assert smaller.shape.each_layer == tuple(model.shape.each_layer[layer] for layer in left)
    assert torch.equal(logits(smaller), logits(model))


def _train(model: Student, examples: Examples) -> None:
    """Till every layer helps: leaving one of random weights out might."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(12):
        batch = examples.batch(np.arange(step * 12, step * 12 + 12))
        F.cross_entropy(model(batch.tokens, batch.predict), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.zero_grad()


SMALLER = {"width": 20, "heads": 2, "mlp": 18, "layers": 2}


def test_tensors_are_slices_of_the_sources(source: Student, scores: Importance) -> None:
    kept = choose(scores, source.shape, target_sizes(PruneConfig(**SMALLER), source.shape))
    found, theirs = cut(source, kept), source.state_dict()
    channels = kept.channels.tolist()
    expected = {"rows": theirs["rows"]}
    expected |= {name: theirs[name][:, channels] for name in ("embedding.weight", "head.weight")}
    for new, old in enumerate(kept.layers.tolist()):
        parts, name = parts_of(source, old), f"blocks.{new}"
        heads, groups, neurons = kept.heads[new].tolist(), kept.groups[new].tolist(), kept.neurons[new].tolist()
        qkv = torch.cat([parts["queries"][heads], parts["keys"][groups], parts["values"][groups]])
        expected[f"{name}.attention.qkv.weight"] = qkv[..., channels].flatten(0, 1)
        expected[f"{name}.attention.out.weight"] = parts["out"][:, heads][channels].flatten(1)
        expected[f"{name}.up.weight"] = parts["up"][:, neurons][..., channels].flatten(0, 1)
        expected[f"{name}.down.weight"] = parts["down"][channels][:, neurons]
        for of_head in ("query_norm", "key_norm") if source.shape.is_gemma else ():
            expected[f"{name}.attention.{of_head}.weight"] = theirs[f"blocks.{old}.attention.{of_head}.weight"]
    new_of = {str(old): str(new) for new, old in enumerate(kept.layers.tolist())}
    for name in width_norms(source):
        block, _, rest = name.removeprefix("blocks.").partition(".")
        if name == "norm" or block in new_of:
            new = name if name == "norm" else f"blocks.{new_of[block]}.{rest}"
            expected[f"{new}.weight"] = theirs[f"{name}.weight"][channels]
    assert sorted(found.state_dict()) == sorted(expected)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_shape_says_what_was_kept(source: Student, scores: Importance) -> None:
    kept = choose(scores, source.shape, target_sizes(PruneConfig(**SMALLER), source.shape))
    found, shape = cut(source, kept), source.shape
    sizes = {"width": 20, "heads": 2, "key_value_heads": 2, "mlp": 18, "layers": 2, "head_width": shape.per_head}
    kinds = tuple(shape.kinds[layer] for layer in kept.layers) if shape.kinds else None
    assert found.shape == replace(shape, **sizes, kinds=kinds)
    assert sum(found.parameter_counts().values()) == parameters(shape, Sizes.of(found.shape))
    assert kept.as_dict() == {
        "layers": kept.layers.tolist(),
        "channels": kept.channels.tolist(),
        "heads": [heads.tolist() for heads in kept.heads],
    }


@pytest.mark.parametrize("sizes", [{}, SMALLER, {"layers": 1}])
def test_no_memory_is_shared_with_the_source(source: Student, scores: Importance, sizes: dict[str, int]) -> None:
    found = cut(source, choose(scores, source.shape, target_sizes(PruneConfig(**sizes), source.shape)))
    theirs = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    assert [name for name, tensor in found.state_dict().items() if tensor.untyped_storage().data_ptr() in theirs] == []


def test_a_cut_student_is_loaded_as_it_was_saved(
    source: Student, examples: Examples, scores: Importance, compiled: CompiledTask, tmp_path: Path
) -> None:
    found = cut(source, choose(scores, source.shape, target_sizes(PruneConfig(**SMALLER), source.shape)))
    save_student(str(tmp_path), found, compiled)
    loaded, _ = load_student(str(tmp_path))
    assert loaded.shape == found.shape
    assert torch.equal(logits(loaded), logits(found))
    again, _ = pruned(loaded, examples, width=12, heads=1 if not found.shape.is_gemma else 2, mlp=7, layers=1)
    assert Sizes.of(again.shape) == Sizes(12, again.shape.heads, again.shape.groups, 7, 1)
    assert logits(again).isfinite().all()


def ranked(values: list[int], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=12), data=st.data())
def test_the_top_are_the_largest_and_of_equals_the_first(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    assert top(np.array(values, np.float64), count).tolist() == ranked(values, count)


def rank_sums(values: list[int], shared: int) -> Iterator[int]:
    return (sum(value**2 for value in values[start : start + shared]) for start in range(0, len(values), shared))


@given(data=st.data(), layers=st.integers(1, 3), groups=st.integers(1, 3), shared=st.integers(1, 3))
def test_the_chosen_are_the_top_and_groups_keep_equally_many(
    data: st.DataObject, layers: int, groups: int, shared: int
) -> None:
    shape = Shape(9, 9, 9, 9, layers, 6, groups * shared, 5, family="gemma3", key_value_heads=groups, head_width=2)

    def draw(*size: int) -> np.ndarray:
        flat = data.draw(st.lists(st.integers(0, 3), min_size=math.prod(size), max_size=math.prod(size)))
        return np.array(flat, np.float64).reshape(size)

    scores = Importance(draw(layers, shape.heads), draw(layers, 5), draw(6), draw(layers), draw(layers))
    wanted = {name: data.draw(st.integers(1, getattr(shape, name))) for name in ("width", "heads", "mlp", "layers")}
    try:
        sizes = target_sizes(PruneConfig(**wanted), shape)
    except UserError:
        return
    kept = choose(scores, shape, sizes)
    assert kept.layers.tolist() == ranked(scores.loss_L.tolist(), sizes.layers)
    assert kept.channels.tolist() == ranked(scores.channels_D.tolist(), sizes.width)
    for new, layer in enumerate(kept.layers):
        heads = [int(value) for value in scores.heads_LH[layer]]
        stay = ranked(list(rank_sums(heads, shared)), sizes.groups)
        each = sizes.heads // sizes.groups
        assert kept.groups[new].tolist() == stay
        assert kept.heads[new].tolist() == [g * shared + n for g in stay for n in ranked(heads[g * shared :][:shared], each)]
        assert kept.neurons[new].tolist() == ranked(scores.neurons_LF[layer].tolist(), sizes.mlp)
    arrays = [kept.layers, kept.channels, *kept.heads, *kept.groups, *kept.neurons]
    assert all(a < b for array in arrays for a, b in pairwise(array.tolist()))
