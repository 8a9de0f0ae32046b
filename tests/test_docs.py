"""The README and docs/ are true: the task is a task, files exist, options and keys are the command's."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml

from benchmarks.tables import filled
from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from pipeline.task.task import Task
from tests import settings_page
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_its_task_is_a_task() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    assert Task.model_validate(yaml.safe_load(blocks[0])).outputs == 6


def test_it_is_short() -> None:
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"]({page.name})" not in index] == ["README.md"]


def test_its_options_are_the_commands() -> None:
    known = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    lines = re.findall(r"(?:retort|pipeline\.cli) run (.*?)(?:\n\n|```)", README, re.DOTALL)
    used = {option for line in lines for option in re.findall(r"(--[a-z-]+)", line)}
    assert used
    assert used <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_are_configuration_keys(page: Path) -> None:
    if page.stem != "log":  # which tells of settings that are gone
        load_config(None, re.findall(r"--set '?([a-z_]+\.[a-z_.]+=[A-Za-z0-9\[\],.-]*[A-Za-z0-9\]])", page.read_text()), {})


def test_the_page_of_settings_has_all_of_them() -> None:
    """`python -m tests.settings_page` writes it anew."""
    assert settings_page.PAGE.read_text() == settings_page.render()


def test_its_targets_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"make ([a-z-]+)", texts)) - {"sure"} <= targets | {"and", "a"}


def test_every_command_explains_itself() -> None:
    for command in main.commands.values():
        assert command.get_short_help_str()
        assert all(not isinstance(p, click.Option) or p.help or p.name in {"out", "verbose"} for p in command.params)


def test_tables_are_those_of_the_benchmarks_results() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert filled(page.read_text("utf-8")) == page.read_text("utf-8"), f"{page.name}: run `make tables`"
