"""How large a pruned student is to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.base.errors import UserError
from student.config import SIZES, PruneConfig
from student.model.shape import Shape

STEPS = 512  # sizes tried between nothing and all
MULTIPLE = 8  # of widths that a budget gives, as matrices of other sizes are multiplied more slowly


@dataclass(frozen=True)
class Sizes:
    """What of a student is counted: channels, heads, key/value heads and neurons of each layer, layers."""

    width: int
    heads: int
    groups: int
    mlp: int
    layers: int

    @staticmethod
    def of(shape: Shape) -> Sizes:
        """A student's."""
        return Sizes(shape.width, shape.heads, shape.groups, shape.mlp, shape.layers)


def parameters(shape: Shape, sizes: Sizes) -> int:
    """Parameters of a student cut to these sizes, embedding included."""
    per_head, width = shape.per_head, sizes.width
    attention = width * (2 * sizes.heads + 2 * sizes.groups) * per_head
    feed = width * sizes.mlp * (3 if shape.is_gemma else 2)
    norms = 4 * width + 2 * per_head if shape.is_gemma else 2 * width
    tables = (shape.embeddings + shape.output_vocabulary) * width
    return tables + sizes.layers * (attention + feed + norms) + width


def target_sizes(config: PruneConfig, shape: Shape, whole: int | None = None) -> Sizes:
    """The sizes that the configuration asks for.

    Args:
        whole: parameters that `fraction` is a share of; by default the source's.

    Raises:
        UserError: they cannot be cut from the source.
    """
    if config.params or config.fraction:
        budget = config.params or round((config.fraction or 1) * (whole or parameters(shape, Sizes.of(shape))))
        return _within(budget, shape, config.by)
    wanted = {name: getattr(config, name) or getattr(shape, name) for name in SIZES}
    for name, size in wanted.items():
        if size > getattr(shape, name):
            raise UserError(f"prune.{name} is {size}, but the source has only {getattr(shape, name)}")
    return Sizes(groups=_groups(shape, wanted["heads"]), **wanted)


def _groups(shape: Shape, heads: int) -> int:
    """How many key/value heads serve so many heads: all of them while heads are left for each, else whole groups go.

    Raises:
        UserError: so many heads cannot be shared out evenly.
    """
    shared = shape.heads // shape.groups
    if heads % shape.groups == 0:
        return shape.groups
    if heads % shared == 0:
        return heads // shared
    possible = [n for n in range(1, shape.heads + 1) if n % shape.groups == 0 or n % shared == 0]
    raise UserError(f"{heads} heads cannot be shared by the source's key/value heads: take one of {possible}")


def _within(budget: int, shape: Shape, by: str) -> Sizes:
    """The largest sizes within a budget of parameters.

    Raises:
        UserError: even the smallest are larger.
    """
    candidates = _shallower(shape) if by == "depth" else _narrower(shape)
    sizes = next((sizes for sizes in candidates if parameters(shape, sizes) <= budget), None)
    if sizes is None:
        least = min(parameters(shape, sizes) for sizes in (_shallower(shape) if by == "depth" else _narrower(shape)))
        other = ", which leaves the embedding whole: cut by width" if by == "depth" else ""
        raise UserError(f"{budget:,} parameters are too few: by {by}, {least:,} are the least{other}")
    return sizes


def _shallower(shape: Shape) -> Iterator[Sizes]:
    return (replace(Sizes.of(shape), layers=layers) for layers in range(shape.layers, 0, -1))


def _narrower(shape: Shape) -> Iterator[Sizes]:
    """Width, heads and neurons by about the same factor, from all to next to nothing."""
    shared = shape.heads // shape.groups
    heads = [n for n in range(1, shape.heads + 1) if n % shape.groups == 0 or n % shared == 0]
    for step in range(STEPS, 0, -1):
        share = step / STEPS
        some = max((n for n in heads if n <= share * shape.heads + 0.5), default=heads[0])
        yield Sizes(
            width=_rounded(share, shape.width),
            heads=some,
            groups=_groups(shape, some),
            mlp=_rounded(share, shape.mlp),
            layers=shape.layers,
        )


def _rounded(share: float, size: int) -> int:
    return size if share == 1 else min(size, max(MULTIPLE, MULTIPLE * round(share * size / MULTIPLE)))
