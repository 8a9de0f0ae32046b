"""The `retort` command: its stages, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click

from pipeline.base.console import console
from pipeline.base.errors import UserError, clip
from pipeline.base.signals import STOPPED, Stopped
from pipeline.cli import clusters, extraction, search, students, tasks

# Each stage imports what it runs on when it is asked for: `retort --help` answers at once, and a student's machine
# needs no vLLM.

log = logging.getLogger(__name__)


class _Group(click.Group):
    """Prints a user's errors as one message and no traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses what is not UTF-8: no file of Retort's could hold it."""
        for text in args:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise click.UsageError(f"{clip(text)!a} is not UTF-8", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            console.print(str(stopped), highlight=False, soft_wrap=True)
            sys.exit(STOPPED)
        except (UserError, OSError) as error:
            log.debug("where it was raised", exc_info=True)
            console.print(f"[red]error:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _plain(error: UserError | OSError) -> str:
    """The message alone: Ray puts the worker's traceback before what a worker raised."""
    cause = getattr(error, "cause", None)
    return str(cause or error).replace("[", "\\[")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="retort")
def main() -> None:
    """Distil one narrow job of a large language model into a small model of its own.

    \b
      retort run --task tasks/goemotions.yaml --teacher MODEL --comments FILES --out DIR

    does all of it: it asks the teacher about the texts and keeps its logits (extract), trains a student on them
    (train), and reports how closely it follows (evaluate). Each stage also runs alone, on the files of the one before,
    and what is already done is not done again.

    A task is one YAML file: the instruction, the output fields with their values, and which texts take part. Copy one
    under tasks/ to write your own, or have it made from a JSON Schema (task).
    """  # noqa: D301 (\b is click's mark, as a character)
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP's threads spin 300,000 times when they wait for each other. Beside other programs on the same cores they do
        # hardly anything else: a training took 5 to 60 times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # Ray's, as a job's driver reserves no CPU; but a few texts are answered in it


for _command in (
    *(tasks.task, students.run, extraction.extract, extraction.import_answers, extraction.score, extraction.merge),
    *(students.train, students.evaluate, students.prune),
    *(search.tune, search.grow, search.select, search.compare, search.scale, clusters.plan, clusters.submit),
    *(students.predict, students.serve, students.export, extraction.jsonl, extraction.demo),
):
    main.add_command(_command)
