"""Extraction from an OpenAI-compatible API over real HTTP: a server of the tests' own, whole and faulty."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mlflow.tracking import MlflowClient

from pipeline.base.errors import UserError
from pipeline.base.signals import Stopped
from pipeline.cli.settings import load_config
from pipeline.config import PipelineSettings, TeacherConfig
from pipeline.extract.endpoint import extract_from_endpoint
from pipeline.shards.manifest import Manifest, open_shards
from pipeline.task.compiled import CompiledTask, compile_for
from pipeline.task.fitted_tokenizer import fit_tokenizer
from pipeline.task.task_file import load_task
from pipeline.teacher.engines import engine_environment
from student.decode.answerer import Answerer
from student.model.checkpoint import save_student
from student.predict.api_teacher import ApiTeacher
from student.predict.predict import predict
from tests.conftest import RealCase
from tests.integration.api import SURE, TOKENS
from tests.integration.conftest import Retort
from tests.integration.ray_cluster import free_port
from tests.student.decode.test_decode import make_student
from tests.student.serve.conftest import running
from tests.tiny import ROOT

TASK = 'name: mood\ninstruction: Name the mood.\nprompt: "{instruction}\\n{comment}"\nfields: {mood: [good, bad]}\n'
PRICED = {"input_price": 10.0, "output_price": 100.0}
PRICE = (TOKENS[0] * PRICED["input_price"] + TOKENS[1] * PRICED["output_price"]) / 1e6  # of a call


class Server:
    """The API in a process of its own."""

    def __init__(self, folder: Path, faults: float, certificate: Path | None = None) -> None:
        self._counts, self.port, self._scheme = folder / "counts.txt", free_port(), "https" if certificate else "http"
        self._counts.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.api", str(self.port), str(self._counts), str(faults)]
            + ([str(certificate)] if certificate else []),
            cwd=ROOT,
        )
        for _ in range(600):
            assert self._process.poll() is None, "the server did not start"
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"

    @property
    def paid(self) -> Counter[str]:
        """How often each text was answered."""
        return Counter(self._counts.read_text().splitlines())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(faults: float = 0.0, certificate: Path | None = None) -> Server:
        servers.append(Server(tmp_path, faults, certificate))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Extraction:
    """The stage in this process, over some texts."""

    def __init__(self, folder: Path, server: Server, texts: list[str]) -> None:
        self.out, self._folder, self._server = folder / "out", folder, server
        (folder / "task.yaml").write_text(TASK)
        (folder / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))

    def __call__(self, **teacher: Any) -> Manifest:
        return extract_from_endpoint(PipelineSettings.model_validate(self.settings(**teacher)))

    def settings(self, **teacher: Any) -> dict[str, Any]:
        return {
            "task": str(self._folder / "task.yaml"),
            "out": str(self.out),
            "comments": {"paths": [str(self._folder / "texts.jsonl")]},
            "extract": {"rows_per_unit": 32},
            "teacher": {"model": "m", "engine": "openai", "url": self._server.url, "requests": 8} | teacher,
        }

    @property
    def probabilities(self) -> list[float]:
        """Of the answer taken, for each text."""
        shards = open_shards(str(self.out / "shards"))
        return [float(np.exp(row.max())) for table in shards.tables() for row in table.logprobs.astype(float)]


TEXTS = [f"text {i} is {('good', 'bad')[i % 2]}" for i in range(100)]


def test_listed_alternatives_become_probabilities_and_the_bill_is_kept(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-of-mine")
    server = serve()
    extraction = Extraction(tmp_path, server, TEXTS)
    manifest = extraction(key="MY_KEY", **PRICED)
    assert (manifest.rows, manifest.set_aside, manifest.answers) == (100, 0, "teacher")
    assert extraction.probabilities == pytest.approx([SURE] * 100, abs=1e-3)
    assert set(server.paid.values()) == {1}
    spent = manifest.teacher.model_dump()["spent"]
    assert (spent["calls"], spent["cost"]) == (100, pytest.approx(100 * PRICE))
    run = MlflowClient(f"sqlite:///{extraction.out}/mlflow.db").search_runs(["1"])[0]
    assert run.data.metrics["cost"] == pytest.approx(100 * PRICE)
    assert not list((extraction.out / "answers").rglob("*.json"))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-secret-of-mine" in path.read_bytes()]
    assert written == []
    assert extraction(key="MY_KEY", **PRICED).digest == manifest.digest
    assert set(server.paid.values()) == {1}
    with pytest.raises(UserError, match="another temperature"):
        extraction(temperature=1.0)


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    extraction = Extraction(tmp_path, server, TEXTS)
    with pytest.raises(Stopped, match="the budget allows no further call"):
        extraction(max_calls=40)
    assert server.paid.total() == 40
    with pytest.raises(Stopped, match="spent"):
        extraction(max_cost=60.5 * PRICE, **PRICED)
    assert server.paid.total() == 60
    assert extraction().rows == 100
    assert set(server.paid.values()) == {1}


@pytest.mark.slow
def test_a_run_that_ends_between_two_attempts_makes_the_second_alone(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(0.6)
    extraction = Extraction(tmp_path, server, TEXTS)
    for calls in range(5, 60, 5):
        with pytest.raises(Stopped, match="the budget allows no further call"):
            extraction(max_calls=calls, requests=1)
        assert server.paid.total() <= calls
    assert extraction().rows > 50
    assert max(server.paid.values()) == 2


def test_samples_of_a_text_are_votes(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    extraction = Extraction(tmp_path, server, TEXTS[:10])
    settings = extraction.settings(temperature=1.0)
    settings["extract"]["samples_per_comment"] = 3
    assert extract_from_endpoint(PipelineSettings.model_validate(settings)).rows == 10
    assert set(server.paid.values()) == {3}
    assert extraction.probabilities == pytest.approx([SURE] * 10, abs=1e-3)


def test_a_wrong_key_and_a_dead_server_are_told_at_once(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teacher.endpoint.RETRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    server = serve()
    extraction = Extraction(tmp_path, server, TEXTS)
    with pytest.raises(UserError, match=r"refuses the calls: .*no such key"):
        extraction()
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    server.close()
    with pytest.raises(UserError, match=r"10 answers in a row failed; the last one: the call failed: Connection error"):
        extraction()
    for url, reason in (("https://user:secret@host/v1", "with credentials"), ("host/v1", "give the address")):
        with pytest.raises(UserError, match=reason) as refused:
            extraction(url=url)
        assert "secret" not in str(refused.value)


def _self_signed(path: Path) -> Path:
    """A certificate of 127.0.0.1 that no authority has signed, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now, host = datetime.now(UTC), x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(host, critical=False)
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*form))
    return path


