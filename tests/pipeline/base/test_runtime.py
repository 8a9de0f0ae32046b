"""Signals and the Ray that a command starts, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil

from tests.tiny import ROOT

COMMAND = """
import time, ray
from pipeline.base.runtime import start_ray
from pipeline.base.signals import StopRequest

start_ray()
with StopRequest("finishing") as stop:
    print("working", flush=True)
    while not stop:
        time.sleep(0.05)
    time.sleep(1)
    print("Ray still says", ray.get(ray.remote(lambda: 7).remote()), flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_sigterm_to_a_commands_group_leaves_its_ray_until_the_command_is_done() -> None:
    """As `timeout` sends it. Ray's processes died of it, and the command after them, a minute later."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    rays = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "Ray still says 7\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)  # outside of what may be finished, it is Ctrl-C
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "interrupted\n"), errors
    assert "autoscaler" not in errors
    assert "SIGTERM received" not in errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(rays, timeout=30)[1]


def test_a_raylet_that_is_killed_ends_the_command_with_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    rays = psutil.Process(process.pid).children(recursive=True)
    next(each for each in rays if each.name() == "raylet").kill()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert re.sub("\x1b[^m]*m", "", errors) == (
        "error: Ray's own process on this machine ended (SIGKILL, as when memory runs out), and with it all that ran here. "
        "What was committed is kept: run the same command again to go on\n"
    )
    assert not psutil.wait_procs(rays, timeout=30)[1]


GPUS = """
import os, ray
from pipeline.base.runtime import start_ray

start_ray()

class Actor:
    def sees(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

def task():
    return os.environ["CUDA_VISIBLE_DEVICES"]

actor = ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(Actor).remote()
print(ray.get([actor.sees.remote(), ray.remote(task).remote()]), flush=True)
"""


def test_workers_that_reserved_no_gpu_see_none() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([sys.executable, "-c", GPUS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['', '']\n"
