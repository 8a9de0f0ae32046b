"""The commands of `tune`: searches, comparisons and measurements of scaling."""

from __future__ import annotations

from typing import Any

import click

from pipeline.base import storage
from pipeline.base.console import console, say
from pipeline.cli.options import AGREE, AGREE_FIELDS, SHARE, configure, folder_of, setting, stage_options
from pipeline.cli.output import show_comparison, show_report


@click.command()
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@setting("tune.space", "--space", metavar="YAML", help="The search space; by default tune/space.yaml, a good one to copy.")
@setting("tune.trials", "--trials", type=click.IntRange(1), help="How many students to try.")
@setting(
    "tune.max_params",
    "--max-params",
    type=click.IntRange(1),
    help="The most parameters a student may have, embedding included.",
)
@setting("tune.max_latency_ms", "--max-latency-ms", type=float, help="The longest it may take for one text, where it trains.")
@click.option("--resume", is_flag=True, help="Go on with the search in OUT, under the settings it was begun with.")
@stage_options()
def tune(shards: str | None, resume: bool, **options: Any) -> None:
    """A search for the smallest student that is faithful enough, in OUT/search.

    Trains many students on the same shards, each with another depth, width and schedule; stops early those that fall
    behind; evaluates the others on test texts; and shows what there is to choose from: agreement with the teacher
    against size and speed. Every trial is a run in MLflow under the search's own, and the best one is registered there.

    \b
      retort tune --out DIR --trials 30 --max-params 5000000
      retort tune --out DIR --space my-space.yaml --set train.epochs=10 --set train.workers=4
      retort tune --out DIR --resume

    Ctrl-C saves the trials under way; --resume goes on, as it does after a crash. With more --trials it goes on further.
    """  # noqa: D301 (\b is click's mark, as a character)
    from tune.search.search import begun, search

    if resume:
        options["config"], began_on = begun(folder_of(None, storage.absolute(options["out"] or "."), "search"))
        shards = shards or began_on
    config, out = configure(**options)
    folder = folder_of(None, out, "search")
    show_comparison(search(config, folder_of(shards, out, "shards"), folder), folder)


@click.command()
@setting("grow.calls", "--calls", type=click.IntRange(1), help="Texts to ask the teacher about, at most.")
@AGREE
@AGREE_FIELDS
@setting("grow.coverage", "--coverage", type=SHARE, help="Share of texts that the student is to answer alone, by default 0.9.")
@setting("student.reader", "--reader", metavar="MODEL", help="What reads texts: own, ngrams, or a pretrained model.")
@setting("comments.answer", "--answers", metavar="COLUMNS", help="Answers you have, in place of a teacher: to try it out.")
@stage_options("max_cost", "max_calls", "task", "teacher", "comments", "limit")
def grow(**options: Any) -> None:
    """A student that chooses which of many texts its teacher is asked about, in OUT.

    Asks about some at random, trains on the answers, then draws the next ones by how unsure the student is of them; until
    validation texts say that it can answer the share --coverage of texts alone, with the share --agree of these answers as
    the teacher's, or --calls are used up. OUT/grow.html shows agreement and certified coverage against calls.

    \b
      retort grow --task triage.yaml --comments 'mails/*.jsonl.gz' --teacher MODEL --out runs/grown --calls 5000 --agree 0.95
      retort grow --task triage.yaml --comments log.csv --answers team,urgent --out runs/replay     what it would have saved

    Test texts are random ones, so what is certified holds for texts like all of these. The same command goes on with a
    loop that was killed, and with more --calls further; no answer that has come is asked for again.
    """  # noqa: D301 (\b is click's mark, as a character)
    from tune.grow.grow import PAGE
    from tune.grow.grow import grow as stage
    from tune.grow.page import sentence, table

    config, out = configure(**options)
    rounds, figures = stage(config, out)
    console.print(table(rounds))
    show_report(figures, *(storage.join(out, name) for name in ("shards", "student", "report")))
    say(f"page     {storage.join(out, PAGE)}", sentence(rounds[-1]))


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@click.option("--shards", multiple=True, metavar="DIR", help="Shards whose texts are left out. May be repeated.")
@click.option("--budget", type=click.IntRange(1), default=1000, show_default=True, help="How many texts to choose.")
@stage_options("comments", "limit")
def select(student: str | None, shards: tuple[str, ...], budget: int, **options: Any) -> None:
    """The texts that a teacher should be asked about next, in OUT/select/texts.jsonl: one step of `retort grow` by hand.

    Test and validation texts are drawn at random, the others by how unsure the student is of them:

    \b
      retort select --student runs/first/student --shards runs/first/shards --comments 'mails/*.jsonl.gz' --out runs/next
      retort extract --task triage.yaml --comments runs/next/select/texts.jsonl --teacher MODEL --out runs/next
      retort train --shards runs/first/shards --shards runs/next/shards --out runs/both
    """  # noqa: D301 (\b is click's mark, as a character)
    from tune.grow.grow import TEXTS
    from tune.grow.grow import select as stage

    config, out = configure(**options)
    folder = storage.join(out, "select")
    chosen = stage(config, folder_of(student, out, "student"), budget, [storage.absolute(name) for name in shards], folder)
    say(f"{chosen:,} texts in {storage.join(folder, TEXTS)}")


