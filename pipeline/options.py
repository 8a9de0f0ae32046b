"""Options that the stages of the `retort` command share, and the configuration they make."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from pipeline import storage
from pipeline.config import RunConfig, load_config
from pipeline.console import set_up_logging
from pipeline.errors import UserError, clip

Command = Callable[..., None]


def stage_options(*names: str) -> Callable[[Command], Command]:
    """The shared options of these names, and those every stage takes."""
    known = {
        "task": click.option("--task", metavar="YAML", help="The task, such as tasks/goemotions.yaml."),
        "teacher": click.option("--teacher", metavar="MODEL", help="Hugging Face name or path; by default the task's."),
        "comments": click.option(
            "--comments", multiple=True, metavar="PATH", help="File, folder, glob or URI of comments; may be repeated."
        ),
        "limit": click.option("--limit", type=click.IntRange(1), help="Stop after so many comments that pass the filters."),
        "out": click.option("--out", metavar="DIR", help="The run's folder; each stage has its own folder inside."),
        "config": click.option("--config", metavar="YAML", help="A file with any of the configuration's keys."),
        "set": click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key: --set student.layers=4."
        ),
        "verbose": click.option("--verbose", is_flag=True, help="Show the workers' own log lines too."),
    }

    def decorate(command: Command) -> Command:
        for name in reversed([*names, "out", "config", "set", "verbose"]):
            command = known[name](command)
        return command

    return decorate


KEYS = {
    "task": "task",
    "teacher": "teacher.model",
    "comments": "comments.paths",
    "limit": "comments.limit",
    "out": "out",
    "init": "train.init",
    "source": "prune.source",
    "prune_params": "prune.params",
    "fraction": "prune.fraction",
    "chain": "prune.chain",
    "answers_format": "predict.format",
    "probabilities": "predict.probabilities",
    "predict_workers": "predict.workers",
    "predict_teacher": "predict.teacher",
    "predict_fallback": "predict.fallback",
    "host": "serve.host",
    "port": "serve.port",
    "serve_teacher": "serve.teacher",
    "serve_fallback": "serve.fallback",
    "space": "tune.space",
    "trials": "tune.trials",
    "max_params": "tune.max_params",
    "max_latency_ms": "tune.max_latency_ms",
    "workers": "scale.workers",
    "stage": "scale.stage",
    "price_per_hour": "scale.price_per_hour",
    "comments_count": "plan.comments",
    "teacher_params": "plan.teacher_params",
    "teacher_machine": "plan.teacher_machine",
    "student_machine": "plan.student_machine",
    "plan_workers": "plan.workers",
    "scale": "plan.scale",
    "prices": "plan.prices",
}  # of the configuration, by option


def read_settings(overrides: tuple[str, ...], config: str | None = None, verbose: bool = False, **given: Any) -> RunConfig:
    """The configuration; sets up logging."""
    set_up_logging(verbose)
    keys = {KEYS[name]: list(value) if isinstance(value, tuple) else value for name, value in given.items() if _says(value)}
    return load_config(config, list(overrides), keys)


def run_folder(settings: RunConfig) -> str:
    """The run's folder, as an absolute path or a URI.

    Raises:
        UserError: none is named.
    """
    if settings.out is None:
        raise UserError("no folder given: say where the run lives with --out")
    return storage.absolute(settings.out)


def configure(**options: Any) -> tuple[RunConfig, str]:
    """The configuration and the run's folder, which can be written to as far as can be told; sets up logging."""
    settings = read_settings(**options)
    return settings, writable(run_folder(settings))


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
