from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import ClusterSettings
from pipeline.base.errors import UserError
from pipeline.cli.settings import load_config


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_without_anything_all_is_default() -> None:
    assert load_config(None, [], {}) == ClusterSettings()


def test_the_file_then_overrides_then_options(tmp_path: Path) -> None:
    path = write(tmp_path, "task: a\nteacher: {actors: 2, engine: transformers}\ncomments: {limit: 5}\n")
    config = load_config(path, ["teacher.actors=3", "comments.limit=6"], {"comments.limit": 7, "out": "runs/x"})
    assert (config.task, config.out) == ("a", "runs/x")
    assert (config.teacher.actors, config.teacher.engine) == (3, "transformers")
    assert config.comments.limit == 7


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.growth=[0.8, 0.9]", "train", "growth", (0.8, 0.9)),
        ("teacher.threads=null", "teacher", "threads", None),
        ("teacher.threads=", "teacher", "threads", None),
        ("teacher.revision=a=b", "teacher", "revision", "a=b"),
        ("teacher.revision='1'", "teacher", "revision", "1"),
        ("comments.paths=[a.jsonl, 's3://b/*.csv']", "comments", "paths", ["a.jsonl", "s3://b/*.csv"]),
        ("teacher={actors: 4}", "teacher", "actors", 4),
    ],
)
def test_overrides_are_yaml(override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_config(None, [override], {}), section), key) == value


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("unknown=1", "unknown: unknown key"),
        ("teacher.unknown=1", "teacher.unknown: unknown key"),
        ("train.unknown.deeper=1", "train.unknown: unknown key"),
        ("teacher.actors=many", "teacher.actors: .*integer"),
        ("teacher.actors=0", "teacher.actors: .*greater than or equal to 1"),
        ("teacher.actors=1.5", "teacher.actors: .*integer"),
        ("teacher.engine=other", "teacher.engine: .*'vllm', 'transformers' or 'openai'"),
        ("teacher=big", "teacher: "),
        ("comments.paths=a.jsonl", "comments.paths: .*list"),
        ("comments.text=1", "comments.text: .*string"),
        ("extract.calibration_floor=2", "extract.calibration_floor: "),
        ("train.objective=magic", "train.objective: "),
        ("train.workers=[1, 2]", "whole number of cpus_per_worker"),
        ("train.workers=0", "workers takes a count from 1"),
        ("train.growth=[0.5, 2]", "shares of the examples"),
        ("task=1", "task: .*string"),
        ("no-equals", "--set takes key.path=value, not 'no-equals'"),
        ("=1", "--set takes key.path=value, not '=1'"),
        ("teacher.actors=[1", r"--set teacher.actors=\[1 is not YAML"),
        ("teacher.actors=\x00", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(None, [override], {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("techer: {actors: 1}\n", "techer: unknown key"),
        ("teacher: {actor: 1}\n", "teacher.actor: unknown key"),
        ("teacher: {actors: 1}\nteacher: {actors: 2}\n", "teacher written twice"),
        ("teacher: 1\n", "teacher: "),
        ("- a\n", "must hold a YAML mapping, found a list"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(write(tmp_path, text), [], {})


def test_every_finding_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["teacher.actors=0", "train.epochs=x", "other=1"], {})
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "teacher.actors",
        "train.epochs",
        "other",
    ]


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.name: task holds a value, not keys"):
        load_config(write(tmp_path, "task: a.yaml\n"), ["task.name=x"], {})


def test_an_override_below_an_empty_section_is_taken(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "teacher:\n"), ["teacher.actors=2"], {}).teacher.actors == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file at .*absent\.yaml"):
        load_config(str(tmp_path / "absent.yaml"), [], {})


def test_nothing_changes_after_reading() -> None:
    with pytest.raises(ValidationError):
        ClusterSettings().teacher.actors = 2  # type: ignore[misc]


def test_a_preset_lies_under_the_file_and_the_overrides(tmp_path: Path) -> None:
    thesis = load_config(None, [], {}, "thesis")
    weights = (thesis.train.kl_start, thesis.train.kl_end, thesis.train.ce_start, thesis.train.ce_end)
    assert (weights, thesis.train.weights, thesis.student.sequence) == ((0.8, 0.2, 0.2, 0.8), "linear", "full")
    path = write(tmp_path, "train: {kl_start: 0.7, epochs: 3}\n")
    changed = load_config(path, ["train.epochs=4"], {}, "thesis").train
    assert (changed.kl_start, changed.kl_end, changed.epochs) == (0.7, 0.2, 4)
