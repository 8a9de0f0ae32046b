from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from pydantic import ValidationError

from student.config import ServeConfig
from student.serve.app import create_app
from student.serve.service import Service
from tests.student.serve.conftest import FakeAnswerer, Serve

JSON = {"Content-Type": "application/json"}


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()["error"]
    assert body.keys() == {"message", "type", "code"}
    assert body["message"]
    return body["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"text": ', "not JSON: Expecting value at character 9"),
        (b'{"\xff": 1}', "UTF-8"),
        (b"[" * 9000, "JSON object"),
        (b"", "body: "),
        (b"[]", "dictionary or object"),
        (b"{}", 'send either "text"'),
        (b'{"text": "a", "texts": ["b"]}', 'send either "text"'),
        (b'{"text": "a", "txet": "b"}', "txet: unknown key"),
        (json.dumps(dict.fromkeys(map(str, range(1000)), 1)).encode(), "1,000 keys: there are only text, texts,"),
        (b'{"texts": [], "a": "' + b"x" * 9999 + b'\x00"}', "UTF-8"),
        ('{"text": "\u2222"}'.encode("utf-16"), "UTF-8"),
        (b'{"text": "a", "\\ud800": 1}', "unicode"),
        (b'{"texts": null}', "texts: Input should be a valid list"),
        (b'{"text": "a", "teacher": "yes"}', "teacher: Input should be a valid boolean"),
        (b'{"text": "a", "probabilities": NaN}', "probabilities: "),
        (b'{"text": "a", "teacher": true}', "start the service with --teacher"),
    ],
)
def test_a_wrong_body_is_refused_by_what_is_wrong_with_it(client: httpx.Client, body: bytes, message: str):
    assert message in error(client.post("/classify", content=body, headers=JSON), 400)


def test_a_form_is_told_the_header_it_lacks(client: httpx.Client):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    message = error(client.post("/classify", content=b'{"text": "a"}', headers=form), 400)
    assert "Content-Type: application/json" in message


def test_a_declared_body_too_large_is_refused_unread(client: httpx.Client):
    assert "20,000 bytes" in error(client.post("/classify", json={"text": "x" * 20_001}), 413)


def test_a_chunked_body_too_large_is_refused_before_its_end(client: httpx.Client):
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50_000_000:
            sent += 10_000
            yield b" " * 10_000

    assert "20,000 bytes" in error(client.post("/classify", content=chunks(), headers=JSON), 413)
    assert client.post("/classify", json={"text": "fine"}).status_code == 200


def test_an_answer_to_a_body_too_large_comes_while_it_is_still_being_sent(client: httpx.Client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        head = (
            "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + b"7000\r\n" + b" " * 0x7000 + b"\r\n")  # and no end
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up(serve: Serve, fake: FakeAnswerer):
    with (
        serve(fake, timeout_seconds=0.2) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection,
    ):
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_body_that_trickles_is_given_up_when_the_time_is_up(serve: Serve, fake: FakeAnswerer):
    with (
        serve(fake, timeout_seconds=0.3) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), timeout=0.05) as connection,
    ):
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        for _ in range(100):
            connection.sendall(b" ")
            with suppress(TimeoutError):
                assert connection.recv(100).startswith(b"HTTP/1.1 408")
                return
    raise AssertionError("it waits without end")


def test_more_json_than_texts_is_refused_before_it_is_parsed(serve: Serve, fake: FakeAnswerer):
    with serve(fake) as client:
        for body in (b'{"texts": [' + b"{}," * 40_000, b'{"texts": [' + b'"",' * 40_000, b'["{}\\\\",' + b"[]," * 40_000):
            assert "bytes of JSON around its strings" in error(client.post("/classify", content=body, headers=JSON), 413)
        texts = ['a "quote", \\ a {brace}, [a bracket]' * 50] * 1024
        assert client.post("/classify", json={"texts": texts}).status_code == 200
        indented = json.dumps({"texts": texts}, indent=4)
        assert client.post("/classify", content=indented, headers=JSON).status_code == 200


def test_too_many_headers_are_refused(client: httpx.Client):
    assert "at most 100" in error(client.get("/healthz", headers={f"x-{i}": "" for i in range(100)}), 431)


def test_too_many_texts_are_refused(client: httpx.Client):
    assert "at most 50" in error(client.post("/classify", json={"texts": ["a"] * 51}), 413)


