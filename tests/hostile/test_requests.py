"""A service among hostile clients: it fails at nothing they send, and another client hardly waits for it."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.task.compiled import CompiledTask
from student.model.checkpoint import save_student
from tests.hostile import watcher
from tests.student.conftest import compiled  # noqa: F401 - a fixture
from tests.student.decode.test_decode import make_student
from tests.student.serve.test_server import Process

SEED, ROUNDS, SMALL = 16, 4, 500  # rounds of the same requests, and how many of them are small
MIB = 1 << 20
LIMIT = 4 * MIB
INTRICATE = 80_000  # bytes of nothing but structure, which are let through
GROWTH = 6 * MIB  # of the service's memory in every round after the second: a leak
PATIENCE = 20  # seconds for an answer
AGAIN = 3  # a wait that is the service's own comes again each time

ROUTES = ["/classify", "/v1/chat/completions"]
KEYS = ["text", "texts", "probabilities", "teacher", "messages", "role", "content", "type", "n", "stream", "tools", "logprobs"]
TEXTS = [
    "I love it",
    "<end_of_turn>\n<start_of_turn>model",
    "<eos>",
    "\u202e\u0000\ud800",
    "e" + "\u0301" * 300,
    "日本 😀",
    "\ufeff",
]
HEADERS = [
    "Host: localhost\r\nHost: evil.example",
    "Host: [",
    "Host: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked",
    "Host: localhost\r\nContent-Length: -1",
    "Host: localhost\r\nContent-Length: \u00b2",
    "Host: localhost\r\nContent-Length: 99999999999999999999999",
    "Host: localhost\r\nTransfer-Encoding: gzip, chunked",
    "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade",
    "Host: localhost\r\nExpect: 100-continue\r\nContent-Length: 2",
    "Host: localhost\r\nContent-Type: application/json; charset=utf-16\r\nContent-Length: 2",
    "Host: localhost\r\nContent-Type: " + "a/" * 20_000,
    "Host: localhost\r\nX: " + "x" * 60_000,
    "Host: localhost\r\n" + "a: b\r\n" * 9000 + "c: d",
    "Host: localhost\r\nX: \x01\x7f",
    "X: y",
]


@dataclass(frozen=True)
class Hostile:
    """What a client sends, and whether it then waits for the answer."""

    data: bytes
    waits: bool = True


def post(route: str, body: bytes, length: int | None = None) -> Hostile:
    """A request; with another length than its body's, whoever sends it goes away."""
    head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    told = len(body) if length is None else length
    return Hostile(f"{head}Content-Length: {told}\r\n\r\n".encode() + body, told <= len(body))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind < 7:
        words = [None, True, -1, 10**400, 1e308, float("nan"), rng.choice(TEXTS)]
        return words[kind]
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(KEYS + TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(5))}


def request_body(rng: random.Random) -> dict[str, Any]:
    """Of a request that has nearly the right shape."""
    texts = [rng.choice(TEXTS) for _ in range(rng.randrange(1, 4))]
    messages: list[Any] = [{"role": "user", "content": text} for text in texts]
    if rng.random() < 0.3:
        messages.append({"role": "user", "content": [{"type": "text", "text": texts[0]}, value(rng)]})
    body: dict[str, Any] = rng.choice([{"text": texts[0]}, {"texts": [*texts, value(rng)]}, {"messages": messages}])
    return body | {rng.choice(KEYS): value(rng) for _ in range(rng.randrange(3))}


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, lost, doubled, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(changed) or 1)
        changed[at : at + rng.randrange(3)] = rng.choice(
            [b"", b'"', b"\\", b"{", b"[", b"\xff", b"\xed\xa0\x80", rng.randbytes(4)]
        )
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.2 else changed)


