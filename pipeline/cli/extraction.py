"""The commands of `pipeline`: from texts to logit shards."""

from __future__ import annotations

from typing import Any

import click

from pipeline.base import storage
from pipeline.base.console import console, say, set_up_logging
from pipeline.cli.options import configure, planned_shape, setting, stage_options, writable


@click.command()
@stage_options("max_cost", "max_calls", "task", "teacher", "comments", "limit")
def extract(**options: Any) -> None:
    """Texts through the teacher to logit shards, in OUT/shards.

    A teacher behind an OpenAI-compatible API is asked by chat completions, with the likeliest other tokens where it lists
    them. The key comes from $OPENAI_API_KEY. What was answered is kept: the same command goes on after a crash.

    \b
      retort extract ... --teacher google/gemma-3-4b-it
      retort extract ... --teacher gpt-4o-mini --set teacher.engine=openai --set teacher.url=https://api.openai.com/v1
          --max-cost 20 --set teacher.input_price=PRICE --set teacher.output_price=PRICE     of a million tokens
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.extract.stage import make_shards

    config, out = configure(**options)
    planned_shape(config)
    manifest = make_shards(config)
    size = f"{manifest.rows:,} answers, {manifest.bytes / 1e6:,.1f} MB"
    say(f"{size}, in {storage.join(out, 'shards')}")


@click.command()
@setting(
    "comments.answer",
    "--answers",
    default="answer",
    show_default=True,
    metavar="COLUMNS",
    help="One with all of it, or one a field: a,b.",
)
@stage_options("task", "teacher", "comments", "limit")
def score(**options: Any) -> None:
    """The teacher's logits along given answers, in OUT/shards.

    The files hold an answer beside each text: labels of people, answers of another model, or a student's own.
    A column holds the whole answer, as a JSON object or as its text, or each field has a column of its name:

    \b
      retort score --task task.yaml --comments answered.jsonl --out runs/first
      retort score --task task.yaml --comments labels.csv --answers domain,intent --out runs/labels

    A row whose answer does not fit the task is set aside. Train on the shards as on any; where the answers are not the
    teacher's, its probabilities say little: `retort import` takes the answers alone, and needs no teacher.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.extract.extract import extract as stage

    config, out = configure(**options)
    planned_shape(config)
    manifest = stage(config)
    size = f"{manifest.rows:,} answers scored, {manifest.bytes / 1e6:,.1f} MB"
    say(f"{size}, in {storage.join(out, 'shards')}")


@click.command("import")
@setting("comments.answer", "--answers", required=True, metavar="COLUMNS", help="One with all of it, or one a field: a,b.")
@setting("comments.probabilities", "--probabilities", metavar="COLUMN", help="How likely values were, as JSON by field.")
@stage_options("task", "comments", "limit")
def import_answers(**options: Any) -> None:
    """Answers you have already, to shards, in OUT/shards. No model runs.

    A log of calls, labels of people, another model's answers. A column holds the whole answer, as a JSON object or as its
    text, or each field has a column of its name:

    \b
      retort import --task task.yaml --comments log.jsonl --answers answer --out runs/log
      retort import --task task.yaml --comments labels.csv --answers domain,intent --out runs/labels

    A row whose answer does not fit the task is set aside. Several rows of one text are votes: the share of each answer
    is how likely it is. With --probabilities, a column says more: {"team": {"billing": 0.8, "sales": 0.2}}.

    `retort run --answers COLUMNS` imports, trains and evaluates.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.extract.given import import_answers as stage

    config, out = configure(**options)
    planned_shape(config)
    manifest = stage(config)
    say(f"{manifest.rows:,} texts with answers, {manifest.bytes / 1e6:,.1f} MB, in {storage.join(out, 'shards')}")


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="SHARDS SHARDS …")
@click.option("--weights", metavar="NUMBERS", help="Of the folders in their order, as 2,1; by default all alike.")
@click.option("--keep-missing", is_flag=True, help="Keep texts that only some folders have.")
@click.option("--out", required=True, metavar="DIR", help="The run's folder; the merged shards go to OUT/shards.")
def merge(folders: tuple[str, ...], weights: str | None, keep_missing: bool, out: str) -> None:
    """Several teachers' shards of one task as one, in OUT/shards: the mean of their probabilities.

    The teachers may have different tokenizers; one of them may be a log of people's answers.

    \b
      retort merge runs/small/shards runs/large/shards --weights 1,3 --out runs/both
      retort train --out runs/both
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.shards.merge import merge as stage

    set_up_logging(verbose=False)
    try:
        numbers = [float(number) for number in weights.split(",")] if weights else []
    except ValueError:
        raise click.BadParameter(f"{weights!r} is no list of numbers, as 2,1", param_hint="--weights") from None
    place = storage.join(writable(storage.absolute(out)), "shards")
    manifest = stage([storage.absolute(folder) for folder in folders], numbers, keep_missing, place)
    say(f"{manifest.rows:,} answers in {place}")


@click.command()
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR")
@click.option("--verbose", is_flag=True)
def demo(out: str, verbose: bool) -> None:
    """Made-up comments and a small teacher fitted on them, to try Retort without a download."""
    from pipeline.demo.build import build_demo

    set_up_logging(verbose)
    writable(out)
    comments, teacher = build_demo(out)
    console.print(f"comments in {comments}, teacher in {teacher}", highlight=False)


@click.group()
def jsonl() -> None:
    """Logit shards as JSON lines, 128 examples a file, for programs that read nothing else."""


@jsonl.command("export")
@click.argument("shards", metavar="SHARDS")
@click.argument("folder", metavar="FOLDER")
def export_jsonl(shards: str, folder: str) -> None:
    """Writes every example of SHARDS to FOLDER, with its raw logits as decimal numbers."""
    from pipeline.shards.jsonl import export

    set_up_logging(verbose=False)
    console.print(f"{export(shards, writable(folder)):,} files in {folder}", highlight=False)


@jsonl.command("import")
@click.argument("folder", metavar="FOLDER")
@click.argument("shards", metavar="SHARDS")
def import_jsonl(folder: str, shards: str) -> None:
    """Writes the examples of FOLDER, as `export` leaves it, as SHARDS to train on."""
    from pipeline.shards.jsonl import import_

    set_up_logging(verbose=False)
    console.print(f"{import_(folder, writable(shards)).rows:,} examples in {shards}", highlight=False)
