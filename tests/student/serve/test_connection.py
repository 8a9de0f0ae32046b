from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from student.serve import connection
from tests.student.serve.conftest import FakeAnswerer, Serve

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def hasty(serve: Serve, fake: FakeAnswerer, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A service that waits 0.3 s for a head."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serve(fake) as client:
        yield client


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=5)


def read(client: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"}"):
        answer += client.recv(4096)
    return answer


def cut_off(client: socket.socket, pieces: list[bytes], pause: float) -> bool:
    """Whether the service hangs up before all is sent."""
    try:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause)
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("sent", [b"", b"G", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(hasty: httpx.Client, sent: bytes):
    with connect(hasty) as client:
        client.sendall(sent)
        assert client.recv(1) == b""


def test_a_head_that_trickles_is_not_waited_for(hasty: httpx.Client):
    with connect(hasty) as client:
        assert cut_off(client, [b"x"] * 100, 0.05)


def test_the_head_of_a_later_request_is_not_waited_for_but_an_idle_client_is(hasty: httpx.Client):
    with connect(hasty) as idle, connect(hasty) as half:
        for client in (idle, half):
            client.sendall(HEAD + b"\r\n")
            assert read(client).startswith(b"HTTP/1.1 200")
        half.sendall(HEAD)
        assert half.recv(1) == b""
        idle.sendall(HEAD + b"\r\n")
        assert read(idle).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_a_head(hasty: httpx.Client, fake: FakeAnswerer):
    fake.gate.clear()
    with connect(hasty) as client:
        body = b'{"text": "fine"}'
        client.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + body
        )
        time.sleep(0.6)
        fake.gate.set()
        assert read(client).startswith(b"HTTP/1.1 200")


def test_what_is_left_of_a_refused_body_is_not_waited_for(hasty: httpx.Client):
    with connect(hasty) as client:
        client.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")
        assert cut_off(client, [b"x"] * 100, 0.05)


@pytest.mark.parametrize("piece", [b"x" * 10_000, b"x: y\r\n" * 2000])
def test_a_head_without_end_is_not_read_on(serve: Serve, fake: FakeAnswerer, piece: bytes):
    with serve(fake) as server, connect(server) as client:
        assert cut_off(client, [HEAD, *[piece] * (2 * connection.HEAD_BYTES // len(piece))], 0.002)
