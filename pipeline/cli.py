"""The `retort` command."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from pipeline import storage
from pipeline.cli_use import export, predict, serve
from pipeline.config import student_shape
from pipeline.console import console, set_up_logging
from pipeline.errors import UserError, clip
from pipeline.options import KEYS, configure, folder_of, read_settings, run_folder, stage_options, writable
from pipeline.stopping import STOPPED, Stopped
from pipeline.task import load_task

if TYPE_CHECKING:
    from tune.compare.page import Comparison

# Each stage imports what it runs on when it is asked for: `retort --help` answers at once, and a student's machine
# needs no vLLM.

log = logging.getLogger("pipeline.cli")  # also when this module is the program


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

    does all of it: it asks the teacher about the comments and keeps its logits (extract), trains a student on them
    (train), and reports how closely it follows (evaluate). Each stage also runs alone, on the files of the one before,
    and what is already done is not done again.

    A task is one YAML file: the instruction, the output fields with their values, and which comments take part. Copy one
    under tasks/ to write your own.
    """  # noqa: D301 (\b is click's mark, as a character)
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP's threads spin 300,000 times when they wait for each other. Beside other programs on the same cores they do
        # hardly anything else: a training took 5 to 60 times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]  # Ray's, as a job's driver reserves no CPU; but students are evaluated in it


@main.command()
@stage_options("task", "teacher", "comments", "limit")
def run(**options: Any) -> None:
    """Everything: extract, train, evaluate, and a summary."""
    from pipeline.extract import extract
    from student.evaluate import evaluate
    from student.train import train

    config, out = configure(**options)
    if config.task:  # better refused now than after the extraction
        shape = student_shape(load_task(config.task), config.student)
        if config.extract.capture == "choices" and shape.sequence == "full":
            raise UserError(
                "a student of whole answers needs the logits of all steps: set student.sequence=choices, or extract.capture=all"
            )
    extract(config)
    shards, student, report = (folder_of(None, out, name) for name in ("shards", "student", "report"))
    trained = train(config, shards, student)
    figures = evaluate(config.evaluate, shards, student, report)
    _summary(figures, shards, student, report, trained["mlflow"]["uri"])


@main.command()
@stage_options("task", "teacher", "comments", "limit")
def extract(**options: Any) -> None:
    """Comments through the teacher to logit shards, in OUT/shards."""
    from pipeline.extract import extract as stage

    config, out = configure(**options)
    manifest = stage(config)
    size = f"{manifest['rows']:,} answers, {manifest['bytes'] / 1e6:,.1f} MB"
    console.print(f"{size}, in {storage.join(out, 'shards')}", markup=False, highlight=False, soft_wrap=True)


@main.command()
@click.option(
    "--answers",
    "answer",
    default="answer",
    show_default=True,
    metavar="COLUMNS",
    help="One with all of it, or one a field: a,b.",
)
@stage_options("task", "teacher", "comments", "limit")
def score(answer: str, **options: Any) -> None:
    """The teacher's logits along given answers, in OUT/shards.

    The comments' files hold an answer beside each comment: labels of people, answers of another model, or a student's own.
    A column holds the whole answer, as a JSON object or as its text, or each field has a column of its name:

    \b
      retort score --task task.yaml --comments answered.jsonl --out runs/first
      retort score --task task.yaml --comments labels.csv --answers domain,intent --out runs/labels

    A row whose answer does not fit the task is set aside. Train on the shards as on any; where the answers are not the
    teacher's, its probabilities say little, and train.objective=hard-label leaves them out.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.extract import extract as stage

    config, out = configure(**options)
    manifest = stage(config.model_copy(update={"comments": config.comments.model_copy(update={"answer": answer})}))
    size = f"{manifest['rows']:,} answers scored, {manifest['bytes'] / 1e6:,.1f} MB"
    console.print(f"{size}, in {storage.join(out, 'shards')}", markup=False, highlight=False, soft_wrap=True)


@main.command()
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@click.option("--init", metavar="DIR", help="Start from this student's weights, and with its shape; see `retort prune`.")
@stage_options()
def train(shards: str | None, **options: Any) -> None:
    """Logit shards to a student, in OUT/student.

    Every choice is a key of the configuration. Some, with --set:

    \b
      train.objective=temperature   curriculum, hard-label, temperature, topk, slim, reverse-kl
      student.sequence=choices      leave forced tokens out: a third of the length, and of the time
      student.layers=4 student.width=256 student.heads=4 student.mlp=1024
      train.epochs=10 train.batch_size=64 train.learning_rate=0.001 student.dropout=0.1
      train.workers=4 train.strategy=zero2 train.precision=bf16 train.accumulation=2

    Ctrl-C saves and stops; the same command goes on, as it does after a crash.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.train import train as stage

    config, out = configure(**options)
    stage(config, folder_of(shards, out, "shards"), folder_of(None, out, "student"))