def test_an_unknown_certificate_is_refused(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teacher.endpoint.RETRIES", 0)
    certificate = _self_signed(tmp_path / "server.pem")
    server = serve(certificate=certificate)
    extraction = Extraction(tmp_path, server, TEXTS[:5])
    with pytest.raises(UserError, match=r"a certificate that nobody here vouches for: .*self.signed"):
        extraction()
    assert not server.paid
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert extraction().rows == 5


def _compiled(folder: Path) -> CompiledTask:
    """The task for a student that has never been trained."""
    (folder / "task.yaml").write_text(TASK)
    task = load_task(str(folder / "task.yaml"))
    return compile_for(task, fit_tokenizer(TEXTS, task))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unsure_answers_of_a_prediction_are_an_apis_and_paid_for_once(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("student.predict.predict.ROWS_PER_UNIT", 32)
    server, compiled, student = serve(), _compiled(tmp_path), str(tmp_path / "student")
    save_student(student, make_student(compiled, 3, 6.0, sequence="choices"), compiled)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS, *TEXTS[:10]]))
    api = ["teacher.engine=openai", f"teacher.url={server.url}", "answer.teacher=m", "answer.fallback=1"]
    ours = [f"predict.workers={workers}", "predict.cpus_per_worker=0.5"]

    def run(*more: str) -> None:
        predict(load_config(None, [*api, *ours, *more], {"comments.paths": [str(tmp_path / "texts.jsonl")]}), student, out)

    out = str(tmp_path / "out")
    try:
        with pytest.raises(UserError, match="the budget allows no further call"):
            run("teacher.max_calls=40")
        assert server.paid.total() == 40
        run()
    finally:
        ray.shutdown()
    assert set(server.paid.values()) == {1}
    rows = [json.loads(line) for part in sorted((tmp_path / "out/answers").iterdir()) for line in part.open()]
    assert len(rows) == len(TEXTS) + 10
    assert {row["source"] for row in rows} == {"teacher"}
    (table,) = (table for table in open_shards(str(tmp_path / "out/shards")).tables() if table.texts[0] == TEXTS[0])
    assert np.exp(table.logprobs.astype(float)).max(1) == pytest.approx(SURE, abs=1e-3)  # for a later training
    assert all(row["answer"] == {"mood": ("good", "bad")["bad" in row["body"]]} for row in rows)


