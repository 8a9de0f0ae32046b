"""A submitted job, followed to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.submit import Submission
from pipeline.base.errors import UserError

PATIENCE = 60.0  # seconds without an answer until the way to the cluster counts as lost
LOOK_EVERY = 1.0
LOST = (RuntimeError, OSError, ClientError, requests.RequestException)  # what Ray's client raises when the way is cut


def submit(submission: Submission) -> JobSubmissionClient:
    """Sends the job to the cluster; returns the way to it.

    Raises:
        UserError: the cluster cannot be reached, does not take our token, or does not take the job.
    """
    logging.disable(logging.WARNING)  # Ray names each file that it does not pack
    try:
        client = JobSubmissionClient(submission.address)
        client.submit_job(entrypoint=submission.entrypoint, runtime_env=submission.runtime_env, submission_id=submission.name)
    except AuthenticationError as error:
        raise UserError(
            f"{submission.address} does not take our token ({str(error).splitlines()[0]}): put the cluster's own into "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token; on its head, `ray get-auth-token` prints it"
        ) from error
    except (ConnectionError, requests.ConnectionError) as error:
        raise UserError(
            f"no Ray cluster answers at {submission.address}: give its dashboard with --address or RAY_API_SERVER_ADDRESS, and "
            "keep the way there open (`ray dashboard CLUSTER.yaml`, `kubectl port-forward`, `ssh -L 8265:127.0.0.1:8265`)"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the cluster does not take the job: {error}") from error
    return client


def follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> JobStatus:
    """Shows a job's log until it has ended. When the way to the cluster is cut, it is tried again.

    Raises:
        UserError: the cluster has not answered for `PATIENCE` seconds.
    """
    shown, answered = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for piece in client.tail_job_logs(name):  # from the log's beginning, each time
            new = piece[max(0, shown - seen) :]
            seen += len(piece)
            shown += len(new)
            show(new)

    while True:
        with suppress(*LOST):
            asyncio.run(tail())
        try:
            status = client.get_job_status(name)
        except LOST as error:
            if time.monotonic() - answered > PATIENCE:
                raise UserError(f"the cluster does not answer any more ({error}); the job may still be running") from error
        else:
            answered = time.monotonic()
            if status.is_terminal():
                return status
        time.sleep(LOOK_EVERY)