@main.command()
@click.option("--from", "source", metavar="MODEL", help="A student's folder, or a Gemma 3 model by name or path.")
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@click.option("--fraction", metavar="PART", help="Share of the parameters to keep, such as 1/4, embedding included.")
@click.option("--params", "prune_params", type=click.IntRange(1), help="The same as a number.")
@click.option(
    "--chain", metavar="PARTS", help="Several shares, as 1/2,1/4,1/8: each student cut from the one before, and trained."
)
@stage_options()
def prune(shards: str | None, chain: str | None, **options: Any) -> None:
    """A smaller student cut from a trained model, in OUT/pruned, to train further.

    Keeps the attention heads, neurons, channels and layers that matter most on training comments, and shows in a page how
    much each of them does. The model is a student, or a Gemma 3 model: the teacher itself, or a smaller sibling of it.

    \b
      retort prune --from runs/first/student --shards runs/first/shards --out runs/half --fraction 1/2
      retort prune --from google/gemma-3-1b-it --shards runs/first/shards --out runs/small --set prune.width=512
      retort train --init runs/half/pruned --shards runs/first/shards --out runs/half

    With --chain, each student is trained and evaluated before the next is cut from it, in OUT/chain; the same command goes
    on with a chain that was stopped, and `retort compare` shows all of them.
    """  # noqa: D301 (\b is click's mark, as a character)
    config, out = configure(chain=chain, **options)
    folder = folder_of(shards, out, "shards")
    if config.prune.chain:
        from student.prune.chain import run_chain
        from tune.compare.page import compare_runs
        from tune.tracking import tracking_uri

        chained = storage.join(out, "chain")
        run = run_chain(config, folder, chained)
        store = tracking_uri(config.tracking.uri, out)
        _show(compare_runs(store, config.tracking.experiment, chained, run, by=["pruned.fraction"]), chained)
        return
    from student.prune.prune import prune as stage

    pruned = storage.join(out, "pruned")
    stage(config.prune, folder, pruned)
    console.print(f"student  {pruned}\nwhat matters in its source   {storage.join(pruned, 'importance.html')}", highlight=False)
    place = f"{out}-pruned" if storage.exists(storage.join(out, "student", "train.json")) else out  # never over another student
    console.print(f"train it retort train --init {pruned} --shards {folder} --out {place}", highlight=False, soft_wrap=True)


@main.command()
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@click.option("--space", metavar="YAML", help="The search space; by default tune/space.yaml, a good one to copy.")
@click.option("--trials", type=click.IntRange(1), help="How many students to try.")
@click.option("--max-params", type=click.IntRange(1), help="The most parameters a student may have, embedding included.")
@click.option("--max-latency-ms", type=float, help="The longest it may take for one comment, where it trains.")
@click.option("--resume", is_flag=True, help="Go on with the search in OUT, under the settings it was begun with.")
@stage_options()
def tune(shards: str | None, resume: bool, **options: Any) -> None:
    """A search for the smallest student that is faithful enough, in OUT/search.

    Trains many students on the same shards, each with another depth, width and schedule; stops early those that fall
    behind; evaluates the others on test comments; and shows what there is to choose from: agreement with the teacher
    against size and speed. Every trial is a run in MLflow under the search's own, and the best one is registered there.

    \b
      retort tune --out DIR --trials 30 --max-params 5000000
      retort tune --out DIR --space my-space.yaml --set train.epochs=10 --set train.workers=4
      retort tune --out DIR --resume

    Ctrl-C saves the trials under way; --resume goes on, as it does after a crash. With more --trials it goes on further.
    """  # noqa: D301 (\b is click's mark, as a character)
    from tune.search import begun, search

    if resume:
        options["config"], began_on = begun(folder_of(None, storage.absolute(options["out"] or "."), "search"))
        shards = shards or began_on
    config, out = configure(**options)
    folder = folder_of(None, out, "search")
    _show(search(config, folder_of(shards, out, "shards"), folder), folder)


@main.command()
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@stage_options()
def evaluate(shards: str | None, student: str | None, **options: Any) -> None:
    """The student's fidelity on test comments, in OUT/report."""
    from student.evaluate import evaluate as stage

    config, out = configure(**options)
    folders = (folder_of(shards, out, "shards"), folder_of(student, out, "student"), folder_of(None, out, "report"))
    _summary(stage(config.evaluate, *folders), *folders)


