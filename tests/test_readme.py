"""The README is true: its task is a task, its files exist, its options and keys are the command's."""

from __future__ import annotations

import re

import click
import yaml

from pipeline.cli.main import main
from pipeline.cli.settings import load_config
from pipeline.task.task import Task
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()


def test_its_task_is_a_task() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    assert Task.model_validate(yaml.safe_load(blocks[0])).outputs == 6


def test_its_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_options_are_the_commands() -> None:
    known = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    lines = re.findall(r"(?:retort|pipeline\.cli) run (.*?)(?:\n\n|```)", README, re.DOTALL)
    used = {option for line in lines for option in re.findall(r"(--[a-z-]+)", line)}
    assert used
    assert used <= known


def test_its_settings_are_configuration_keys() -> None:
    overrides = re.findall(r"--set ([a-z_.]+=[A-Za-z0-9]+)", README)
    assert len(overrides) > 5
    load_config(None, overrides, {})


def test_its_targets_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"make ([a-z-]+)", texts)) - {"sure"} <= targets | {"and", "a"}


def test_every_command_explains_itself() -> None:
    for command in main.commands.values():
        assert command.get_short_help_str()
        assert all(not isinstance(p, click.Option) or p.help or p.name in {"out", "verbose"} for p in command.params)
