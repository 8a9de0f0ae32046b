"""The real command in a process of its own: it starts, it says where, and it ends without dropping a request."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.task.compiled import CompiledTask
from student.config import ServeConfig
from student.model.checkpoint import save_student
from student.serve.server import DrainingServer
from student.serve.service import Service
from tests.student.decode.test_decode import make_student
from tests.student.serve.conftest import FakeAnswerer
from tests.tiny import ROOT

TEXTS = [f"comment {i} of many" for i in range(70)]


class Process:
    """`retort serve` on a free port."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "pipeline.cli", "serve", "--student", str(folder)]
        command += ["--port", "0", "--set", "serve.threads=1", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
        self._lines: list[str] = []

    @property
    def port(self) -> int:
        assert self.process.stderr is not None
        while not (found := re.search(r"tiny at http://127\.0\.0\.1:(\d+)$", "".join(self._lines).strip())):
            line = self.process.stderr.readline()
            assert line, self._lines
            self._lines.append(line)
        threading.Thread(target=self._read, daemon=True).start()
        return int(found[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._lines += self.process.stderr.readlines()

    def ended(self, timeout: float = 20) -> tuple[int, str]:
        code = self.process.wait(timeout)
        time.sleep(0.05)
        return code, "".join(self._lines)


@pytest.fixture(scope="module")
def folder(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_student(str(folder), make_student(compiled, scale=3.0), compiled)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(folder, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


class Connection:
    """A keep-alive connection that has had one answer."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self.send(["warm"])
        assert self.receive() == (200, 1, None)

    def send(self, texts: list[str]) -> None:
        body = json.dumps({"texts": texts, "probabilities": False})
        self._http.request("POST", "/classify", body, {"Content-Type": "application/json"})

    def receive(self) -> tuple[int, int, str | None]:
        """Status, number of answers, and the connection header."""
        response = self._http.getresponse()
        return response.status, len(json.loads(response.read())["results"]), response.getheader("connection")

    def health(self) -> int:
        self._http.request("GET", "/healthz")
        response = self._http.getresponse()
        response.read()
        return response.status


@pytest.mark.parametrize("workers", [1, 2])
def test_no_request_is_dropped_when_it_is_asked_to_stop(start: Callable[..., Process], workers: int):
    process = start("--set", f"serve.workers={workers}")
    port = process.port
    busy, idle, watching = ([Connection(port) for _ in range(count)] for count in (50, 20, 1))
    for connection in busy:
        connection.send(TEXTS)
    queued = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    process.process.send_signal(signal.SIGSTOP)  # what is sent now waits in the kernel, unread, when the signal is handled
    for connection in idle:
        connection.send(["late", "but sent"])
    queued += [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for connecting in queued:
        connecting.sendall(b"GET /task HTTP/1.1\r\nHost: localhost\r\n\r\n")
    process.process.send_signal(signal.SIGTERM)
    process.process.send_signal(signal.SIGCONT)
    while (health := watching[0].health()) == 200:
        time.sleep(0.01)
    assert health == 503
    time.sleep(0.05)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with ThreadPoolExecutor(20) as pool:
        assert {answer[:2] for answer in pool.map(Connection.receive, busy)} == {(200, 70)}  # some before it was asked
        assert set(pool.map(Connection.receive, idle)) == {(200, 2, "close")}
    for connecting in queued:
        assert connecting.recv(100).startswith(b"HTTP/1.1 200")
    code, output = process.ended()
    assert code == 0, output
    assert "Traceback" not in output
    assert "curl http://127.0.0.1" in output


def test_who_waits_to_be_let_in_when_the_port_closes_is_answered(fake: FakeAnswerer):
    async def stop() -> bytes:
        server, listener = DrainingServer(Service(fake, ServeConfig())), socket.create_server(("127.0.0.1", 0))
        server.config.load()
        server.lifespan, server.servers = server.config.lifespan_class(server.config), []  # nothing takes connections
        with socket.create_connection(listener.getsockname()) as waiting:
            waiting.sendall(b"GET /task HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await server.shutdown([listener])
            return waiting.recv(100)

    assert asyncio.run(stop()).startswith(b"HTTP/1.1 200")


def test_the_drain_is_over_when_its_time_is_up(fake: FakeAnswerer):
    service = Service(fake, ServeConfig(drain_seconds=0.3))
    server, listener = DrainingServer(service), socket.create_server(("127.0.0.1", 0))
    fake.gate.clear()
    with socket.create_connection(listener.getsockname()) as connection:
        body = b'{"text": "fine"}'
        head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
        connection.sendall(head + body)
        server.should_exit = True
        begin = time.monotonic()
        server.run(sockets=[listener])
        assert time.monotonic() - begin < 3
    assert fake.batches == [["fine"]]  # it was in flight
    assert server.left == 1
    fake.gate.set()
    service.close()


def test_an_answer_that_its_client_does_not_fetch_is_left_and_an_idle_connection_is_not(fake: FakeAnswerer):
    server, listener = DrainingServer(Service(fake, ServeConfig(drain_seconds=0.3))), socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the answer must wait in the service
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with socket.socket() as slow, socket.create_connection(listener.getsockname()):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(listener.getsockname())
        body = json.dumps({"texts": ["fine"] * 200}).encode()
        head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        slow.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        server.should_exit = True
        server.run(sockets=[listener])
    assert server.left == 1


def test_requests_that_the_drain_leaves_are_counted_and_the_exit_code_is_not_0(start: Callable[..., Process]):
    process = start("--set", "serve.drain_seconds=0.2")
    port = process.port
    assert Connection(port)  # it serves
    halves = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    for half in halves:
        half.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n{")  # the rest never comes
    process.process.send_signal(signal.SIGTERM)
    code, output = process.ended()
    assert code == 1, output
    assert "ended with 2 requests unanswered: serve.drain_seconds, 0.2 s, were over" in output.replace("\n", " ")


@pytest.mark.slow
def test_it_ends_at_once_at_the_second_signal_and_by_itself_without_requests(start: Callable[[], Process]):
    hurried, calm = start(), start()
    connections = [Connection(hurried.port) for _ in range(20)]
    open_ = Connection(calm.port)
    calm.process.send_signal(signal.SIGINT)
    for connection in connections:
        connection.send(TEXTS * 5)
    hurried.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    hurried.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert hurried.ended()[0] == 130
    assert time.monotonic() - begin < 1
    assert calm.ended()[0] == 0
    assert open_  # all the while


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fallback", "0.6"], "--teacher"),
        (["--student", "nowhere"], "no student"),
        (["--out", "nowhere"], "no student"),
        (["--student", "nowhere", "--host", "nowhere.invalid"], "nowhere.invalid"),
        (["--set", "serve.max_texts=9999"], "less than or equal to 4096"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, arguments: list[str], message: str):
    done = CliRunner().invoke(main, ["serve", "--out", str(tmp_path), "--port", "0", *arguments])
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")


def test_a_port_in_use_is_named(folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", "--student", str(folder), "--port", str(port)])
    assert done.exit_code == 1
    assert f"port {port}" in done.output
    assert "--port 0" in done.output