@main.command()
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
    from tune.compare.page import compare_runs
    from tune.tracking import tracking_uri

    config, out = configure(**options)
    store, folder = tracking_uri(uri or config.tracking.uri, out), storage.join(out, "compare")
    comparison = compare_runs(store, experiment or config.tracking.experiment, folder, search, by)
    _show(comparison, folder)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--address", metavar="URL", help="The cluster's dashboard; by default $RAY_API_SERVER_ADDRESS, else port 8265 here."
)
@click.option("--install", type=click.Choice(["cpu", "gpu"]), help="Have Ray install what the stage needs, from the lock.")
@click.option("--no-wait", is_flag=True, help="Return when the cluster has the job.")
@click.option("--dry-run", is_flag=True, help="Print the `ray job submit` line that does the same, and stop.")
@click.argument("stage", metavar="STAGE")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="...")
@click.pass_context
def submit(
    context: click.Context,
    address: str | None,
    install: str | None,
    no_wait: bool,
    dry_run: bool,
    stage: str,
    arguments: tuple[str, ...],
) -> None:
    """A stage as a job on a Ray cluster: the same command, there.

    \b
      retort submit run --config run.yaml --out s3://bucket/first
      retort submit --address http://10.0.0.5:8265 train --out /shared/first --set train.workers=8

    Packs the checkout in the current directory, sends it to the cluster, and shows the job's log to its end. Ctrl-C leaves
    the job running. The same command goes on where a job that died left off.

    Files of settings travel with the job. Comments, shards and --out do not: they must lie in buckets, or at absolute
    paths that all machines share. Credentials do not travel either: machines have roles, or variables of their own.
    """  # noqa: D301 (\b is click's mark, as a character)
    from cluster.submit import STAGES, check_paths, prepare, run_job

    if stage not in STAGES:
        raise UserError(f"no stage {stage}: one of {', '.join(STAGES)}")
    command = main.commands[stage]
    options = command.make_context(stage, list(arguments), parent=context.parent).params
    if not options.get("resume"):  # whose settings are in --out
        shared = {name: value for name, value in options.items() if name in KEYS or name in ("config", "overrides")}
        folders = {f"--{name}": options.get(name) for name in ("shards", "student")}
        settings = read_settings(**shared)
        run_folder(settings)
        check_paths(settings, options["config"], folders)
    submission = prepare(stage, list(arguments), address, install)
    if dry_run:
        click.echo(submission.command())
        return
    sys.exit(run_job(submission, no_wait))