def test_a_prediction_does_not_take_a_failed_call_for_an_answer(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teacher.endpoint.RETRIES", 0)
    server, compiled = serve(), _compiled(tmp_path)
    config = TeacherConfig(engine="openai", url=server.url)
    assert ApiTeacher("m", config, compiled, str(tmp_path / "asked")).answer(["a good one"]) == [{"mood": "good"}]
    server.close()
    teacher = ApiTeacher("m", config, compiled, str(tmp_path / "asked"))
    assert teacher.answer(["a good one"]) == [{"mood": "good"}]
    with pytest.raises(UserError, match="Connection error"):
        teacher.answer(["a good one", "a bad one"])


def test_a_service_asks_an_api_and_stands_without_it(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teacher.endpoint.RETRIES", 0)
    server, compiled = serve(), _compiled(tmp_path)
    teacher = ApiTeacher("m", TeacherConfig(engine="openai", url=server.url), compiled)
    with running(Answerer(make_student(compiled, scale=3.0), compiled), teacher, fallback=1) as client:
        for expected in ("teacher", "student"):
            found = client.post("/classify", json={"texts": ["a good one", "a bad one"]}).json()["results"]
            assert [one["source"] for one in found] == [expected] * 2
            server.close()
    assert server.paid == {"a good one": 1, "a bad one": 1}


def _killed(retort: Retort, tmp_path: Path, server: Server, count: int, kills: int) -> None:
    """Texts through a faulty server, by a command that is killed at random."""
    texts = [f"text {i} is {('good', 'bad')[i % 2]}" for i in range(count)]
    extraction, rng = Extraction(tmp_path, server, texts), random.Random(0)
    (tmp_path / "run.json").write_text(json.dumps(extraction.settings()))
    command = [sys.executable, "-m", "pipeline.cli", "extract", f"--config={tmp_path / 'run.json'}"]
    lost = 0
    for _ in range(kills):
        before = server.paid.total()
        process = subprocess.Popen(
            command, cwd=ROOT, env=retort.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while server.paid.total() < before + rng.randint(1, 2 * count // kills // 3) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        lost += process.wait() == -signal.SIGKILL
    retort("extract", f"--config={tmp_path / 'run.json'}", timeout=1200)
    shards = open_shards(str(extraction.out / "shards"))
    rows = [key for table in shards.tables() for key in table.keys[:, 1].tolist()]
    aside = [json.loads(line)["line"] - 1 for line in (extraction.out / "shards/set_aside.jsonl").read_text().splitlines()]
    assert sorted(rows + aside) == list(range(count))
    assert len(aside) < 0.1 * count
    again = sum(times - 2 for times in server.paid.values() if times > 2)  # an answer that does not fit is asked once more
    assert again <= lost * 8  # what was in flight when it was killed
    assert lost > kills // 2


def test_a_killed_run_pays_for_no_answer_twice(retort: Retort, tmp_path: Path, serve: Callable[..., Server]) -> None:
    _killed(retort, tmp_path, serve(0.3), 120, 2)


@pytest.mark.slow
def test_twenty_kills_of_five_thousand_calls(retort: Retort, tmp_path: Path, serve: Callable[..., Server]) -> None:
    _killed(retort, tmp_path, serve(0.3), 5000, 20)


@pytest.fixture(scope="module")
def vllm_server(real_case: RealCase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server with the real teacher, in float32; its URL."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "server.log"
    environment = os.environ | engine_environment(TeacherConfig())
    options = ["--host=127.0.0.1", f"--port={port}", "--dtype=float32", "--block-size=32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={real_case.teacher}", *options]
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        for _ in range(180):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            assert process.poll() is None, log.read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_a_server_of_vllm_gives_what_the_engine_gives(
    retort: Retort, real_case: RealCase, vllm_server: str, tmp_path: Path
) -> None:
    """Probabilities of the answers to 1e-3, and the answers themselves wherever the engine's margin is above 0.01."""
    named = {"task": real_case.task, "teacher": real_case.teacher, "comments": real_case.comments}
    options = [*(f"--{name}={value}" for name, value in named.items()), "--limit=400", "--set=teacher.dtype=float32"]
    retort("extract", *options, f"--out={tmp_path / 'engine'}")
    api = ["--set=teacher.engine=openai", f"--set=teacher.url={vllm_server}", "--set=teacher.requests=32"]
    retort("extract", *options, *api, f"--out={tmp_path / 'api'}")
    engine, api_answers = (_answers(tmp_path / name / "shards") for name in ("engine", "api"))
    assert engine.keys() == api_answers.keys()
    assert len(engine) > 390
    differ = [engine[text] for text, answer in api_answers.items() if answer[0] != engine[text][0]]
    assert all(margin < 0.01 for _, _, margin in differ)
    pairs = [(engine[text][1], answer[1]) for text, answer in api_answers.items() if answer[0] == engine[text][0]]
    assert np.abs(np.subtract(*zip(*pairs, strict=True))).max() < 1e-3


def _answers(folder: Path) -> dict[str, tuple[str, float, float]]:
    """Of each text: the answer, its probability under the automaton, and the least margin of its choices."""
    shards, found = open_shards(str(folder)), {}
    automaton, tokenizer = shards.compiled.automaton, shards.compiled.tokenizer
    for table in shards.tables():
        answers = np.split(table.answers, np.cumsum(table.lengths)[:-1])
        states = np.split(automaton.states_before(answers), np.cumsum(table.lengths)[:-1])
        kept = np.split(table.kept, np.cumsum(table.lengths)[:-1])
        rows = np.split(table.logprobs.astype(np.float64), np.cumsum([some.sum() for some in kept])[:-1])
        for text, answer, at, some, logprobs in zip(table.texts, answers, states, kept, rows, strict=True):
            choice = ~automaton.forced[at[some]]
            shares = np.exp(logprobs[choice][:, : len(automaton.tokens)]) * automaton.allowed[at[some][choice]]
            shares /= shares.sum(1, keepdims=True)
            columns = [automaton.column[int(token)] for token in answer[some][choice]]
            best = np.sort(shares, axis=1)[:, ::-1]
            taken = float(np.prod(shares[np.arange(len(columns)), columns]))
            found[text] = (tokenizer.decode(answer), taken, float((best[:, 0] - best[:, 1]).min()))
    return found
