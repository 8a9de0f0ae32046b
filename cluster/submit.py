"""`retort submit`: a stage as a job on a Ray cluster. A thin wrapper of `ray job submit`; `Submission.command` is that line."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cluster.config import ClusterSettings
from pipeline.base import storage
from pipeline.base.console import console, say
from pipeline.base.errors import UserError
from pipeline.base.signals import STOPPED
from pipeline.base.tracking import tracking_uri

ADDRESS = "http://127.0.0.1:8265"  # where `ray dashboard cluster.yaml` and `kubectl port-forward` put a cluster's dashboard
# Passed on to the job. No secrets: Ray shows a job's environment to whoever may see the job.
PASSED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "GOOGLE_CLOUD_PROJECT")
TEACHER, STUDENT = ("extract", "score"), ("train", "prune", "tune", "evaluate", "select", "predict")
STAGES = ("run", *TEACHER, *STUDENT, "grow", "scale")


@dataclass(frozen=True)
class Submission:
    """A job to be.

    Attributes:
        address: of the cluster's dashboard, http:// or https://.
        name: of the job, unique on the cluster.
        entrypoint: the command that the head runs.
        runtime_env: Ray's: the code, variables, packages.
    """

    address: str
    name: str
    entrypoint: str
    runtime_env: dict[str, Any]

    def command(self) -> str:
        """The shell command that submits the same job without Retort."""
        rest = {key: value for key, value in self.runtime_env.items() if key != "working_dir"}
        with_env = f" --runtime-env-json {shlex.quote(json.dumps(rest))}" if rest else ""
        return f"ray job submit --address {self.address} --working-dir .{with_env} -- {self.entrypoint}"


def prepare(stage: str, arguments: list[str], address: str | None, install: str | None) -> Submission:
    """The job that runs a stage on a cluster, from the working tree in the current directory.

    Args:
        stage: one of `STAGES`.
        address: of the dashboard; None takes RAY_API_SERVER_ADDRESS, else `ADDRESS`.
        install: "cpu" or "gpu" has Ray install the stage's packages for it.

    Raises:
        UserError: the current directory is no checkout.
    """
    if not all(Path(name).exists() for name in ("pyproject.toml", "pipeline", "student", "cluster", "tune")):
        raise UserError("retort submit packs the current directory: run it at the top of a checkout of Retort")
    environment: dict[str, Any] = {"working_dir": "."}
    if passed := {name: os.environ[name] for name in PASSED if os.environ.get(name)}:
        environment["env_vars"] = passed
    if install:
        environment["pip"] = packages(stage, install)
    return Submission(
        address=(address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS).rstrip("/"),
        name=f"retort-{stage}-{secrets.token_hex(4)}",
        entrypoint=shlex.join(["python", "-m", "pipeline.cli", stage, *arguments]),
        runtime_env=environment,
    )


def packages(stage: str, kind: str) -> dict[str, Any]:
    """What a stage needs installed, as Ray's `pip` field has it, in the versions of the lock for `kind`, cpu or gpu."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [f"teacher-{kind}"] * (stage not in STUDENT) + ["student"] * (stage not in TEACHER)
    wanted = [package for extra in extras for package in project["optional-dependencies"][extra]]
    lock = f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/requirements-{kind}.lock"
    return {"packages": project["dependencies"] + wanted + [f"-c {lock}"]}


def check_paths(config: ClusterSettings, config_file: str | None, folders: Sequence[tuple[str, str | None]]) -> None:
    """Refuses places that the cluster cannot see. Code and settings travel with the job; data do not.

    Args:
        folders: that the command names beside the configuration, with their options.

    Raises:
        UserError: naming the first such place, and where to put it instead.
    """
    models = {"--teacher": config.teacher.model, "--from": config.prune.source}
    data = [
        ("--out", config.out),
        ("--init", config.train.init),
        *((option, model) for option, model in models.items() if model and os.path.exists(model)),  # else a name on the Hub
        *folders,
        *(("--comments", p) for p in config.comments.paths),
    ]
    for option, path in data:
        storage.refuse_credentials(path or "")
        if path and not storage.is_uri(path) and not os.path.isabs(path):
            raise UserError(
                f"{option} {path} would be looked for in the job's own copy of the code: give a bucket (s3://… or gs://…), or "
                "an absolute path on a disk that all machines of the cluster share"
            )
    for option, path in [("--config", config_file), ("--task", config.task), ("--space", config.tune.space)]:
        if path and not os.path.isabs(path) and (path.startswith("..") or not os.path.isfile(path)):
            raise UserError(f"{option} {path} is no file in this directory, which is what goes to the cluster")
    tracking_uri(config.tracking.uri, config.out or ".")


def run_job(submission: Submission, no_wait: bool) -> int:
    """Submits a job and shows its log to its end; returns the exit code of the command.

    Raises:
        UserError: see `cluster.follow`.
    """
    _use_token()
    from cluster.follow import follow, submit  # imports Ray

    client, status, code = submit(submission), None, 0
    try:
        console.print(f"job {submission.name} is on the cluster", highlight=False)
        if not no_wait:
            status = follow(client, submission.name, lambda piece: click.echo(piece, nl=False))
    except KeyboardInterrupt:
        code = STOPPED
        console.print("\nno longer following: the job goes on", highlight=False)
    if status is None:
        address = f"--address {submission.address}"
        say(f"follow it   ray job logs {address} --follow {submission.name}")
        say(f"stop it     ray job stop {address} {submission.name}")
        return code
    console.print(f"job {submission.name}: {status.lower()}", highlight=False)
    return int(status != "SUCCEEDED")


def _use_token() -> None:
    """Ray's client sends a token in token mode alone, which it takes from the environment when it is imported."""
    known = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if known or (Path.home() / ".ray/auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