@main.command()
@click.option("--workers", multiple=True, type=click.IntRange(1), help="A count to measure; by default 1, 2, 4, … with room.")
@click.option("--stage", type=click.Choice(["extract", "train", "both"]), help="What to measure; by default both.")
@click.option("--shards", metavar="DIR", help="Folder of logit shards to train on; by default OUT/shards.")
@click.option("--price-per-hour", type=float, metavar="PRICE", help="Of one worker's share of a machine, for the cost.")
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
    from tune.scale.measure import PAGE, measure_scaling
    from tune.scale.page import notes, tables

    config, out = configure(**options)
    folder = storage.join(out, "scale")
    result = measure_scaling(config, folder_of(shards, out, "shards"), folder)
    for table in tables(result):
        console.print(table)
    for line in notes(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page     {storage.join(folder, PAGE)}", markup=False, highlight=False, soft_wrap=True)


@main.command()
@click.option("--comments-count", type=click.IntRange(1), metavar="N", help="Comments that pass the filters.")
@click.option("--teacher-params", type=float, metavar="N", help="Parameters of the teacher, such as 3.88e9.")
@click.option("--teacher-machine", metavar="KIND", help="Kind of the teachers' machines, by its name among the prices.")
@click.option("--student-machine", metavar="KIND", help="Kind of the students' machines; by default the teachers'.")
@click.option("--workers", "plan_workers", type=click.IntRange(1), help="Of each stage; by default the configuration's.")
@click.option("--scale", metavar="JSON", help="The scale.json that `retort scale` left: measured rates come first.")
@click.option("--prices", metavar="YAML", help="Machines and prices; by default cluster/plan/prices.yaml, to be copied.")
@stage_options("task")
def plan(**options: Any) -> None:
    """Hours, bytes and money of a run before you pay for it, in OUT/plan.

    \b
      retort plan --task tasks/reddit_sentiment.yaml --comments-count 500000 --out runs/first
      retort plan --config run.yaml --scale runs/first/scale/scale.json --workers 8 --out runs/first
      retort plan --config cluster/plan/thesis.yaml --out runs/thesis

    Each stage's wall time, worker-hours and cost, the same with 1, 2, 4, … workers up to where more do not pay, and on other
    kinds of machines. Rates are measured ones where there are any, else yours (plan.seconds_per_answer,
    plan.seconds_per_example), else published peaks times a stated share; the table says which. Nothing is started.
    """  # noqa: D301 (\b is click's mark, as a character)
    from cluster.plan.estimate import make_plan
    from cluster.plan.report import PAGE, notes, tables, write

    config, out = configure(**options)
    folder, made = storage.join(out, "plan"), make_plan(config)
    write(made, folder)
    for table in tables(made):
        console.print(table)
    for line in notes(made):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page     {storage.join(folder, PAGE)}", markup=False, highlight=False, soft_wrap=True)


@main.command()
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR")
@click.option("--verbose", is_flag=True)
def demo(out: str, verbose: bool) -> None:
    """Made-up comments and a small teacher fitted on them, to try Retort without a download."""
    from pipeline.demo.build import build_demo

    set_up_logging(verbose)
    writable(out)
    comments, teacher = build_demo(out)
    console.print(f"comments in {comments}, teacher in {teacher}", highlight=False)


@main.group()
def jsonl() -> None:
    """Logit shards as JSON lines, 128 examples a file, for programs that read nothing else."""


@jsonl.command("export")
@click.argument("shards", metavar="SHARDS")
@click.argument("folder", metavar="FOLDER")
def export_jsonl(shards: str, folder: str) -> None:
    """Writes every example of SHARDS to FOLDER, with its raw logits as decimal numbers."""
    from pipeline.jsonl import export

    set_up_logging(verbose=False)
    console.print(f"{export(shards, writable(folder)):,} files in {folder}", highlight=False)


@jsonl.command("import")
@click.argument("folder", metavar="FOLDER")
@click.argument("shards", metavar="SHARDS")
def import_jsonl(folder: str, shards: str) -> None:
    """Writes the examples of FOLDER, as `export` leaves it, as SHARDS to train on."""
    from pipeline.jsonl import import_

    set_up_logging(verbose=False)
    console.print(f"{import_(folder, writable(shards))['rows']:,} examples in {shards}", highlight=False)


def _show(comparison: Comparison, folder: str) -> None:
    """The table of students, what is to be said of it, and where the page is."""
    from tune.compare.page import PAGE, notes, table

    if comparison.groups:
        console.print(table(comparison))
    for line in notes(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page     {storage.join(folder, PAGE)}", markup=False, highlight=False, soft_wrap=True)


def _summary(figures: dict[str, Any], shards: str, student: str, report: str, mlflow: str | None = None) -> None:
    """The report's headline, and where everything is."""
    from student.answers import REFERENCES
    from student.sample_size import sample_size_notes

    agreement = f"agreement with {REFERENCES[figures['answers']].name}"
    table = Table(agreement, "valid", "whole answer", *map(escape, figures["student"]["fields"]), box=None)
    rows = {
        "student": figures["student"],
        "student, unconstrained": figures["unconstrained"],
        "TF-IDF + logistic regression": figures["floors"]["tfidf_regression"],
        "majority answer": figures["floors"]["majority"],
    }
    for label, row in rows.items():
        table.add_row(label, *(f"{100 * share:.1f} %" for share in (row["valid"], row["whole"], *row["fields"].values())))
    console.print(table)
    speed, kl = figures["speed"], figures["steps"]["choice_kl"]
    ratio = "" if speed["ratio"] is None else f", {speed['ratio']:.1f} × the teacher"
    steps = "" if kl is None else f"; KL {kl:.4f} nats a choice step"
    console.print(f"{speed['student_answers_per_second']:,.0f} answers/s{ratio}{steps}")
    console.print(*sample_size_notes(figures), markup=False, highlight=False, soft_wrap=True)
    page, file = storage.join(report, "fidelity.html"), storage.join(report, "fidelity.json")
    for what, where in {"report": page, "figures": file, "student": student, "shards": shards}.items():
        console.print(f"{what:8} {where}", markup=False, highlight=False, soft_wrap=True)
    if mlflow:
        command = f"mlflow server --backend-store-uri {shlex.quote(mlflow)} --host 127.0.0.1 --port 5000"
        console.print(
            f"MLflow   {command}\n         then open http://127.0.0.1:5000", markup=False, highlight=False, soft_wrap=True
        )


for command in (predict, serve, export):
    main.add_command(command)

if __name__ == "__main__":
    main()
