"""The rule of imports: each package imports those before it, only the command's room looks up, and no folders go in circles."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("pipeline", "student", "tune", "cluster")
OWN = {"answer"}  # modules that an export brings along
COMMAND = "pipeline.cli"  # the room of the `retort` command


@dataclass(frozen=True)
class Arrow:
    """One module's import of another.

    Attributes:
        source: the importing module.
        target: what it imports.
        lazy: whether only when a function runs, or for type checkers.
    """

    source: str
    target: str
    lazy: bool

    @property
    def is_upward(self) -> bool:
        return rank(self.source) < rank(self.target)

    @property
    def is_allowed(self) -> bool:
        return not self.is_upward or (self.lazy and room(self.source) == COMMAND)


def rank(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


def room(module: str) -> str:
    """The folder that a module lies in."""
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def arrows(module: str, code: str) -> Iterator[Arrow]:
    """A module's imports of the four packages."""
    tree = ast.parse(code)
    eager = {id(statement) for statement in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else str(node.module) for name in whole]
        yield from (Arrow(module, name, id(node) not in eager) for name in names if name.partition(".")[0] in ORDER)


def modules() -> Iterator[tuple[str, str]]:
    """Every module of the four packages, with its code."""
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path.read_text()


@pytest.fixture(scope="module")
def found() -> list[Arrow]:
    return [arrow for name, code in modules() for arrow in arrows(name, code)]


def test_no_module_imports_what_comes_after_it(found: list[Arrow]) -> None:
    assert len(found) > 500
    assert [arrow for arrow in found if not arrow.is_allowed] == []


def test_no_folders_import_each_other_in_a_circle(found: list[Arrow]) -> None:
    graph: dict[str, set[str]] = {}
    for arrow in found:
        here, there = room(arrow.source), room(arrow.target)
        if here != there and here != COMMAND:
            graph.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"folders import each other in a circle: {' imports '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize(
    ("module", "code", "allowed"),
    [
        ("student.model.model", "from pipeline.base import storage", True),
        ("student.model.model", "from tune.search import trial", False),
        ("pipeline.base.storage", "def f():\n    from student.model.model import Student", False),
        ("pipeline.cli.students", "def f():\n    from student.model.model import Student", True),
        ("pipeline.cli.students", "from student.model.model import Student", False),
    ],
)
def test_the_rule_tells_right_from_wrong(module: str, code: str, allowed: bool) -> None:
    assert [arrow.is_allowed for arrow in arrows(module, code)] == [allowed]


def declared() -> set[str]:
    """The distributions that pyproject.toml names, as the package index spells them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return {canonicalize_name(Requirement(one).name) for one in wanted}


def test_every_package_imported_is_declared() -> None:
    known, providers = declared(), packages_distributions()
    for folder in (*ORDER, "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for name in {name.partition(".")[0] for name in names} - {
                    *ORDER,
                    "benchmarks",
                    "tests",
                    *sys.stdlib_module_names,
                }:
                    given = {canonicalize_name(one) for one in providers.get(name, [])}
                    assert name in OWN or given & known, f"{path.relative_to(ROOT)} imports {name}: declare one of {given}"


def test_every_room_says_what_is_in_it() -> None:
    assert [name for name, code in modules() if room(name) == name and not ast.get_docstring(ast.parse(code))] == []
