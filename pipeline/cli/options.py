"""Options that the stages of the `retort` command share, and the configuration they make."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from pipeline.base import storage
from pipeline.base.console import set_up_logging
from pipeline.base.errors import UserError, clip
from pipeline.cli.settings import PRESETS, load_config
from pipeline.task.task_file import load_task

if TYPE_CHECKING:
    from cluster.config import ClusterSettings
    from student.config import StudentConfig

Command = Callable[..., None]
TOP = ("task", "out")  # keys of the configuration that are in no section


def setting(key: str, flag: str, **about: Any) -> Callable[[Command], Command]:
    """An option of a command that sets a key of the configuration, such as `tune.trials`."""
    return click.option(flag, key.replace(".", "__"), **about)


SHARE = click.FloatRange(0, 1)
AGREE = setting(
    "answer.agree", "--agree", type=SHARE, help="Share of the student's own answers to be the teacher's, certified."
)
UNFAMILIAR = setting(
    "answer.unfamiliar", "--unfamiliar", type=SHARE, help="Share of familiar texts to give the teacher, to catch strange ones."
)
AGREE_FIELDS = setting("answer.agree_fields", "--agree-fields", metavar="FIELD=SHARE,...", help="The same of single fields.")


def is_setting(name: str) -> bool:
    """Whether a command's parameter is one of those options."""
    return "__" in name or name in TOP


def stage_options(*names: str) -> Callable[[Command], Command]:
    """The shared options of these names, and those every stage takes."""
    known: dict[str, Callable[[Command], Command]] = {
        "task": setting("task", "--task", metavar="YAML", help="The task, such as tasks/goemotions.yaml."),
        "teacher": setting(
            "teacher.model", "--teacher", metavar="MODEL", help="Hugging Face name or path; by default the task's."
        ),
        "comments": setting(
            "comments.paths",
            "--comments",
            multiple=True,
            metavar="PATH",
            help="File, folder, glob or URI of texts; may be repeated.",
        ),
        "limit": setting(
            "comments.limit", "--limit", type=click.IntRange(1), help="Stop after so many texts that pass the filters."
        ),
        "max_cost": setting(
            "teacher.max_cost", "--max-cost", type=float, metavar="MONEY", help="To spend on an API at most, by its prices."
        ),
        "max_calls": setting("teacher.max_calls", "--max-calls", type=click.IntRange(1), help="Of an API, at most."),
        "out": setting("out", "--out", metavar="DIR", help="The run's folder; each stage has its own folder inside."),
        "config": click.option("--config", metavar="YAML", help="A file with any of the configuration's keys."),
        "preset": click.option(
            "--preset",
            type=click.Choice(sorted(path.stem for path in PRESETS.glob("*.yaml"))),
            help="A known recipe to start from; thesis: KL and labels from 0.8 : 0.2 to 0.2 : 0.8, on whole answers.",
        ),
        "set": click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key: --set student.layers=4."
        ),
        "verbose": click.option("--verbose", is_flag=True, help="Show the workers' own log lines too."),
    }

    def decorate(command: Command) -> Command:
        for name in reversed([*names, "out", "preset", "config", "set", "verbose"]):
            command = known[name](command)
        return command

    return decorate


def read_settings(
    overrides: tuple[str, ...], config: str | None = None, preset: str | None = None, verbose: bool = False, **given: Any
) -> ClusterSettings:
    """The configuration; sets up logging."""
    set_up_logging(verbose)
    keys = {
        name.replace("__", "."): list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if _says(value)
    }
    return load_config(config, list(overrides), keys, preset)


def run_folder(settings: ClusterSettings) -> str:
    """The run's folder, as an absolute path or a URI.

    Raises:
        UserError: none is named.
    """
    if settings.out is None:
        raise UserError("no folder given: say where the run lives with --out")
    return storage.absolute(settings.out)


def configure(**options: Any) -> tuple[ClusterSettings, str]:
    """The configuration and the run's folder, which can be written to as far as can be told; sets up logging."""
    settings = read_settings(**options)
    return settings, writable(run_folder(settings))


def planned_shape(settings: ClusterSettings) -> StudentConfig | None:
    """The student's shape; None without a task.

    Raises:
        UserError: there is no such task or shape: better refused now than after the extraction.
    """
    from student.config import student_shape

    return student_shape(load_task(settings.task), settings.student) if settings.task else None


def writable(folder: str) -> str:
    """The absolute path or URI of a folder, there or yet to be made; on a disk it is tried whether it can be written to.

    Raises:
        UserError: it cannot.
    """
    place = storage.absolute(folder)
    if storage.is_uri(place):
        return place
    nearest = place
    try:
        with suppress(FileNotFoundError):
            os.stat(place)  # finds names that are too long, and files where folders should be
        while not os.path.lexists(nearest):
            nearest = os.path.dirname(nearest)
        tempfile.TemporaryFile(dir=nearest).close()
    except (OSError, ValueError) as error:  # ValueError for a name with NUL in it
        reason = f"{nearest} is a file" if os.path.isfile(nearest) else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to the folder {clip(folder)}: {clip(str(reason))}") from error
    return place


def _says(value: Any) -> bool:
    """Whether an option was given, if only as 0."""
    return value not in (None, (), "") and value is not False


def folder_of(given: str | None, out: str | None, name: str) -> str:
    """A stage's folder: as given, else within the run's; absolute, as workers have other working directories.

    Raises:
        UserError: neither is named.
    """
    if given is None and out is None:
        raise UserError(f"no {name} given: name its folder (--{name}), or the run's (--out)")
    return storage.absolute(given or storage.join(str(out), name))
