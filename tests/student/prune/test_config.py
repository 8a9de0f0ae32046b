from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from student.config import PruneConfig


def test_shares_are_read_as_people_write_them() -> None:
    assert PruneConfig(fraction="1/4") == PruneConfig(fraction=0.25) == PruneConfig(fraction="0.25")
    assert PruneConfig(chain="1/2, 1/4,0.125").chain == PruneConfig(chain=["1/2", 0.25, "1/8"]).chain == (0.5, 0.25, 0.125)
    assert PruneConfig().chain == ()


@pytest.mark.parametrize("fraction", [0, "0", -0.5, "-1/2", 1.01, "5/4", "a quarter", "1/0"])
def test_a_share_is_above_none_and_at_most_all(fraction: float | str) -> None:
    with pytest.raises(ValidationError, match="fraction"):
        PruneConfig(fraction=fraction)


def test_all_is_a_share() -> None:
    assert PruneConfig(fraction=1).fraction == PruneConfig(fraction="1/1").fraction == 1


@pytest.mark.parametrize("chain", ["1/2,1/2", "1/4,1/2", "1", "1,1/2", [0.5, 0.25, 0.3]])
def test_a_chain_must_fall_from_below_all(chain: str | list[float]) -> None:
    with pytest.raises(ValidationError, match="must fall"):
        PruneConfig(chain=chain)


@pytest.mark.parametrize("chain", ["", "1/2,", "1/2,0", "3/2,1/2", "1/2;1/4"])
def test_a_link_must_be_a_share(chain: str) -> None:
    with pytest.raises(ValidationError, match="chain"):
        PruneConfig(chain=chain)


TARGETS: list[dict[str, Any]] = [
    {"width": 8},
    {"heads": 2},
    {"layers": 1},
    {"params": 100},
    {"fraction": 0.5},
    {"chain": "1/2"},
]


@pytest.mark.parametrize("target", TARGETS)
def test_one_target_alone(target: dict[str, Any]) -> None:
    sizes = {"width", "heads", "mlp", "layers"}
    PruneConfig(**target)
    for other in TARGETS:
        if target != other and not (set(target) | set(other)) <= sizes:
            with pytest.raises(ValidationError, match="give either sizes"):
                PruneConfig(**target, **other)


def test_several_sizes_are_one_target() -> None:
    config = PruneConfig(width=8, heads=2, mlp=16, layers=1)
    assert (config.width, config.heads, config.mlp, config.layers) == (8, 2, 16, 1)


@pytest.mark.parametrize(
    "changes",
    [{"widht": 8}, {"by": "both"}] + [{name: 0} for name in ("width", "heads", "mlp", "layers", "params", "examples")],
)
def test_unknown_keys_and_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        PruneConfig(**changes)


def test_the_recipe_holds_what_changes_the_units_kept_alone() -> None:
    base = PruneConfig(source="a", fraction="1/4")
    assert base.recipe() == PruneConfig(source="b", fraction=0.25).recipe()
    for changes in (
        {"fraction": 0.5},
        {"examples": 7},
        {"by": "depth"},
    ):
        assert base.recipe() != base.model_copy(update=changes).recipe()
