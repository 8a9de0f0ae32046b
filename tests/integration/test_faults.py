"""Faults that are not crashes, and signals, met by the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from pipeline.shards.manifest import open_shards
from tests.integration.conftest import Retort
from tests.integration.test_chaos import TASK
from tests.tiny import ROOT, save_teacher

PLAIN = "--set=teacher.engine=transformers"
SMALL = [PLAIN, "--set=extract.rows_per_unit=8", "--set=extract.calibration_floor=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_teacher(folder / "teacher", seed=0)
    (folder / "task.yaml").write_text(TASK)
    (folder / "comments.jsonl").write_text(
        "".join(json.dumps({"id": i, "body": f"comment {i} here"}) + "\n" for i in range(400))
    )
    return folder


def arguments(place: Path, out: Path, **changes: str) -> list[str]:
    named = {"task": "task.yaml", "teacher": "teacher", "comments": "comments.jsonl"} | changes
    return [f"--{name}={place / value}" for name, value in named.items()] + [f"--out={out}"]


def rows_of(out: Path) -> list[int]:
    return sorted(int(key[1]) for table in open_shards(str(out / "shards")).tables() for key in table.keys)


@pytest.mark.slow
def test_a_signal_finishes_what_is_in_flight_and_the_same_command_goes_on(retort: Retort, place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "extract", *arguments(place, tmp_path / "out"), *SMALL]
    environment = retort.environment()
    shards, log = tmp_path / "out/shards", tmp_path / "log"

    def committed() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*.parquet")}

    def interrupted(send: Callable[[int], None]) -> None:
        before = committed()
        with log.open("wb") as stream:
            run = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        while len(committed()) < len(before) + 3:
            assert run.poll() is None, log.read_text()
            time.sleep(0.02)
        send(run.pid)
        assert run.wait(timeout=60) == 130, log.read_text()
        said = log.read_text()
        assert "finishing the units in flight" in said
        assert "Run the same command again to go on" in said
        assert "Traceback" not in said
        assert "autoscaler" not in said
        assert len(committed()) < 50
        assert not (shards / "manifest.json").exists()
        assert before.items() <= committed().items()

    interrupted(lambda pid: os.killpg(pid, signal.SIGINT))  # as a terminal's Ctrl-C
    interrupted(lambda pid: os.killpg(pid, signal.SIGTERM))  # as `timeout`'s
    done = committed()
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert rows_of(tmp_path / "out") == list(range(400))
    assert done.items() <= committed().items()


@pytest.mark.slow
def test_rows_that_break_the_engine_or_its_logits_are_set_aside(retort: Retort, place: Path, tmp_path: Path) -> None:
    """One token's embedding is not a number, and another's id is beyond the model's vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.lm_head, model.config.tie_word_embeddings = head, False
    for text, value in (("Q", np.nan), ("Z", np.inf)):
        model.get_input_embeddings().weight.data[tokenizer(text, add_special_tokens=False).input_ids[-1]] = value
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    bodies = [f"comment {i} here" for i in range(40)]
    bodies[5], bodies[21] = "what a Q is", "and a Z too"
    (tmp_path / "comments.jsonl").write_text(
        "".join(json.dumps({"id": i, "body": body}) + "\n" for i, body in enumerate(bodies))
    )
    (tmp_path / "task.yaml").write_text(TASK)
    said = retort("extract", *arguments(tmp_path, tmp_path / "out"), *SMALL, "--set=extract.calibration_rows=4")
    assert "2 rows were set aside" in said
    aside = [json.loads(line) for line in (tmp_path / "out/shards/set_aside.jsonl").read_text().splitlines()]
    assert [(record["line"], record["reason"]) for record in aside] == [
        (6, "the teacher's logits are not finite"),
        (22, "the teacher's logits are not finite"),
    ]
    assert rows_of(tmp_path / "out") == [i for i in range(40) if i not in (5, 21)]


@pytest.mark.slow
def test_another_teacher_at_the_same_place_and_edited_comments_are_refused(retort: Retort, place: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("teacher", "task.yaml", "comments.jsonl"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, tmp_path / name)
    options = [*arguments(tmp_path, tmp_path / "out"), *SMALL, "--limit=16"]
    retort("extract", *options)
    changes = (["--set=extract.capture=choices"], "another capture"), (["--set=teacher.temperature=0.7"], "another temperature")
    for changed, named in changes:
        assert named in retort.refuses("extract", *options, *changed)
    save_teacher(tmp_path / "teacher", seed=1)
    assert "another content" in retort.refuses("extract", *options)
    text = (tmp_path / "comments.jsonl").read_text()
    (tmp_path / "comments.jsonl").write_text(text.replace("comment 399", "comment 398"))
    assert "holds another run (its files differ)" in retort.refuses("extract", *options)


@pytest.mark.slow
def test_answers_are_scored_sampled_and_stored_compactly(retort: Retort, place: Path, tmp_path: Path) -> None:
    given = [{"body": f"comment {i} here", "answer": {"mood": "bad", "loud": bool(i % 2)}} for i in range(30)]
    given[7]["answer"] = {"mood": "sad", "loud": True}
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    scored = tmp_path / "scored"
    retort("score", *arguments(place, scored, comments=str(tmp_path / "given.jsonl")), *SMALL, "--set=extract.capture=choices")
    shards = open_shards(str(scored / "shards"))
    tokenizer, task = shards.compiled.tokenizer, shards.compiled.task
    texts = [tokenizer.decode(row) for t in shards.tables() for row in np.split(t.answers, np.cumsum(t.lengths)[:-1])]
    assert [task.parse(text) for text in texts] == [("bad", bool(i % 2)) for i in range(30) if i != 7]
    assert (shards.manifest.kept_steps, shards.manifest.answers) == (2 * 29, "given")
    assert "does not fit the task" in (scored / "comments/set_aside.jsonl").read_text()
    assert "holds the logits of choice steps alone" in retort.refuses("train", f"--out={scored}", "--set=student.sequence=full")

    sampled = tmp_path / "sampled"
    several = [
        "--set=extract.samples_per_comment=3",
        "--limit=60",
        "--set=extract.codec=compact",
        "--set=extract.rows_per_unit=30",
    ]
    assert "would all be the same answer" in retort.refuses("extract", *arguments(place, sampled), *SMALL, *several)
    retort("extract", *arguments(place, sampled), *SMALL, *several, "--set=teacher.temperature=2")
    shards = open_shards(str(sampled / "shards"))
    keys = [tuple(key) for table in shards.tables() for key in table.keys.tolist()]
    assert shards.manifest.answers == "teacher"
    assert sorted(keys) == [(0, row, sample) for row in range(60) for sample in range(3)]
    facts = shards.manifest.codec.model_dump()
    assert facts["shards"] == {"compact": 2}
    assert facts["kl"]["choice_steps"]["T=1"]["mean"] < 1e-3
    run = MlflowClient(f"sqlite:///{sampled}/mlflow.db").search_runs(["1"])[0]
    assert (run.info.status, run.data.metrics["rows"], run.data.metrics["set_aside"]) == ("FINISHED", 180.0, 0.0)