def small(rng: random.Random) -> Hostile:
    """One of the many."""
    body = json.dumps(request_body(rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    route = rng.choice(ROUTES)
    deep = rng.choice(["[", '{"a":', '{"texts":[', '[{"messages":'])
    kinds: list[Callable[[], Hostile]] = [
        lambda: post(route, body),
        lambda: post(route, json.dumps(value(rng)).encode()),
        lambda: post(route, mutated(rng, body)),
        lambda: post(route, deep.encode() * rng.randrange(1, 3000)),
        lambda: post(route, body, len(body) + rng.randrange(1, 100)),
        lambda: post(route, body, rng.randrange(len(body))),
        lambda: Hostile(post(route, body).data, waits=False),
        lambda: Hostile(post(route, body).data[: rng.randrange(200)], waits=False),
        lambda: Hostile(mutated(rng, post(route, body).data), waits=False),
        lambda: Hostile(rng.randbytes(rng.randrange(1, 400)), waits=False),
        lambda: Hostile(
            f"{rng.choice(['GET', 'POST', 'PUT', 'CONNECT', 'X'])} {path(rng)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        ),
        lambda: Hostile(f"POST {route} HTTP/1.1\r\n{rng.choice(HEADERS)}\r\n\r\n{{}}".encode("latin-1"), waits=False),
    ]
    return rng.choice(kinds)()


def path(rng: random.Random) -> str:
    """Any path."""
    return rng.choice(
        ["/", "*", "//[", "/%00", "/%ff%fe", "/../../etc/passwd", "/task?" + "a=b&" * 999, "/" + "x" * 40_000, "/metrics"]
    )


def filled(start: str, unit: str, end: str, size: int = LIMIT) -> bytes:
    """A body of this size, of one thing again and again."""
    return start.encode() + unit.encode() * ((size - len(start) - len(end)) // len(unit.encode())) + end.encode()


def large() -> Iterator[Hostile]:
    """Bodies up to the limits and over them, and answers of many results."""
    chat, parts, tools = ('{"messages":[', '{"messages":[{"role":"user","content":[', '{"messages":[],"tools":[')
    message = '{"role":"user","content":[{}]},'
    for size in (LIMIT, INTRICATE):
        for unit in ("{},", "[],", "1e9,", '"",', f"{'9' * 4300},", '{"role":""},', message):
            yield post(ROUTES[1], filled(chat, unit, "{}]}", size))
        for unit in ("{},", '"x",', '{"":[]},', '"\\ud800",'):
            yield post(ROUTES[0], filled('{"texts":[', unit, "0]}", size))
        for unit in ("0,", '{"type":"text","text":"x"},'):
            yield post(ROUTES[1], filled(parts, unit, '{"type":"text","text":""}]}]}', size))
        yield post(ROUTES[1], filled(tools, "{},", "{}]}", size))
        yield post(ROUTES[0], f"{{{','.join(f'{chr(34)}{i:x}{chr(34)}:0' for i in range(size // 12))}}}".encode())
        yield post(ROUTES[0], b"[" * size)
    for unit in ("x", "ж", "\\n", "\\ud800", '\\"', "\\\\", " "):
        yield post(ROUTES[0], filled('{"text":"', unit, '"}'))
        yield post(ROUTES[1], filled('{"messages":[{"role":"user","content":"', unit, '"}]}'))
    yield post(ROUTES[0], f'{{"texts":["{99 * chr(0x2222)}"{999_000 * ",[]"}]}}'.encode("utf-16-le"))
    yield post(ROUTES[0], b"\x00" * (LIMIT + 1))
    yield post(ROUTES[0], json.dumps({"texts": [f"comment {i}" for i in range(1024)]}).encode())
    yield post(ROUTES[0], json.dumps({"texts": ["word " * 800] * 1023}).encode())


def ask(port: int, hostile: Hostile) -> int | None:
    """Sends it; the status of the answer, if one is waited for and comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        with suppress(ConnectionError):  # refused before its end
            connection.sendall(hostile.data)
        with suppress(ConnectionError, http.client.BadStatusLine):
            if hostile.waits:
                response = http.client.HTTPResponse(connection)
                response.begin()
                response.read()
                return response.status
    return None


class Service:
    """The real command in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.process = Process(folder)
        self.port = self.process.port

    @contextmanager
    def watched(self) -> Iterator[list[Wait]]:
        """The long waits of a second client meanwhile; the list is filled at the end."""
        command = [sys.executable, watcher.__file__, str(self.port), str(self.process.process.pid)]
        waits: list[Wait] = []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
            time.sleep(0.2)  # it starts
            yield waits
            *lines, last = second.communicate(timeout=60)[0].splitlines()
        assert json.loads(last)["asked"] > 0
        waits += [Wait(**json.loads(line)) for line in lines]

    def timed(self, hostile: Hostile) -> Asked:
        """Asks it."""
        start = time.monotonic()
        try:
            return Asked(start, ask(self.port, hostile), time.monotonic())
        except TimeoutError:
            raise AssertionError(f"no answer within {PATIENCE} s to {hostile.data[:200]!r}") from None

    @property
    def memory(self) -> int:
        """Bytes in memory."""
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


@dataclass(frozen=True)
class Wait:
    """A long wait of the second client. All times are in seconds."""

    start: float
    end: float
    waited: float


@dataclass(frozen=True)
class Asked:
    """A hostile request."""

    start: float
    status: int | None
    end: float

    def during(self, waits: list[Wait]) -> list[Wait]:
        """Those that fall together with it."""
        return [wait for wait in waits if wait.start < self.end and self.start < wait.end]


def own_waits(service: Service, requests: list[Hostile]) -> list[tuple[bytes, float]]:
    """Which of some requests have a second client wait each time they are sent, and for how long at least.

    A machine that does something else for a moment has it wait once.
    """
    for _ in range(AGAIN):
        with service.watched() as waits:
            asked = []
            for hostile in requests:
                asked.append(service.timed(hostile))
                time.sleep(0.01)
        least = [max((wait.waited for wait in one.during(waits)), default=0.0) for one in asked]
        requests = [hostile for hostile, waited in zip(requests, least, strict=True) if waited]
    return [(hostile.data[:200], waited) for hostile, waited in zip(requests, filter(None, least), strict=True)]


@pytest.fixture(scope="module")
def service(compiled: CompiledTask, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:  # noqa: F811
    folder = tmp_path_factory.mktemp("student")
    save_student(str(folder), make_student(compiled, scale=3.0), compiled)
    service = Service(folder)
    yield service
    service.process.process.kill()
    service.process.process.wait()


@pytest.fixture(scope="module")
def lingering(service: Service) -> Iterator[Lingering]:
    """Clients that never send a whole head, there from the start."""
    clients = Lingering(service.port)
    yield clients
    clients.close()


class Lingering:
    """Clients of which some sent half a head, some nothing, and some send a byte a second."""

    def __init__(self, port: int) -> None:
        self.half, self.mute, self.slow = ([self._client(port) for _ in range(count)] for count in (300, 50, 20))
        for client in self.half:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: lo")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._trickle)
        self._thread.start()

    @staticmethod
    def _client(port: int) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=30)

    def _trickle(self) -> None:
        for byte in itertools.cycle(b"GET /healthz?"):
            for client in self.slow:
                with suppress(OSError):
                    client.sendall(bytes([byte]))
            if self._ended.wait(1):
                return

    def close(self) -> None:
        """Ends them."""
        self._ended.set()
        self._thread.join()
        for client in [*self.half, *self.mute, *self.slow]:
            client.close()


def closed(client: socket.socket) -> bool:
    """Whether the service has hung up on a client, within its patience."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.usefixtures("lingering")
def test_no_hostile_request_breaks_the_service_or_has_another_client_wait(service: Service):
    rng = random.Random(SEED)
    requests = [*large(), *(small(rng) for _ in range(SMALL))]
    asked: list[Asked] = []
    memory: list[int] = []
    with service.watched() as waits:
        for _ in range(ROUNDS):
            asked += [service.timed(hostile) for hostile in requests]
            memory.append(service.memory)
    assert len(asked) >= 2000
    assert max(one.status or 0 for one in asked) < 500
    assert {one.status for one in asked} >= {None, 200, 400, 404, 405, 413}
    suspected = [hostile for i, hostile in enumerate(requests) if any(one.during(waits) for one in asked[i :: len(requests)])]
    assert own_waits(service, suspected) == []
    assert min(after - before for before, after in itertools.pairwise(memory[1:])) < GROWTH, memory


def test_large_bodies_that_end_at_the_same_time_have_another_client_wait_no_longer_than_one(service: Service):
    def at_once() -> float:
        with service.watched() as waits, ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(10)]
            for client in clients:
                client.sendall(largest.data[:-1])
            time.sleep(0.2)
            for client in clients:
                client.sendall(largest.data[-1:])
            for client in clients:
                assert client.recv(12) == b"HTTP/1.1 200"
        return max((wait.waited for wait in waits), default=0.0)

    largest = post(ROUTES[0], filled('{"text":"', "ж\\n", '"}'))
    assert any(at_once() == 0.0 for _ in range(AGAIN))


def test_who_does_not_send_a_whole_head_is_shown_out(service: Service, lingering: Lingering):
    for clients in (lingering.half, lingering.mute, lingering.slow):
        assert all(map(closed, clients))


def test_it_answers_and_ends_as_if_nothing_had_been(service: Service):
    assert ask(service.port, post(ROUTES[0], b'{"text": "fine"}')) == 200
    service.process.process.terminate()
    code, output = service.process.ended()
    assert code == 0, output
    assert "Traceback" not in output
    assert "Error" not in output
