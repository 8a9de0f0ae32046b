from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from student.config import StudentConfig
from tune.search.space import configure, distributions, read_space

SHAPE = StudentConfig(layers=2, width=128, heads=4, mlp=512)


def write(folder: Path, text: str) -> str:
    (folder / "space.yaml").write_text(text)
    return str(folder / "space.yaml")


def test_lists_and_ranges_become_distributions_of_the_keys_type(tmp_path: Path) -> None:
    text = """
    student.layers: {low: 1, high: 7, step: 2}
    student.width: [64, 128]
    student.dropout: {low: 0, high: 0.3}
    train.learning_rate: {low: 1e-4, high: 1.0e-2, log: true}
    train.objective: [curriculum, topk]
    """
    assert distributions(read_space(write(tmp_path, text))) == {
        "student.layers": IntDistribution(1, 7, step=2),
        "student.width": CategoricalDistribution([64, 128]),
        "student.dropout": FloatDistribution(0, 0.3),
        "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "train.objective": CategoricalDistribution(["curriculum", "topk"]),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("student.depth: [1]", r"student\.depth: no such key; a space may have .*student\.layers"),
        ("train.workers: [1, 2]", r"train\.workers: no such key"),
        ("train.epochs: [1, 2]", r"train\.epochs: no such key"),
        ("student.layers: []", r"student\.layers: no values"),
        ("student.layers: {low: 3, high: 1}", "from low to high"),
        ("train.learning_rate: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("train.learning_rate: {low: 0.1, high: 1, log: true, step: 0.1}", "not both"),
        ("student.layers: {least: 1, high: 2}", "least"),
        ("{student.heads: [4], student.head_width: [32]}", "say the same"),
    ],
)
def test_what_is_no_space_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_space(write(tmp_path, text))


def test_a_point_changes_the_configuration_and_leaves_the_rest() -> None:
    base = ClusterSettings.model_validate({"train": {"epochs": 3, "batch_size": 16}, "student": {"dropout": 0.1}})
    point = {"student.width": 192, "student.head_width": 64, "student.mlp_ratio": 2, "train.batch_size": 64}
    found = configure(base, SHAPE, point)
    assert found.student.model_dump(exclude_none=True) == {"width": 192, "heads": 3, "mlp": 384, "dropout": 0.1}
    assert (found.train.epochs, found.train.batch_size) == (3, 64)
    assert configure(base, SHAPE, {"student.mlp_ratio": 3}).student.mlp == 3 * 128
    with pytest.raises(UserError, match="multiple of 2 × heads"):
        configure(base, SHAPE, {"student.width": 100})


def test_the_default_space_holds_students_alone() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, space = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), distributions(read_space(None))
    for _ in range(200):
        configure(ClusterSettings(), SHAPE, study.ask(space).params)