@click.command()
@click.option("--uri", metavar="URI", help="The MLflow store; by default tracking.uri, else OUT/mlflow.db.")
@click.option("--experiment", metavar="NAME", help="The experiment in it; by default tracking.experiment.")
@click.option("--search", metavar="RUN", help="Id or name of a search's run: compare its trials alone.")
@click.option("--by", multiple=True, metavar="KEY", help="A param to name students by, as objective; may be repeated.")
@stage_options()
def compare(uri: str | None, experiment: str | None, search: str | None, by: tuple[str, ...], **options: Any) -> None:
    """Students side by side, from their runs in MLflow, in OUT/compare.

    \b
      retort compare --out runs/first
      retort compare --out runs/all --uri http://mlflow:5000 --experiment goemotions --by objective --by layers

    The table and the page show how closely each student follows the teacher, how large and how fast it is, and which are on
    the Pareto front: no other is as small and as faithful. Runs that differ in nothing but train.seed are one student, with
    the spread over its seeds; train with other seeds before believing a small difference.

    Students are named by what they differ in; --by names other params, in full or by their last part.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.base.tracking import tracking_uri
    from tune.compare.page import compare_runs

    config, out = configure(**options)
    store, folder = tracking_uri(uri or config.tracking.uri, out), storage.join(out, "compare")
    comparison = compare_runs(store, experiment or config.tracking.experiment, folder, search, by)
    show_comparison(comparison, folder)


@click.command()
@setting(
    "scale.workers",
    "--workers",
    multiple=True,
    type=click.IntRange(1),
    help="A count to measure; by default 1, 2, 4, … with room.",
)
@setting("scale.stage", "--stage", type=click.Choice(["extract", "train", "both"]), help="What to measure; by default both.")
@click.option("--shards", metavar="DIR", help="Folder of logit shards to train on; by default OUT/shards.")
@setting(
    "scale.price_per_hour",
    "--price-per-hour",
    type=float,
    metavar="PRICE",
    help="Of one worker's share of a machine, for the cost.",
)
@stage_options("task", "teacher", "comments")
def scale(shards: str | None, **options: Any) -> None:
    """Throughput with 1, 2, 4, … workers, and what a cluster would add, in OUT/scale.

    \b
      retort scale --config run.yaml --out runs/first
      retort scale --config run.yaml --out runs/first --stage train --workers 8 --workers 16 --price-per-hour 2.5

    Runs short extractions and trainings for each count. A model fitted to them says what 8, 64 and 512 workers would do,
    where that stops being linear, and why; the page tells what was measured from what is assumed. Run it where the work is
    to be done. What is already measured is not measured again.
    """  # noqa: D301 (\b is click's mark, as a character)
    from tune.scaling.measure import PAGE, measure_scaling
    from tune.scaling.page import notes, tables

    config, out = configure(**options)
    folder = storage.join(out, "scale")
    result = measure_scaling(config, folder_of(shards, out, "shards"), folder)
    for table in tables(result):
        console.print(table)
    say(*notes(result))
    say(f"page     {storage.join(folder, PAGE)}")