def test_unknown_places_and_methods_are_refused_in_the_same_shape(client: httpx.Client):
    assert "/openapi.json" in error(client.get("/nowhere"), 404)
    assert "GET" in error(client.get("/classify"), 405)
    assert "/openapi.json" in error(client.get("/v1/nowhere"), 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:1234", 200),
        ("LOCALHOST:1", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1@evil.example", 400),
        ("", 400),
    ],
)
def test_a_page_of_another_site_cannot_reach_a_service_of_this_machine(client: httpx.Client, host: str, status: int):
    assert client.get("/healthz", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["Students.example:80", "10.1.2.3:8000", "[fe80::1]", "localhost", socket.gethostname()])
def test_a_service_for_others_goes_by_addresses_and_the_names_it_is_given(serve: Serve, fake: FakeAnswerer, host: str):
    with serve(fake, host="0.0.0.0", hosts=["students.example"]) as client:
        assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["students.example", "10.1.2.3.evil.example", "[evil.example]", "[", "10.1.2.3@evil.example", ""]
)
def test_a_service_for_others_refuses_a_name_of_another_and_says_where_names_are_listed(
    serve: Serve, fake: FakeAnswerer, host: str
):
    with serve(fake, host="0.0.0.0") as client:
        assert "list other names in serve.hosts" in error(client.get("/healthz", headers={"Host": host}), 400)


@pytest.mark.parametrize("host", ["https://students.example", "students.example:8000", ""])
def test_a_host_is_a_name_alone(host: str):
    with pytest.raises(ValidationError, match="hosts"):
        ServeConfig(hosts=[host])


def test_no_other_site_may_read_answers(client: httpx.Client):
    response = client.get("/task", headers={"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in response.headers)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "server" not in response.headers


def test_a_full_queue_refuses_with_the_time_to_come_back(serve: Serve, fake: FakeAnswerer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("student.serve.service.QUEUE", 3)
    with serve(fake, max_texts=3) as client, ThreadPoolExecutor(2) as pool:
        fake.gate.clear()
        first = pool.submit(client.post, "/classify", json={"text": "fine"})
        while not fake.batches:
            time.sleep(0.005)
        waiting = pool.submit(client.post, "/classify", json={"texts": ["fine"] * 3})
        while "retort_queue_comments 3.0" not in client.get("/metrics").text:
            time.sleep(0.005)
        refused = client.post("/classify", json={"text": "fine"})
        assert "try again in" in error(refused, 429)
        assert int(refused.headers["retry-after"]) >= 1
        fake.gate.set()
        assert first.result().status_code == waiting.result().status_code == 200


def test_a_request_that_takes_too_long_is_given_up_and_never_decoded(serve: Serve, fake: FakeAnswerer):
    with serve(fake, timeout_seconds=0.3) as client, ThreadPoolExecutor(1) as pool:
        fake.gate.clear()
        first = pool.submit(client.post, "/classify", json={"text": "first"})
        while not fake.batches:
            time.sleep(0.005)
        assert "0.3 s" in error(client.post("/classify", json={"text": "late"}), 504)
        error(first.result(), 504)
        fake.gate.set()
        assert client.post("/classify", json={"text": "next"}).status_code == 200
    assert fake.batches == [["first"], ["next"]]


def test_what_a_client_asked_that_hung_up_is_never_decoded(serve: Serve, fake: FakeAnswerer):
    with serve(fake) as client, ThreadPoolExecutor(1) as pool:
        fake.gate.clear()
        first = pool.submit(client.post, "/classify", json={"text": "first"})
        while not fake.batches:
            time.sleep(0.005)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/classify", json={"text": "gone"}, timeout=0.1)
        while 'status="499"' not in client.get("/metrics").text:
            time.sleep(0.005)
        fake.gate.set()
        assert first.result().status_code == 200
        assert client.post("/classify", json={"text": "next"}).status_code == 200
    assert fake.batches == [["first"], ["next"]]


def test_a_failing_model_fails_those_who_asked_alone(serve: Serve, fake: FakeAnswerer):
    with serve(fake) as client:
        assert "the model broke" in error(client.post("/classify", json={"text": "poison"}), 500)
        assert client.post("/classify", json={"text": "fine"}).status_code == 200


def test_a_service_that_has_closed_says_so(fake: FakeAnswerer):
    service = Service(fake, ServeConfig())
    service.close()

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/classify", json={"text": "fine"})

    assert "stopping" in error(asyncio.run(ask()), 503)
