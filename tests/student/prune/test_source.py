from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.shards.manifest import Shards
from student.config import PruneConfig
from student.model.checkpoint import save_student
from student.prune.source import open_source
from tests.student.decode.test_decode import make_student, recompiled
from tests.tiny import save_teacher, tiny_task, tiny_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Gemma 3 model with the shards' tokenizer."""
    save_teacher(tmp_path / "model", seed=0)
    return tmp_path / "model"


def test_a_source_is_known_by_its_weights(shards: Shards, model: Path) -> None:
    student = model.parent / "student"
    identities = []
    for seed in (0, 0, 1):
        save_teacher(model, seed)
        save_student(str(student), make_student(shards.compiled, seed), shards.compiled)
        sources = (open_source(PruneConfig(source=str(place)), "full", shards) for place in (model, student))
        identities.append([source.identity for source in sources])
    first, same, other = identities
    assert first == same
    assert all(one != two for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("prompt", ["teacher", "bare"])
def test_a_model_with_another_tokenizer_is_refused(shards: Shards, model: Path, prompt: str) -> None:
    tiny_tokenizer(280).save_pretrained(model)
    with pytest.raises(UserError, match=r"model does not fit the shards: another tokenizer \("):
        open_source(PruneConfig.model_validate({"source": str(model), "prompt": prompt}), "full", shards)


def test_a_student_of_another_task_is_refused(shards: Shards, tmp_path: Path) -> None:
    other = recompiled(shards.compiled, tiny_task(instruction="Judge otherwise."))
    save_student(str(tmp_path), make_student(other), other)
    with pytest.raises(UserError, match=r"does not fit .*: another task \("):
        open_source(PruneConfig(source=str(tmp_path)), "full", shards)


def test_nothing_to_cut_from_is_refused(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a student's folder, or a Gemma 3 model, with --from"):
        open_source(PruneConfig(), "full", shards)
    with pytest.raises(UserError, match="is not a model"):
        open_source(PruneConfig(source=str(tmp_path)), "full", shards)
