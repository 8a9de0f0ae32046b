"""The commands of `cluster`: plans and jobs."""

from __future__ import annotations

import sys
from typing import Any, cast

import click

from pipeline.base import storage
from pipeline.base.console import console, say
from pipeline.base.errors import UserError
from pipeline.cli.options import configure, is_setting, read_settings, run_folder, setting, stage_options


@click.command()
@setting("plan.comments", "--comments-count", type=click.IntRange(1), metavar="N", help="Texts that pass the filters.")
@setting("plan.teacher_params", "--teacher-params", type=float, metavar="N", help="Parameters of the teacher, such as 3.88e9.")
@setting(
    "plan.teacher_machine",
    "--teacher-machine",
    metavar="KIND",
    help="Kind of the teachers' machines, by its name among the prices.",
)
@setting(
    "plan.student_machine",
    "--student-machine",
    metavar="KIND",
    help="Kind of the students' machines; by default the teachers'.",
)
@setting("plan.workers", "--workers", type=click.IntRange(1), help="Of each stage; by default the configuration's.")
@setting("plan.scale", "--scale", metavar="JSON", help="The scale.json that `retort scale` left: measured rates come first.")
@setting(
    "plan.prices", "--prices", metavar="YAML", help="Machines and prices; by default cluster/plan/prices.yaml, to be copied."
)
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
    say(*notes(made))
    say(f"page     {storage.join(folder, PAGE)}")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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

    Files of settings travel with the job. Texts, shards and --out do not: they must lie in buckets, or at absolute
    paths that all machines share. Credentials do not travel either: machines have roles, or variables of their own.
    """  # noqa: D301 (\b is click's mark, as a character)
    from cluster.submit import STAGES, check_paths, prepare, run_job

    if stage not in STAGES:
        raise UserError(f"no stage {stage}: one of {', '.join(STAGES)}")
    command = cast(click.Group, context.find_root().command).commands[stage]
    options = command.make_context(stage, list(arguments), parent=context.parent).params
    if not options.get("resume"):  # whose settings are in --out
        shared = {name: value for name, value in options.items() if is_setting(name) or name in ("config", "overrides")}
        named = {f"--{name.replace('_', '-')}": options.get(name) for name in ("shards", "student", "certify_on")}
        folders = [(option, path) for option, some in named.items() for path in (some if isinstance(some, tuple) else [some])]
        settings = read_settings(**shared)
        run_folder(settings)
        check_paths(settings, options["config"], folders)
    submission = prepare(stage, list(arguments), address, install)
    if dry_run:
        click.echo(submission.command())
        return
    sys.exit(run_job(submission, no_wait))
