from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from student.config import PruneConfig
from student.model.model import Student
from student.model.shape import Shape
from student.prune.sizes import Sizes, parameters, target_sizes


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Shapes of both families, with grouped queries in one."""
    groups, shared = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    gemma = draw(st.booleans())
    heads = groups * shared if gemma else groups
    sizes = {"layers": draw(st.integers(1, 4)), "heads": heads, "mlp": 8 * draw(st.integers(1, 20))}
    own = {"family": "gemma3", "key_value_heads": groups, "head_width": 2 * draw(st.integers(1, 9))} if gemma else {}
    factor = 8 if gemma else 8 * heads
    return Shape(
        50, draw(st.integers(1, 40)), draw(st.integers(1, 30)), 20, width=factor * draw(st.integers(1, 6)), **sizes, **own
    )


def resized(shape: Shape, sizes: Sizes) -> Shape:
    """The shape of a student cut to these sizes."""
    kept = {"width": sizes.width, "heads": sizes.heads, "mlp": sizes.mlp, "layers": sizes.layers}
    return replace(shape, **kept, key_value_heads=sizes.groups, head_width=shape.per_head)


def counted(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(Student(shape).parameter_counts().values())


def possible_heads(shape: Shape) -> list[int]:
    """Head counts that can be shared out: as many of each group, or whole groups."""
    each, shared = range(1, shape.heads // shape.groups + 1), shape.heads // shape.groups
    return sorted({shape.groups * n for n in each} | {shared * groups for groups in range(1, shape.groups + 1)})


@given(shape=shapes(), data=st.data())
@settings(max_examples=30)
def test_parameters_are_those_of_the_cut_student(shape: Shape, data: st.DataObject) -> None:
    assert parameters(shape, Sizes.of(shape)) == counted(shape)
    wanted = {name: data.draw(st.integers(1, getattr(shape, name))) for name in ("width", "mlp", "layers")}
    sizes = target_sizes(PruneConfig(**wanted, heads=data.draw(st.sampled_from(possible_heads(shape)))), shape)
    assert wanted.items() <= vars(sizes).items()
    assert parameters(shape, sizes) == counted(resized(shape, sizes))


@given(shape=shapes(), share=st.floats(0.01, 1))
@settings(max_examples=60)
def test_a_share_gives_the_largest_width_within_it(shape: Shape, share: float) -> None:
    whole = parameters(shape, Sizes.of(shape))
    try:
        sizes = target_sizes(PruneConfig(fraction=share), shape)
    except UserError:
        assert parameters(shape, smallest(shape)) > round(share * whole)
        return
    assert sizes == target_sizes(PruneConfig(params=max(1, round(share * whole))), shape)
    assert sizes == target_sizes(PruneConfig(fraction=share / 2), shape, whole=2 * whole)
    assert parameters(shape, sizes) <= round(share * whole)
    assert sizes.layers == shape.layers
    assert all(getattr(sizes, name) <= getattr(shape, name) for name in vars(sizes))
    assert sizes.heads in possible_heads(shape)
    if sizes != Sizes.of(shape):
        heads = next((heads for heads in possible_heads(shape) if heads > sizes.heads), shape.heads)
        more = PruneConfig(heads=heads, width=min(shape.width, sizes.width + 8), mlp=min(shape.mlp, sizes.mlp + 8))
        assert parameters(shape, target_sizes(more, shape)) > round(share * whole)


def smallest(shape: Shape) -> Sizes:
    return target_sizes(PruneConfig(width=min(8, shape.width), heads=possible_heads(shape)[0], mlp=8), shape)


@given(shape=shapes(), share=st.floats(0.01, 1))
@settings(max_examples=60)
def test_a_share_gives_the_most_layers_within_it(shape: Shape, share: float) -> None:
    budget = round(share * parameters(shape, Sizes.of(shape)))
    fit = [n for n in range(1, shape.layers + 1) if parameters(shape, replace(Sizes.of(shape), layers=n)) <= budget]
    if fit:
        assert target_sizes(PruneConfig(fraction=share, by="depth"), shape) == replace(Sizes.of(shape), layers=max(fit))
    else:
        with pytest.raises(UserError, match="too few"):
            target_sizes(PruneConfig(fraction=share, by="depth"), shape)


@pytest.mark.parametrize("by", ["width", "depth"])
@pytest.mark.parametrize("width", [8, 16, 20, 24, 28, 44])
def test_all_parameters_keep_everything(width: int, by: str) -> None:
    shape = Shape(50, 40, 30, 20, layers=2, width=width, heads=2, mlp=4 * width, head_width=10)
    assert target_sizes(PruneConfig(fraction=1, by=by), shape) == Sizes.of(shape)
    assert target_sizes(PruneConfig(), shape) == Sizes.of(shape)


def grouped(heads: int, groups: int) -> Shape:
    return Shape(50, 40, 30, 20, 2, 32, heads, 64, family="gemma3", key_value_heads=groups, head_width=6)


@pytest.mark.parametrize(
    ("heads", "groups", "kept", "left"),
    [
        (4, 2, 4, 2),
        (4, 2, 2, 2),
        (6, 2, 3, 1),
        (6, 2, 4, 2),
        (6, 2, 2, 2),
        (6, 3, 2, 1),
        (6, 3, 3, 3),
        (6, 3, 4, 2),
        (4, 1, 3, 1),
        (4, 4, 3, 3),
    ],
)
def test_groups_stay_while_each_has_heads_and_else_go_whole(heads: int, groups: int, kept: int, left: int) -> None:
    sizes = target_sizes(PruneConfig(heads=kept), grouped(heads, groups))
    assert sizes == Sizes(32, kept, left, 64, 2)


def test_heads_that_groups_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match=r"5 heads cannot be shared .*\[2, 3, 4, 6\]"):
        target_sizes(PruneConfig(heads=5), grouped(6, 2))


@pytest.mark.parametrize("by", ["width", "depth"])
def test_too_small_a_budget_names_the_least(by: str) -> None:
    shape = grouped(6, 2)
    least = counted(resized(shape, smallest(shape) if by == "width" else replace(Sizes.of(shape), layers=1)))
    with pytest.raises(UserError, match=rf"{least - 1:,} parameters are too few: by {by}, {least:,} are the least"):
        target_sizes(PruneConfig(params=least - 1, by=by), shape)
    assert parameters(shape, target_sizes(PruneConfig(params=least, by=by), shape)) == least


@pytest.mark.parametrize("name", ["width", "heads", "mlp", "layers"])
def test_more_than_the_source_has_is_refused(name: str) -> None:
    shape = grouped(6, 2)
    with pytest.raises(UserError, match=rf"prune\.{name} is .* only {getattr(shape, name)}"):
        target_sizes(PruneConfig(**{name: getattr(shape, name) + 1}), shape)
