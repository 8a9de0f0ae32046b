"""Each family of sources, and its examples."""

from __future__ import annotations

import pytest

from pipeline.shards.manifest import Shards
from pipeline.task.compiled import CompiledTask
from student.data.examples import Examples
from student.model.model import Student
from tests.student.prune.students import FAMILIES, examples_of, make


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def source(compiled: CompiledTask, family: str) -> Student:
    """Shared by tests, so none may change it."""
    return make(compiled, family)


@pytest.fixture(scope="session")
def examples(shards: Shards, source: Student) -> Examples:
    return examples_of(shards, source)
